"""HuBERT and wav2vec 2.0: one architecture, two families, its sizes as data.

Follows the PyTorch models of transformers (``HubertModel``, ``Wav2Vec2Model``) exactly, except that a clip's
results never depend on the padding: group norm takes its statistics over each clip's own frames.
Papers: wav2vec 2.0 (Baevski et al., 2020), HuBERT (Hsu et al., 2021).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gura_jax.convert.wav2vec2 import KEYS
from gura_jax.models.attention import over_frames
from gura_jax.models.convolution import Convolution, convolution, convolution_by_taps, grouped_convolution
from gura_jax.models.encoder import (
    Family,
    FrameGrid,
    Options,
    Params,
    Preset,
    frame_mask,
    masked_mean,
    normalised,
)
from gura_jax.models.transformer import ACTIVATIONS, Transformer, TransformerEncoder, layer_norm
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

CONV_NORM_EPS = 1e-5  # PyTorch's default: the feature encoder ignores the config's layer_norm_eps
BATCH_NORM_EPS = 1e-5  # PyTorch's default, for conv_pos_batch_norm


class Statistics(NamedTuple):
    """Mean and variance of each channel over a clip's own frames: [B, C] each."""

    mean: jax.Array
    variance: jax.Array


class MaskedGroupNorm(nnx.Module):
    """GroupNorm with one group a channel, given the statistics over each clip's own frames."""

    def __init__(self, size: int, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        mean, variance = (each[:, None, :] for each in statistics)
        scale = jax.lax.rsqrt(variance + CONV_NORM_EPS) * self.scale[...][None, None, :]
        return (x - mean) * scale + self.bias[...][None, None, :]


def convolution_for(options: Options) -> Convolution:
    """The form whose gradient suits the platform."""
    return convolution_by_taps if options.platform.kernel_gradient_by_taps else convolution


class ConvLayer(nnx.Module):
    """One layer of the feature encoder: convolution, norm (if any), activation."""

    def __init__(self, config: Wav2Vec2Config, index: int, options: Options, *, rngs: nnx.Rngs) -> None:
        in_size = config.conv_dim[index - 1] if index else 1
        size = config.conv_dim[index]
        self.kernel, self.stride = config.conv_kernel[index], config.conv_stride[index]
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        convolve = convolution_for(options)
        self.conv = nnx.Conv(
            in_size,
            size,
            self.kernel,
            strides=self.stride,
            padding="VALID",
            use_bias=config.conv_bias,
            dtype=options.compute_dtype,
            conv_general_dilated=lambda x, kernel, strides, *_, **__: convolve(x, kernel, *strides),
            rngs=rngs,
        )
        if config.feat_extract_norm == "layer":
            self.norm = layer_norm(size, CONV_NORM_EPS, rngs)
        else:
            self.norm = MaskedGroupNorm(size, rngs=rngs) if index == 0 else None

    def __call__(self, x: jax.Array, statistics: Statistics | None) -> jax.Array:
        """[B, T, C] -> [B, (T - kernel) // stride + 1, C']; ``statistics`` are for group norm."""
        x = self.conv(x)
        if isinstance(self.norm, MaskedGroupNorm):
            assert statistics is not None
            x = self.norm(x.astype(jnp.float32), statistics)
        elif self.norm is not None:
            x = self.norm(x)
        return self.activation(x)


class FeatureExtractor(nnx.Module):
    """Waveform to frames: seven strided convolutions, in blocks of frames.

    No padding, so frames past a clip touch none within; and a block of frames is a function of its own samples
    alone, but for group norm, whose statistics over the clip are computed first, in blocks too.
    """

    def __init__(self, config: Wav2Vec2Config, options: Options, *, rngs: nnx.Rngs) -> None:
        self.window, self.hop, self.block = config.window, config.hop, options.platform.frames
        self.rematerialise = options.rematerialise
        self.layers = nnx.List(ConvLayer(config, i, options, rngs=rngs) for i in range(len(config.conv_dim)))

    def __call__(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Audio [B, N], lengths [B] -> frames [B, T, C], counts [B]."""
        num_frames = (audio.shape[1] - self.window) // self.hop + 1
        statistics = self.statistics(audio, lengths)

        def layers(samples: jax.Array, start: jax.Array) -> jax.Array:
            x = samples[:, :, None]
            for layer in self.layers:
                x = layer(x, statistics)
            return x

        layers = self.rematerialise(layers)
        x = over_frames(layers, audio, num_frames, self.window, self.hop, self.block)  # [B, n, F, C]
        x = x.reshape(len(audio), -1, x.shape[-1])[:, :num_frames]
        return x, (lengths - self.window) // self.hop + 1

    def statistics(self, audio: jax.Array, lengths: jax.Array) -> Statistics | None:
        """Statistics of whole clips for group norm: of each block, combined as in Chan et al. (1983)."""
        first = self.layers[0]
        if not isinstance(first.norm, MaskedGroupNorm):
            return None
        num_frames = (audio.shape[1] - first.kernel) // first.stride + 1
        counts = (lengths - first.kernel) // first.stride + 1  # [B]

        def moments(samples: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            x = first.conv(samples[:, :, None]).astype(jnp.float32)  # [B, F, C]
            mask = frame_mask(counts - start, x.shape[1])
            mean = masked_mean(x, mask)
            squares = jnp.where(mask[:, :, None], jnp.square(x - mean[:, None, :]), 0.0)
            return mask.sum(axis=1, dtype=x.dtype), mean, squares.sum(axis=1)

        size = self.block * self.hop // first.stride  # of as many samples as a block of the last layer's frames
        moments = self.rematerialise(moments)
        count, mean, squares = over_frames(moments, audio, num_frames, first.kernel, first.stride, size)
        total = count.sum(axis=1)[:, None]  # [B, 1], of [B, n]
        overall = (count[:, :, None] * mean).sum(axis=1) / total
        between = (count[:, :, None] * jnp.square(mean - overall[:, None, :])).sum(axis=1)
        return Statistics(overall, (squares.sum(axis=1) + between) / total)


class FeatureProjection(nnx.Module):
    """Layer norm and linear projection to the transformer's width."""

    def __init__(self, config: Any, options: Options, *, rngs: nnx.Rngs) -> None:
        size = config.conv_dim[-1]
        use_norm = config.feat_proj_layer_norm
        self.layer_norm = layer_norm(size, config.layer_norm_eps, rngs) if use_norm else None
        self.projection = nnx.Linear(size, config.hidden_size, dtype=options.compute_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x if self.layer_norm is None else self.layer_norm(x)).astype(jnp.float32)


class ConvolutionalPositionalEmbedding(nnx.Module):
    """Grouped convolution over time; zero past each clip's end, as if the clip stood alone."""

    def __init__(self, config: Wav2Vec2Config, options: Options, *, rngs: nnx.Rngs) -> None:
        size, groups, self.dtype = config.hidden_size, config.num_conv_pos_embedding_groups, options.compute_dtype
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        if config.conv_pos_batch_norm:
            self.batch_norm = nnx.BatchNorm(
                size, use_running_average=True, epsilon=BATCH_NORM_EPS, dtype=jnp.float32, rngs=rngs
            )
        else:
            self.batch_norm = None
        self.conv = nnx.Conv(size, size, config.num_conv_pos_embeddings, feature_group_count=groups, rngs=rngs)
        self.convolve = convolution_for(options)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        x = same_convolution(self.conv, jnp.where(mask[:, :, None], x, 0.0).astype(self.dtype), self.convolve)
        return self.activation(x).astype(jnp.float32)


def same_convolution(conv: nnx.Conv, x: jax.Array, convolve: Convolution) -> jax.Array:
    """A grouped convolution over time, padded as PyTorch does with kernel // 2: [B, T, D] -> [B, T, D]."""
    assert conv.bias is not None
    kernel, bias = (weight[...].astype(x.dtype) for weight in (conv.kernel, conv.bias))
    size = len(kernel)  # of an even kernel PyTorch's last frame is dropped
    x = jnp.pad(x, ((0, 0), (size // 2, (size - 1) // 2), (0, 0)))
    return grouped_convolution(x, kernel, conv.feature_group_count, convolve) + bias[None, None, :]


class PositionalTransformer(Transformer):
    """Positional convolution and blocks."""

    positional_class: Any = ConvolutionalPositionalEmbedding

    def __init__(self, config: Any, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        self.pos_conv_embed = self.positional_class(config, options, rngs=rngs)
        super().__init__(config, options, num_blocks, rngs=rngs)

    def start(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The first state, from the projected frames."""
        x = jnp.where(mask[:, :, None], x, 0.0)
        x = x + self.pos_conv_embed(x, mask)
        return x if self.pre_norm else self.layer_norm(x)


class Wav2Vec2(nnx.Module):
    """HuBERT or wav2vec 2.0 without its heads.

    ``dtype`` is that of convolutions and matrix products; norms, softmax, residual sums and hidden states are float32.
    """

    transformer_class: Any = PositionalTransformer

    def __init__(self, config: Any, options: Options, num_blocks: int, *, rngs: nnx.Rngs) -> None:
        self.feature_extractor = FeatureExtractor(config, options, rngs=rngs)
        self.feature_projection = FeatureProjection(config, options, rngs=rngs)
        self.encoder = self.transformer_class(config, options, num_blocks, rngs=rngs)

    def project(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Frames that the transformer takes.

        Args:
            audio: [B, N] float32 at 16 kHz.
            lengths: [B] int32, samples in each clip.

        Returns:
            frames [B, T, D], counts [B] int32 and the mask [B, T] of the frames within each clip.
        """
        x, counts = self.feature_extractor(audio, lengths)
        return self.feature_projection(x), counts, frame_mask(counts, x.shape[1])


class Wav2Vec2Encoder(TransformerEncoder):
    """HuBERT or wav2vec 2.0 as a member: its chosen layers, combined.

    Hidden states are the transformer's input (after the positional convolution, and the layer norm of post-norm
    models), then each block's output, in pre-norm models the last after the final layer norm (as in transformers 4).
    """

    config: Wav2Vec2Config
    network_class = Wav2Vec2
    positional: bool = True  # convolutions for positions come before the blocks

    def __init__(self, config: Wav2Vec2Config, options: Options) -> None:
        super().__init__(config, options, FrameGrid(config.hop, config.window / 2, config.window))
        self.sample_rate = config.sample_rate
        self.parts = (
            *(f"convolution {i}" for i in range(len(config.conv_dim))),
            "projection",
            *(["positional"] if self.positional else []),
            *(f"state {i}" for i in range(self.num_states)),
        )

    def inputs(self, network: Wav2Vec2, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The projected frames."""
        x, _, mask = network.project(self._given(audio, lengths), lengths)
        return x, mask

    def _given(self, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """What the network is given of the audio [B, N]."""
        return normalised(audio, lengths) if self.options.normalise else audio

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """Each convolution's output (whole, not in blocks), the projection, the positional embedding, the states."""
        network: Wav2Vec2 = self.network(params)
        audio = self._given(audio, lengths)
        statistics = network.feature_extractor.statistics(audio, lengths)
        x, counts = audio[:, :, None], lengths
        for i, layer in enumerate(network.feature_extractor.layers):
            x, counts = layer(x, statistics), (counts - layer.kernel) // layer.stride + 1
            yield f"convolution {i}", x, counts
        x, counts, mask = network.project(audio, lengths)
        yield "projection", x, counts
        if self.positional:
            yield "positional", network.encoder.pos_conv_embed(x, mask), counts
        for i, state in enumerate(network.encoder(x, mask)):
            yield f"state {i}", state, counts


LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}
XLARGE: dict[str, Any] = LARGE | {"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120}
_2B: dict[str, Any] = XLARGE | {"hidden_size": 1920, "intermediate_size": 7680}
_LARGE_POST_NORM: dict[str, Any] = LARGE | {
    "do_stable_layer_norm": False,
    "feat_extract_norm": "group",
    "conv_bias": False,
}
_DISTILLED: dict[str, Any] = {"num_hidden_layers": 2, "feat_proj_layer_norm": False}


def _preset(model_type: str, source: str | None, licence: str, *, normalise: bool = False, **sizes: Any) -> Preset:
    return Preset(Wav2Vec2Config(model_type, **sizes), source, normalise, licence)


# Normalised as the published preprocessor says, except the paper's encoders, which it used without.
HUBERT = Family(
    name="hubert",
    config=Wav2Vec2Config,
    build=Wav2Vec2Encoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Hubert",
    presets={
        "hubert-base": _preset("hubert", "facebook/hubert-base-ls960", "Apache-2.0"),
        "hubert-large": _preset("hubert", "facebook/hubert-large-ll60k", "Apache-2.0", **LARGE),
        "hubert-xlarge": _preset("hubert", "facebook/hubert-xlarge-ll60k", "Apache-2.0", **XLARGE),
        "mhubert-147": _preset("hubert", "utter-project/mHuBERT-147", "CC-BY-NC-SA-4.0"),
        "contentvec": _preset("hubert", "lengyue233/content-vec-best", "MIT"),
        "distilhubert": _preset("hubert", "ntu-spml/distilhubert", "Apache-2.0", **_DISTILLED),
        # torchaudio's files, on no hub.
        "aves-base": _preset("hubert", None, ""),
        "birdaves-base": _preset("hubert", None, ""),
        "birdaves-large": _preset("hubert", None, "", **_LARGE_POST_NORM),
    },
)
WAV2VEC2 = Family(
    name="wav2vec2",
    config=Wav2Vec2Config,
    build=Wav2Vec2Encoder,
    keys=KEYS,
    reference="gura_jax.convert.references.Wav2Vec2",
    presets={
        "wav2vec2-base": _preset("wav2vec2", "facebook/wav2vec2-base", "Apache-2.0"),
        "wav2vec2-large": _preset("wav2vec2", "facebook/wav2vec2-large-960h-lv60-self", "Apache-2.0", **LARGE),
        "xlsr-53": _preset("wav2vec2", "facebook/wav2vec2-large-xlsr-53", "Apache-2.0", normalise=True, **LARGE),
        "xls-r-300m": _preset("wav2vec2", "facebook/wav2vec2-xls-r-300m", "Apache-2.0", normalise=True, **LARGE),
        "xls-r-1b": _preset("wav2vec2", "facebook/wav2vec2-xls-r-1b", "Apache-2.0", normalise=True, **XLARGE),
        "xls-r-2b": _preset("wav2vec2", "facebook/wav2vec2-xls-r-2b", "Apache-2.0", normalise=True, **_2B),
        "mms-300m": _preset("wav2vec2", "facebook/mms-300m", "CC-BY-NC-4.0", normalise=True, **LARGE),
        "mms-1b": _preset("wav2vec2", "facebook/mms-1b", "CC-BY-NC-4.0", normalise=True, **XLARGE),
    },
)
# Both have wav2vec 2.0's network, and other objectives.
UNISPEECH = Family(
    name="unispeech",
    config=Wav2Vec2Config,
    build=Wav2Vec2Encoder,
    keys=KEYS,
    reference="gura_jax.convert.references.UniSpeech",
    presets={
        "unispeech-large": _preset(
            "unispeech", "microsoft/unispeech-large-1500h-cv", "CC-BY-SA-3.0", normalise=True, **LARGE
        ),
    },
)
UNISPEECH_SAT = Family(
    name="unispeech-sat",
    config=Wav2Vec2Config,
    build=Wav2Vec2Encoder,
    keys=KEYS,
    reference="gura_jax.convert.references.UniSpeechSat",
    presets={
        "unispeech-sat-base": _preset("unispeech-sat", "microsoft/unispeech-sat-base", "CC-BY-SA-3.0", normalise=True),
        "unispeech-sat-base-plus": _preset(
            "unispeech-sat", "microsoft/unispeech-sat-base-plus", "CC-BY-SA-3.0", normalise=True
        ),
        "unispeech-sat-large": _preset(
            "unispeech-sat",
            "microsoft/unispeech-sat-large",
            "CC-BY-SA-3.0",
            normalise=True,
            **LARGE | {"conv_bias": False},
        ),
    },
)
