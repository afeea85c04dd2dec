"""What the numerical tests share: small PyTorch encoders of every kind, clips, and the measure."""

import copy
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

from gura_jax.convert import convert
from gura_jax.convert.references import shake
from gura_jax.models.families import config_from_source
from gura_jax.models.wav2vec2_config import Wav2Vec2Config

SAMPLE_RATE = Wav2Vec2Config.sample_rate
PARITY_BOUND = 1e-5  # relative, to PyTorch, each layer: the project's own promise
PADDING_BOUND = 1e-5  # relative, a clip in a padded batch against the clip alone
ORACLE_FACTOR = 2  # no further from float64 than this many times PyTorch's own distance
ORACLE_FLOOR = 1e-6  # about ten float32 roundings: below it two correct computations differ by chance

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 4,
}
_HUBERT = _SMALL | {"model_type": "hubert"}
_WAV2VEC2 = _SMALL | {"model_type": "wav2vec2"}
# So few buckets that the frames of half a second are in near ones, far ones and the last.
_WAVLM = _SMALL | {"model_type": "wavlm", "num_buckets": 16, "max_bucket_distance": 20}
_CONFORMER = _SMALL | {
    "model_type": "wav2vec2-conformer",
    "hidden_act": "swish",
    "position_embeddings_type": "relative",
    "conv_depthwise_kernel_size": 5,
}
_LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

# Every kind of encoder, under the names and values of config.json.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "hubert base": _HUBERT | {"num_hidden_layers": 3},
    "hubert large": _HUBERT | _LARGE,
    "wav2vec2 base": _WAV2VEC2,
    "wav2vec2 large": _WAV2VEC2 | _LARGE,
    "group norm, pre-norm": _WAV2VEC2 | {"do_stable_layer_norm": True},
    "layer norm, post-norm": _HUBERT | {"feat_extract_norm": "layer"},
    "group norm, conv bias": _SMALL | {"model_type": "unispeech-sat", "conv_bias": True},
    "distilhubert, silu": _HUBERT | {"feat_proj_layer_norm": False, "hidden_act": "silu"},
    "batch norm": _HUBERT | {"conv_pos_batch_norm": True},
    "batch norm, pre-norm": _HUBERT | _LARGE | {"conv_pos_batch_norm": True},
    "xls-r": _WAV2VEC2 | _LARGE | {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6},
    "other convolutions": _HUBERT
    | {
        "conv_dim": [8, 12, 16, 20],
        "conv_kernel": [8, 5, 3, 4],
        "conv_stride": [4, 3, 2, 5],
        "num_feat_extract_layers": 4,
        "feat_extract_activation": "relu",
    },
    "relu, odd positions": _WAV2VEC2 | {"hidden_act": "relu", "num_conv_pos_embeddings": 19},
    "gelu_new, other eps": _HUBERT | _LARGE | {"hidden_act": "gelu_new", "layer_norm_eps": 0.01},
    "mms": _WAV2VEC2 | _LARGE | {"adapter_attn_dim": 5},
    "data2vec": _SMALL
    | {"model_type": "data2vec-audio", "conv_bias": True, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
    "conformer, relative": _CONFORMER | _LARGE | {"layer_norm_eps": 0.001},
    "conformer, rotary": _CONFORMER | {"position_embeddings_type": "rotary", "rotary_embedding_base": 300},
    "wavlm base": _WAVLM,
    "wavlm large": _WAVLM | _LARGE | {"conv_bias": False},
}


class Encoder(NamedTuple):
    """A PyTorch encoder, the same in float64, and what was converted from it."""

    torch: Any
    double: Any
    config: Wav2Vec2Config
    params: dict[str, np.ndarray]


def torch_encoder(attributes: Mapping[str, Any], seed: int = 0) -> Any:
    """A random encoder; see ``shake`` for why no parameter could be left out or swapped unseen."""
    kind: Any = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[attributes["model_type"]]]
    config = kind.config_class(**{k: v for k, v in attributes.items() if k != "model_type"})
    torch.manual_seed(seed)
    model = kind(config).eval()
    shake(model)
    return model


@functools.cache
def encoder(variant: str) -> Encoder:
    """A variant, saved as a Hugging Face folder and converted."""
    model = torch_encoder(VARIANTS[variant], seed=list(VARIANTS).index(variant))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        params = convert(folder).params
    return Encoder(model, copy.deepcopy(model).double(), config_from_source(saved), params)


def torch_states(model: Any, clip: np.ndarray) -> list[np.ndarray]:
    """Hidden states [T, D] of one clip, in the model's own precision; the last after the final layer norm."""
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        out = model(torch.from_numpy(clip).to(dtype)[None], output_hidden_states=True)
    return [x[0].numpy() for x in (*out.hidden_states[:-1], out.last_hidden_state)]


def relative(a: Any, b: Any) -> float:
    """||a - b|| / ||b||, Euclidean, in float64; shapes must agree."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_parity(ours: Any, single: Any, double: Any, name: str = "", floor: float = ORACLE_FLOOR) -> None:
    """As close to PyTorch as promised, and about as close to the truth as PyTorch is."""
    to_torch, to_oracle, torch_to_oracle = relative(ours, single), relative(ours, double), relative(single, double)
    assert to_torch <= PARITY_BOUND, f"{name}: {to_torch:.2e} from PyTorch"
    assert to_oracle <= max(ORACLE_FACTOR * torch_to_oracle, floor), (
        f"{name}: {to_oracle:.2e} from float64, PyTorch {torch_to_oracle:.2e}"
    )


def precise_jit(function: Any, **options: Any) -> Any:
    """``jax.jit`` with full float32 matrix products, as the library compiles."""

    @functools.wraps(function)
    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return jax.jit(precise, **options)


def speech(samples: int, seed: int = 0) -> np.ndarray:
    """A clip with pitch, noise and an envelope, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(120 + 60 * np.sin(2 * np.pi * 3 * t + seed)) / SAMPLE_RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    envelope = 0.2 + 0.8 * np.sin(2 * np.pi * 2 * t + seed) ** 2
    return (0.3 * envelope * voice + 0.05 * rng.standard_normal(samples)).clip(-1, 1).astype(np.float32)


def sine(frequency: float, samples: int) -> np.ndarray:
    """A pure tone of amplitude one half."""
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(samples) / SAMPLE_RATE)).astype(np.float32)


def padded(clips: list[np.ndarray], samples: int, garbage: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Clips in one batch [B, samples] and lengths; past each clip, noise of amplitude ``garbage``."""
    batch = garbage * np.random.default_rng(99).standard_normal((len(clips), samples))
    batch = batch.astype(np.float32)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch, np.array([len(clip) for clip in clips], np.int32)


def recording(name: str) -> Path:
    """A recording that is not in the repository; skips the test where it is not at hand."""
    default = Path(__file__).parents[1] / ".." / "shared" / "audio"
    path = Path(os.environ.get("GURA_JAX_AUDIO", default)) / name
    if not path.is_file():
        pytest.skip(f"no {name}: set GURA_JAX_AUDIO to the folder that has it")
    return path
