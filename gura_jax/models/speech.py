"""HuBERT and wav2vec 2.0: one architecture, its sizes as data.

Follows the PyTorch models of transformers (``HubertModel``, ``Wav2Vec2Model``) exactly, except that a clip's
results never depend on the padding: group norm takes its statistics over each clip's own frames.
Papers: wav2vec 2.0 (Baevski et al., 2020), HuBERT (Hsu et al., 2021).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gura_jax.errors import SystemConfigError
from gura_jax.fusion import weighted_sum
from gura_jax.models.encoder import (
    DType,
    DTypeName,
    Functional,
    Params,
    frame_mask,
    functional,
    kernels_as,
    masked_mean,
    random_params,
)

CONV_NORM_EPS = 1e-5  # PyTorch's default: the feature encoder ignores the config's layer_norm_eps
BATCH_NORM_EPS = 1e-5  # PyTorch's default, for conv_pos_batch_norm
QUERIES_AT_ONCE, KEYS_AT_ONCE = 1024, 512  # of a head whose scores do not fit; they do in a core's own cache
MASKED_SCORE = -1e30  # of attention to what is past a clip's end: its exponential is zero


class Blocks(NamedTuple):
    """How much is computed at once; the results are the same but for rounding."""

    frames: int  # of the feature encoder, whose first layer has 64 times as many
    clips: int  # whose block of frames is computed at once
    scores: int  # bytes of attention scores
    tokens: int = 1 << 30  # in a feed-forward layer


# On a CPU what fits into its caches is faster by a third (benchmarks/README.md); on a GPU or TPU what fills it.
BLOCKS = {"cpu": Blocks(64, 1, 16 << 20, 2048)}
ACCELERATOR_BLOCKS = Blocks(1024, 16, 1 << 30, 1 << 16)


def blocks() -> Blocks:
    """Those of the backend in use."""
    return BLOCKS.get(jax.default_backend(), ACCELERATOR_BLOCKS)


def gelu(x: jax.Array) -> jax.Array:
    """By erf, as PyTorch has it; ``jax.nn.gelu`` takes erfc, which takes longer."""
    half, root = (jnp.asarray(value, x.dtype) for value in (0.5, math.sqrt(0.5)))
    return half * x * (1 + jax.lax.erf(x * root))


ACTIVATIONS = {
    "gelu": gelu,
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


def _layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class ConvLayer(nnx.Module):
    """One layer of the feature encoder: convolution, norm (if any), activation."""

    def __init__(self, config: SpeechConfig, index: int, dtype: DType, *, rngs: nnx.Rngs) -> None:
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
            dtype=dtype,
            rngs=rngs,
        )
        if config.feat_extract_norm == "layer":
            self.norm = _layer_norm(size, CONV_NORM_EPS, rngs)
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

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        self.window, self.hop = config.window, config.hop
        self.layers = nnx.List(ConvLayer(config, i, dtype, rngs=rngs) for i in range(len(config.conv_dim)))

    def __call__(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Audio [B, N], lengths [B] -> frames [B, T, C], counts [B]."""
        num_frames = (audio.shape[1] - self.window) // self.hop + 1
        statistics = self.statistics(audio, lengths)

        def layers(window: jax.Array, clip: jax.Array, start: jax.Array) -> jax.Array:
            own = None if statistics is None else Statistics(*(each[clip][None] for each in statistics))
            x = window[None, :, None]
            for layer in self.layers:
                x = layer(x, own)
            return x[0]

        x = _in_blocks(layers, audio, num_frames, self.window, self.hop)  # [B, n, F, C]
        x = x.reshape(len(audio), -1, x.shape[-1])[:, :num_frames]
        return x, (lengths - self.window) // self.hop + 1

    def statistics(self, audio: jax.Array, lengths: jax.Array) -> Statistics | None:
        """What group norm needs of whole clips: block by block, put together as Chan et al. (1983) do."""
        first = self.layers[0]
        if not isinstance(first.norm, MaskedGroupNorm):
            return None
        num_frames = (audio.shape[1] - first.kernel) // first.stride + 1
        counts = (lengths - first.kernel) // first.stride + 1  # [B]

        def moments(window: jax.Array, clip: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            x = first.conv(window[None, :, None]).astype(jnp.float32)  # [1, F, C]
            mask = (start + jnp.arange(x.shape[1]) < counts[clip])[None, :]
            mean = masked_mean(x, mask)
            squares = jnp.where(mask[:, :, None], jnp.square(x - mean[:, None, :]), 0.0)
            return mask.sum(dtype=x.dtype), mean[0], squares.sum(axis=(0, 1))

        scale = self.hop // first.stride
        count, mean, squares = _in_blocks(moments, audio, num_frames, first.kernel, first.stride, scale)
        total = count.sum(axis=1)[:, None]  # [B, 1], of [B, n]
        overall = (count[:, :, None] * mean).sum(axis=1) / total
        between = (count[:, :, None] * jnp.square(mean - overall[:, None, :])).sum(axis=1)
        return Statistics(overall, (squares.sum(axis=1) + between) / total)


def _in_blocks(
    function: Callable[..., Any], audio: jax.Array, num_frames: int, window: int, hop: int, scale: int = 1
) -> Any:
    """Call a function of a block's samples for all blocks of all clips, some at a time.

    Args:
        function: (samples [W], clip [], first frame []) -> a pytree of arrays.
        audio: [B, N].
        num_frames: how many there are.
        window, hop: of a frame, in samples.
        scale: how many times as many frames as :class:`Blocks` says are in one block.

    Returns:
        What the function returned, each array [B, n, ...].
    """
    B = len(audio)
    n = -(-num_frames // (blocks().frames * scale))
    frames = -(-num_frames // n)  # of a block
    samples = (frames - 1) * hop + window
    missing = max(0, (n - 1) * frames * hop + samples - audio.shape[1])
    audio = jnp.pad(audio, ((0, 0), (0, missing)))

    def block(index: jax.Array) -> Any:
        clip, start = index // n, index % n * frames
        one = jax.lax.dynamic_slice(audio, (clip, start * hop), (1, samples))[0]
        return function(one, clip, start)

    out = jax.lax.map(block, jnp.arange(B * n, dtype=jnp.int32), batch_size=blocks().clips)
    return jax.tree.map(lambda x: x.reshape(B, n, *x.shape[1:]), out)


class FeatureProjection(nnx.Module):
    """Layer norm and linear projection to the transformer's width."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        size = config.conv_dim[-1]
        use_norm = config.feat_proj_layer_norm
        self.layer_norm = _layer_norm(size, config.layer_norm_eps, rngs) if use_norm else None
        self.projection = nnx.Linear(size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x if self.layer_norm is None else self.layer_norm(x)).astype(jnp.float32)


class ConvolutionalPositionalEmbedding(nnx.Module):
    """Grouped convolution over time; zero past each clip's end, as if the clip stood alone."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        size, kernel = config.hidden_size, config.num_conv_pos_embeddings
        self.activation = ACTIVATIONS[config.feat_extract_activation]
        if config.conv_pos_batch_norm:
            self.batch_norm = nnx.BatchNorm(
                size, use_running_average=True, epsilon=BATCH_NORM_EPS, dtype=jnp.float32, rngs=rngs
            )
        else:
            self.batch_norm = None
        self.conv = nnx.Conv(
            size,
            size,
            kernel,
            padding=((kernel // 2, (kernel - 1) // 2),),  # PyTorch pads kernel // 2 and drops the last frame
            feature_group_count=config.num_conv_pos_embedding_groups,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.batch_norm is not None:
            x = self.batch_norm(x)
        x = jnp.where(mask[:, :, None], x, 0.0)  # [B, T, D]
        return self.activation(self.conv(x)).astype(jnp.float32)


class Attention(nnx.Module):
    """Multi-head self-attention over each clip's own frames."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nnx.Linear(size, size, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q, k, v = (p(x).reshape(B, T, self.num_heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16:
            x = jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=mask.sum(axis=1, dtype=jnp.int32), implementation="cudnn"
            )
        else:
            x = attention(q, k, v, mask)  # [B, T, H, D / H]
        return self.out_proj(x.reshape(B, T, D)).astype(jnp.float32)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention, exactly, of some heads, queries and keys at a time: never [T, T] of all heads.

    Where a head's scores do not fit, its softmax runs over blocks of keys (Milakov and Gimelshein, 2018).

    Args:
        q, k, v: [B, T, H, K].
        mask: [B, T], True for the keys that count.

    Returns:
        [B, T, H, K].
    """
    B, T, H, K = q.shape
    q = q * np.asarray(K**-0.5, q.dtype)
    limit = blocks().scores // 4  # float32 scores at once
    size, keys = (T, T) if limit >= T * T else (min(T, QUERIES_AT_ONCE), min(T, KEYS_AT_ONCE))
    heads = max(h for h in range(1, B * H + 1) if B * H % h == 0 and h <= max(1, limit // (size * keys)))

    def cut(x: jax.Array, size: int) -> jax.Array:
        """[B, T, H, ...] -> [B * H / heads, T / size, heads, size, ...]."""
        x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(B, -1, size, *x.shape[2:])  # [B, n, size, H, ...]
        x = jnp.moveaxis(x, 3, 1).reshape(-1, heads, *x.shape[1:3], *x.shape[4:])
        return x.swapaxes(1, 2)

    masks = jnp.broadcast_to(mask[:, :, None], (B, T, H))
    queries, *others = cut(q, size), cut(k, keys), cut(v, keys), cut(masks, keys)
    groups, n = queries.shape[:2]

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        group, part = i // n, i % n
        attended = _attend(out[group, part], *(x[group] for x in others))
        return jax.lax.dynamic_update_slice(out, attended[None, None], (group, part, *(jnp.zeros_like(i),) * 3))

    # Each block of results takes its queries' place: an array of zeros to fill, as lax.map has, would be made
    # for every layer at the very start.
    out = jax.lax.fori_loop(0, groups * n, block, queries)
    out = out.swapaxes(1, 2).reshape(B, H, -1, K)[:, :, :T]
    return out.swapaxes(1, 2)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled queries [h, Q, K] over n blocks of keys and values [n, h, T, K], mask [n, h, T]: [h, Q, K]."""

    def block(carry: tuple[jax.Array, jax.Array, jax.Array], x: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        highest, total, out = carry
        k, v, mask = x
        scores = jnp.einsum("hqk,htk->hqt", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, :], scores, MASKED_SCORE)
        new = jnp.maximum(highest, scores.max(axis=-1))
        weights, scale = jnp.exp(scores - new[:, :, None]), jnp.exp(highest - new)
        products = jnp.einsum("hqt,htk->hqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (new, total * scale + weights.sum(axis=-1), out * scale[:, :, None] + products), None

    start = jnp.full(q.shape[:2], MASKED_SCORE, jnp.float32), jnp.zeros(q.shape[:2], jnp.float32)
    (_, total, out), _ = jax.lax.scan(block, (*start, jnp.zeros(q.shape, jnp.float32)), (k, v, mask))
    return (out / total[:, :, None]).astype(v.dtype)


class FeedForward(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[config.hidden_act]
        self.intermediate_dense = nnx.Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.output_dense = nnx.Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def some(tokens: jax.Array) -> jax.Array:
            return self.output_dense(self.activation(self.intermediate_dense(tokens))).astype(jnp.float32)

        size, tokens = blocks().tokens, x.reshape(-1, x.shape[-1])
        if len(tokens) <= size:
            return some(x)

        def block(i: jax.Array, out: jax.Array) -> jax.Array:
            start = (size * i, jnp.zeros_like(i))
            return jax.lax.dynamic_update_slice(
                out, some(jax.lax.dynamic_slice(out, start, (size, out.shape[1]))), start
            )

        # Results take the tokens' place, as in attention.
        out = jnp.pad(tokens, ((0, -len(tokens) % size), (0, 0)))
        return jax.lax.fori_loop(0, len(out) // size, block, out)[: len(tokens)].reshape(x.shape)


class EncoderLayer(nnx.Module):
    """A transformer block; layer norm after each part (post-norm) or before it (``do_stable_layer_norm``)."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.attention = Attention(config, dtype, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.feed_forward = FeedForward(config, dtype, rngs=rngs)
        self.final_layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if self.pre_norm:
            x = x + self.attention(self.layer_norm(x), mask)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))


class Transformer(nnx.Module):
    """Positional convolution and blocks; yields the L + 1 hidden states one by one."""

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        self.pre_norm = config.do_stable_layer_norm
        self.pos_conv_embed = ConvolutionalPositionalEmbedding(config, dtype, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.layers = nnx.List(EncoderLayer(config, dtype, rngs=rngs) for _ in range(config.num_hidden_layers))

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
    """HuBERT or wav2vec 2.0 without its heads.

    ``dtype`` is that of convolutions and matrix products; norms, softmax, residual sums and hidden states are float32.
    """

    def __init__(self, config: SpeechConfig, dtype: DType, *, rngs: nnx.Rngs) -> None:
        self.feature_extractor = FeatureExtractor(config, dtype, rngs=rngs)
        self.feature_projection = FeatureProjection(config, dtype, rngs=rngs)
        self.encoder = Transformer(config, dtype, rngs=rngs)

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
def speech_functional(config: SpeechConfig, dtype: DTypeName = "float32") -> Functional:
    """The encoder of ``config`` as a pure function of a flat dict of weights."""
    return functional(lambda rngs: SpeechEncoder(config, jnp.dtype(dtype), rngs=rngs))


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
    dtype: DTypeName = "float32"

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
        return random_params(lambda rngs: SpeechEncoder(self.config, jnp.dtype(jnp.float32), rngs=rngs), seed)

    def prepare(self, params: Params) -> Params:
        """The weights that a call takes, from a checkpoint's: those of products in ``dtype``."""
        return kernels_as(params, self.dtype)

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames [B, T, D] and counts [B]; the layers' weighted sum is a running one."""
        states, counts = speech_functional(self.config, self.dtype).merge(params)(audio, lengths)
        return weighted_sum(states, layer_weights(self.layers, self.config.num_hidden_layers)), counts

    def hidden_states(
        self, params: Params, audio: jax.Array, lengths: jax.Array, states: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """The hidden states of these numbers, 0 being the transformer's input: [B, K, T, D], and counts [B]."""
        every, counts = speech_functional(self.config, self.dtype).merge(params)(audio, lengths)
        chosen = {i: state for i, state in zip(range(max(states) + 1), every, strict=False) if i in states}
        return jnp.stack([chosen[i] for i in states], axis=1), counts


@dataclasses.dataclass(frozen=True)
class LayerMeans:
    """The mean over time of every hidden state, side by side: one frame a clip, however long it is.

    What layer weights are learned from; a member like any other. See :class:`Encoder` for the call.
    """

    frames: SpeechFrames
    hop: int = 1 << 40  # samples: longer than any clip

    @property
    def config(self) -> SpeechConfig:
        """Of the encoder."""
        return self.frames.config

    @property
    def num_states(self) -> int:
        """L + 1."""
        return self.config.num_hidden_layers + 1

    @property
    def feature_size(self) -> int:
        """(L + 1) D, the size of the frame."""
        return self.num_states * self.config.hidden_size

    @property
    def offset(self) -> float:
        """As of the encoder."""
        return self.frames.offset

    @property
    def min_samples(self) -> int:
        """As of the encoder."""
        return self.frames.min_samples

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The frame [B, 1, (L + 1) D], and counts [B], all 1."""
        states, counts = speech_functional(self.config, self.frames.dtype).merge(params)(audio, lengths)
        means = [masked_mean(state, frame_mask(counts, state.shape[1])) for state in states]
        return jnp.concatenate(means, axis=-1)[:, None, :], jnp.ones_like(counts)
