"""HuBERT and wav2vec 2.0: one architecture, its sizes as data.

Follows the PyTorch models of transformers (``HubertModel``, ``Wav2Vec2Model``) exactly, except that a clip's
results never depend on the padding: group norm takes its statistics over each clip's own frames.
Papers: wav2vec 2.0 (Baevski et al., 2020), HuBERT (Hsu et al., 2021).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.errors import SystemConfigError
from gura_jax.fusion import weighted_sum
from gura_jax.models.encoder import Functional, Params, frame_mask, functional, masked_mean, random_params

CONV_NORM_EPS = 1e-5  # PyTorch's default: the feature encoder ignores the config's layer_norm_eps
BATCH_NORM_EPS = 1e-5  # PyTorch's default, for conv_pos_batch_norm

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """Sizes and kinds, under the names that transformers' ``config.json`` gives them; defaults are Base."""

    model_type: Literal["hubert", "wav2vec2"]
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    do_stable_layer_norm: bool = False  # pre-norm transformer
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: str = "gelu"
    feat_proj_layer_norm: bool = True
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False

    def __post_init__(self) -> None:
        faults = [*self._kind_faults(), *self._size_faults()]
        if faults:
            raise SystemConfigError("unsupported encoder config:\n" + "\n".join(f"  - {f}" for f in faults))

    def _kind_faults(self) -> Iterator[str]:
        for name, choices in (
            ("model_type", ("hubert", "wav2vec2")),
            ("feat_extract_norm", ("group", "layer")),
            ("hidden_act", tuple(ACTIVATIONS)),
            ("feat_extract_activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in choices:
                yield f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}"
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                yield f"{field.name}: expected true or false, found {getattr(self, field.name)!r}"

    def _size_faults(self) -> Iterator[str]:
        sizes: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        wrong = False
        for name in INT_FIELDS:
            if not _is_size(sizes[name]):
                wrong = True
                yield f"{name}: expected a positive integer, found {sizes[name]!r}"
        for name in TUPLE_FIELDS:
            if not (isinstance(sizes[name], tuple) and sizes[name] and all(map(_is_size, sizes[name]))):
                wrong = True
                yield f"{name}: expected a list of positive integers, found {sizes[name]!r}"
        if not (isinstance(self.layer_norm_eps, float) and 0 < self.layer_norm_eps < 1):
            yield f"layer_norm_eps: expected a small positive number, found {self.layer_norm_eps!r}"
        if wrong:
            return
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            yield "conv_dim, conv_kernel and conv_stride: expected lists of one length, found " + ", ".join(
                str(len(sizes[name])) for name in TUPLE_FIELDS
            )
        for divisor in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % sizes[divisor]:
                yield f"hidden_size {self.hidden_size} is not a multiple of {divisor} {sizes[divisor]}"

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_stride)

    @property
    def window(self) -> int:
        """Samples that a frame's convolutions see."""
        window, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            window, hop = window + (kernel - 1) * hop, hop * stride
        return window

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "SpeechConfig":
        """Read the ``config.json`` of a HuBERT or wav2vec 2.0 model.

        Raises:
            SystemConfigError: naming every attribute that changes the computation and is not handled.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in config.items()
            if k in fields and not (k == "conv_pos_batch_norm" and v is None)
        }
        faults = []
        if known.get("model_type") not in ("hubert", "wav2vec2"):
            faults.append(f"model_type: expected hubert or wav2vec2, found {known.get('model_type')!r}")
        layers = config.get("num_feat_extract_layers")
        dims = known.get("conv_dim", cls.conv_dim)
        if layers is not None and isinstance(dims, tuple) and layers != len(dims):
            faults.append(f"num_feat_extract_layers: expected the length of conv_dim, found {layers!r}")
        for name, default in (("conv_pos_batch_norm", False), ("feat_proj_layer_norm", True)):
            if known.get("model_type") == "wav2vec2" and known.get(name, default) != default:
                faults.append(f"{name} = {known[name]!r} is of HuBERT only: transformers' wav2vec 2.0 ignores it")
        for name, value in config.items():
            if name in fields or name == "num_feat_extract_layers" or IGNORED.fullmatch(name):
                continue
            if name in NEUTRAL:
                if value not in NEUTRAL[name]:
                    faults.append(f"{name} = {value!r} changes the computation and is not supported")
            else:
                faults.append(f"{name} = {value!r} is not an attribute that this converter knows")
        if faults:
            raise SystemConfigError("unsupported encoder config:\n" + "\n".join(f"  - {f}" for f in faults))
        return cls(**known)


INT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
)
TUPLE_FIELDS = ("conv_dim", "conv_kernel", "conv_stride")

# Attributes of config.json that change what the encoder computes, with the values that leave it unchanged.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "adapter_attn_dim": (None,),  # MMS adapters in every block
    "add_adapter": (False, None),  # convolutions after the last block
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
}

# Attributes that do not change it: training, task heads, tokenizers, generation, bookkeeping.
IGNORED = re.compile(
    r"""
    # regularisation and masking, in training only
    layerdrop | apply_spec_augment | (no_)?mask_\w+ | freeze_feat_extract_train
    | (hidden|activation|attention|final|feat\w*)_dropout(_prob)?
    | gradient_checkpointing | initializer_(range|factor)
    # what is built on the encoder
    | ctc_\w+ | vocab_size | use_weighted_layer_sum | classifier_proj_size | tdnn_\w+ | xvector_output_dim
    | \w*codevector\w* | num_negatives | contrastive_logits_temperature | diversity_loss_weight
    | adapter_(kernel_size|stride) | num_adapter_layers | output_hidden_size
    | problem_type | num_labels | id2label | label2id | finetuning_task | task_specific_params
    # tokens and generation
    | (bos|eos|pad|sep|unk|decoder_start)_token_id | tokenizer_class | prefix
    | max_length | min_length | do_sample | early_stopping | num_beams | num_beam_groups | diversity_penalty
    | temperature | top_k | top_p | typical_p | repetition_penalty | length_penalty | \w*no_repeat_ngram_size
    | bad_words_ids | suppress_tokens | begin_suppress_tokens | num_return_sequences
    | forced_(bos|eos)_token_id | remove_invalid_values | exponential_decay_length_penalty
    # bookkeeping
    | architectures | auto_map | _?name_or_path | transformers_version | torch_dtype | dtype | torchscript
    | output_attentions | output_hidden_states | output_scores | return_dict(_in_generate)? | use_bfloat16
    | tie_word_embeddings | _attn_implementation\w* | attn_implementation | _commit_hash | tf_legacy_loss
    | replace_prediction_class | processor_class
    """,
    re.VERBOSE,
)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class MaskedGroupNorm(nnx.Module):
    """GroupNorm with one group a channel, its statistics over each clip's own frames."""

    def __init__(self, size: int, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        mask = frame_mask(counts, x.shape[1])
        centred = x - masked_mean(x, mask)[:, None, :]  # [B, T, C]
        variance = masked_mean(jnp.square(centred), mask)[:, None, :]
        scale = jax.lax.rsqrt(variance + CONV_NORM_EPS) * self.scale[...][None, None, :]
        return centred * scale + self.bias[...][None, None, :]


def _layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class ConvLayer(nnx.Module):
    """One layer of the feature encoder: convolution, norm (if any), activation."""

    def __init__(self, config: SpeechConfig, index: int, *, rngs: nnx.Rngs) -> None:
        in_size = config.conv_dim[index - 1] if index else 1
        size = config.conv_dim[index]
        self.kernel, self.stride = config.conv_kernel[index], config.conv_stride[index]
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        self.conv = nnx.Conv(
            in_size,
            size,
            self.kernel,
            strides=self.stride,
            padding="VALID",
            use_bias=config.conv_bias,
            rngs=rngs,
        )
        if config.feat_extract_norm == "layer":
            self.norm = _layer_norm(size, CONV_NORM_EPS, rngs)
        else:
            self.norm = MaskedGroupNorm(size, rngs=rngs) if index == 0 else None

    def __call__(self, x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.conv(x)  # [B, T, C]
        counts = (counts - self.kernel) // self.stride + 1
        if isinstance(self.norm, MaskedGroupNorm):
            x = self.norm(x, counts)
        elif self.norm is not None:
            x = self.norm(x)
        return self.activation(x), counts


class FeatureExtractor(nnx.Module):
    """Waveform to frames: seven strided convolutions. No padding, so frames past a clip touch none within."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List(ConvLayer(config, i, rngs=rngs) for i in range(len(config.conv_dim)))

    def __call__(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, counts = audio[:, :, None], lengths  # [B, N, 1]
        for layer in self.layers:
            x, counts = layer(x, counts)
        return x, counts  # [B, T, C], [B]


class FeatureProjection(nnx.Module):
    """Layer norm and linear projection to the transformer's width."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        size = config.conv_dim[-1]
        use_norm = config.feat_proj_layer_norm
        self.layer_norm = _layer_norm(size, config.layer_norm_eps, rngs) if use_norm else None
        self.projection = nnx.Linear(size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x if self.layer_norm is None else self.layer_norm(x))


class ConvolutionalPositionalEmbedding(nnx.Module):
    """Grouped convolution over time; zero past each clip's end, as if the clip stood alone."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        size, kernel = config.hidden_size, config.num_conv_pos_embeddings
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        if config.conv_pos_batch_norm:
            self.batch_norm = nnx.BatchNorm(size, use_running_average=True, epsilon=BATCH_NORM_EPS, rngs=rngs)
        else:
            self.batch_norm = None
        self.conv = nnx.Conv(
            size,
            size,
            kernel,
            padding=((kernel // 2, (kernel - 1) // 2),),  # PyTorch pads kernel // 2 and drops the last frame
            feature_group_count=config.num_conv_pos_embedding_groups,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        x = jnp.where(mask[:, :, None], x, 0.0)  # [B, T, D]
        return self.activation(self.conv(x))


class Attention(nnx.Module):
    """Multi-head self-attention over each clip's own frames."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nnx.Linear(size, size, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q, k, v = (p(x).reshape(B, T, self.num_heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])  # [B, T, H, D / H]
        return self.out_proj(x.reshape(B, T, D))


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.intermediate_dense = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.output_dense = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output_dense(self.activation(self.intermediate_dense(x)))


class EncoderLayer(nnx.Module):
    """A transformer block; layer norm after each part (post-norm) or before it (``do_stable_layer_norm``)."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.attention = Attention(config, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.final_layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.pre_norm:
            x = x + self.attention(self.layer_norm(x), mask)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))


class Transformer(nnx.Module):
    """Positional convolution and blocks; yields the L + 1 hidden states one by one."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.pos_conv_embed = ConvolutionalPositionalEmbedding(config, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.layers = nnx.List(EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x: jax.Array, mask: jax.Array) -> Iterator[jax.Array]:
        x = jnp.where(mask[:, :, None], x, 0.0)
        x = x + self.pos_conv_embed(x, mask)
        if not self.pre_norm:
            x = self.layer_norm(x)
        yield x
        for i, layer in enumerate(self.layers):
            x = layer(x, mask)
            last = i == len(self.layers) - 1
            yield self.layer_norm(x) if self.pre_norm and last else x


class SpeechEncoder(nnx.Module):
    """HuBERT or wav2vec 2.0 without its heads."""

    def __init__(self, config: SpeechConfig, *, rngs: nnx.Rngs) -> None:
        self.feature_extractor = FeatureExtractor(config, rngs=rngs)
        self.feature_projection = FeatureProjection(config, rngs=rngs)
        self.encoder = Transformer(config, rngs=rngs)

    def __call__(self, audio: jax.Array, lengths: jax.Array) -> tuple[Iterator[jax.Array], jax.Array]:
        """Hidden states, one by one, so that a caller that sums them holds one at a time.

        Args:
            audio: [B, N] float32 at 16 kHz.
            lengths: [B] int32, samples in each clip.

        Returns:
            An iterator over L + 1 states [B, T, D]: the transformer's input (after the positional
            convolution, and the layer norm of post-norm models), then each block's output, in pre-norm models
            the last after the final layer norm (reference: transformers 4); and counts [B] int32.
        """
        x, counts = self.feature_extractor(audio, lengths)
        return self.encoder(self.feature_projection(x), frame_mask(counts, x.shape[1])), counts


@functools.cache
def speech_functional(config: SpeechConfig) -> Functional:
    """The encoder of ``config`` as a pure function of a flat dict of weights."""
    return functional(lambda rngs: SpeechEncoder(config, rngs=rngs))


Layers = Literal["last", "mean", "mean_blocks"] | tuple[int, ...] | tuple[float, ...]
"""Which hidden states an encoder's frames are made of: see :func:`layer_weights`."""


def layer_weights(layers: Layers, num_hidden_layers: int) -> np.ndarray:
    """Weights [L + 1] of the hidden states, state 0 being the transformer's input.

    Args:
        layers: ``"last"``; ``"mean"`` of all L + 1 states, as the authors' code has it; ``"mean_blocks"``,
            the L blocks' outputs alone, as the paper's Equation 1 has it; integers, the mean of these states
            (negative ones count from the end); or L + 1 floats, a weighted sum.
        num_hidden_layers: L.

    Raises:
        SystemConfigError: anything else.
    """
    num_states = num_hidden_layers + 1
    weights = np.zeros(num_states, np.float32)
    listed: Sequence[Any] = layers if isinstance(layers, (tuple, list)) else ()
    if isinstance(layers, str):
        chosen = {"last": slice(-1, None), "mean": slice(None), "mean_blocks": slice(1, None)}.get(layers)
        if chosen is not None:
            weights[chosen] = 1.0
            return weights / weights.sum()
    elif listed and all(isinstance(x, int) and not isinstance(x, bool) for x in listed):
        states = {int(x) % num_states for x in listed if -num_states <= x < num_states}
        if len(states) == len(listed):  # in range, and distinct
            weights[sorted(states)] = 1.0
            return weights / weights.sum()
    elif len(listed) == num_states and all(isinstance(x, float) for x in listed):
        with np.errstate(over="ignore"):
            weights[:] = listed
        if np.isfinite(weights).all() and weights.any():
            return weights
    raise SystemConfigError(
        f"layers: expected 'last', 'mean', 'mean_blocks', distinct integers from {-num_states} to "
        f"{num_states - 1}, or {num_states} finite floats, not all zero (one for each hidden state of this "
        f"encoder: its input and {num_hidden_layers} blocks), found {layers!r}"
    )


@dataclasses.dataclass(frozen=True)
class SpeechFrames:
    """A speech encoder as a member: its chosen layers, combined. See :class:`Encoder` for the call."""

    config: SpeechConfig
    layers: Layers = "last"

    def __post_init__(self) -> None:
        layer_weights(self.layers, self.config.num_hidden_layers)

    @property
    def feature_size(self) -> int:
        """D, the size of a frame."""
        return self.config.hidden_size

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return self.config.hop

    @property
    def offset(self) -> float:
        """Samples from the start of the clip to the centre of its first frame."""
        return self.config.window / 2

    @property
    def min_samples(self) -> int:
        """A clip of n samples has 1 + (n - min_samples) // hop frames."""
        return self.config.window

    @property
    def abstract_params(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Every weight's shape and dtype, by dotted path."""
        return speech_functional(self.config).abstract

    def random_params(self, seed: int) -> dict[str, jax.Array]:
        """Freshly initialised weights, by dotted path."""
        return random_params(lambda rngs: SpeechEncoder(self.config, rngs=rngs), seed)

    def prepare(self, params: Params) -> Params:
        """The weights that a call takes: a checkpoint's, as they are."""
        return params

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames [B, T, D] and counts [B]; the layers' weighted sum is a running one."""
        states, counts = speech_functional(self.config).merge(params)(audio, lengths)
        return weighted_sum(states, layer_weights(self.layers, self.config.num_hidden_layers)), counts

    def hidden_states(
        self, params: Params, audio: jax.Array, lengths: jax.Array, states: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """The hidden states of these numbers, 0 being the transformer's input: [B, K, T, D], and counts [B]."""
        every, counts = speech_functional(self.config).merge(params)(audio, lengths)
        chosen = {i: state for i, state in zip(range(max(states) + 1), every, strict=False) if i in states}
        return jnp.stack([chosen[i] for i in states], axis=1), counts
