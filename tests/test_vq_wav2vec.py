"""models/vq_wav2vec.py: parts beside fairseq's network, norms over each clip in blocks, codes, files, refusals."""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import assert_parity, padded, precise_jit, relative, speech
from refusals import refuses

from gura_jax import ENCODERS, Options
from gura_jax.backend import PLATFORMS
from gura_jax.convert import convert
from gura_jax.convert.references import VqWav2Vec
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.models.families import build_encoder
from gura_jax.models.vq_wav2vec import VqWav2VecConfig

BLOCK_BOUND = 1e-6  # relative: the same sums in other blocks
BFLOAT16_BOUND = 0.05  # relative; its numbers have 8 bits
SMALL_BLOCKS = dataclasses.replace(PLATFORMS["cpu"], frames=16)


def tiny(name: str, **changes: Any) -> VqWav2VecConfig:
    return dataclasses.replace(ENCODERS[name].config.tiny(), **changes)


VARIANTS: Mapping[str, VqWav2VecConfig] = {
    "gumbel": tiny("vq-wav2vec"),
    "k-means": tiny("vq-wav2vec-kmeans"),
    "none": tiny("wav2vec-large"),
    "gumbel, three layers, own codes": tiny("vq-wav2vec", vq_depth=3, combine_groups=False, residual_scale=0.25),
    "gumbel, one layer, zeros": tiny("vq-wav2vec", vq_depth=1, vq_groups=1, agg_zero_pad=True, activation="relu"),
    "k-means, own codes": tiny("vq-wav2vec-kmeans", combine_groups=False, vq_groups=4, log_compression=True),
    "no skips, no bias": tiny("vq-wav2vec", skip_connections_agg=False, aggregator_bias=False),
}
CLIPS = [speech(n, n) for n in (16_000, 7001, 640)]
SECOND = ("gumbel, three layers, own codes", "gumbel, one layer, zeros", "k-means, own codes")
variants = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def made(variant: str) -> tuple[VqWav2Vec, Mapping[str, np.ndarray]]:
    """A reference with random weights, and what was converted from it."""
    reference = VqWav2Vec.random(VARIANTS[variant], list(VARIANTS).index(variant))
    with tempfile.TemporaryDirectory() as folder:
        converted = convert(reference.save(Path(folder) / "saved"))
    assert converted.manifest.architecture == VARIANTS[variant]
    return reference, converted.params


def reference_parts(variant: str, clip: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    reference, _ = made(variant)
    with torch.inference_mode():
        parts = reference.to(dtype).parts(torch.from_numpy(clip).to(dtype)[None], 160)
        found = {name: value.numpy() for name, value in parts}
    reference.float()
    return found


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SECOND else name for name in VARIANTS]
)
def test_every_part_in_a_padded_batch(variant: str) -> None:
    """Parity and padding at once; what is embedded, in blocks, is the last part."""
    _, params = made(variant)
    encoder = build_encoder(VARIANTS[variant], Options(platform=SMALL_BLOCKS))

    def every(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        states = {name: (value, counts) for name, value, counts in encoder.states(params, audio, lengths)}
        return states, encoder(params, audio, lengths)

    parts, out = jax.device_get(precise_jit(every)(params, *padded(CLIPS, 17_111, 3.0)))
    assert set(parts) == set(encoder.parts)
    for b, clip in enumerate(CLIPS):
        single, double = (reference_parts(variant, clip, dtype) for dtype in (torch.float32, torch.float64))
        ours = {name: value[b, : counts[b]] for name, (value, counts) in parts.items()}
        assert out.counts[b] == len(ours["state 3"]) == 1 + (len(clip) - 465) // 160
        assert relative(out.frames[b, : out.counts[b]], ours["state 3"]) < BLOCK_BOUND
        assert ours.keys() == single.keys()
        for name, value in ours.items():
            assert_parity(value, single[name], double[name], f"{len(clip)} samples, {name}")
    assert np.isfinite(out.frames).all()


@pytest.mark.parametrize("variant", ["gumbel", "k-means"])
def test_codes_differ(variant: str) -> None:
    """The first state is made of few vectors, of which the clip has several."""
    encoder, (_, params) = build_encoder(VARIANTS[variant], Options((0,))), made(variant)
    frames = np.asarray(precise_jit(encoder)(params, *padded(CLIPS[:1], 16_000)).frames[0])
    for part in np.split(frames, 2, axis=1):
        assert 2 <= len(np.unique(part, axis=0)) <= 7


@pytest.mark.parametrize("variant", ["gumbel", "k-means", "none"])
def test_bfloat16_and_gradients(variant: str) -> None:
    _, params = made(variant)
    batch = tuple(map(jnp.asarray, padded([CLIPS[0], np.zeros(16_000, np.float32)], 17_000)))
    if variant == "none":  # others' codes may differ
        whole = precise_jit(build_encoder(VARIANTS[variant], Options()))(params, *batch)
        encoder = build_encoder(VARIANTS[variant], Options(dtype="bfloat16"))
        found = precise_jit(encoder)(encoder.prepare(dict(params)), *batch)
        assert relative(found.frames[0], whole.frames[0]) < BFLOAT16_BOUND
    encoder = build_encoder(VARIANTS[variant], Options("mean", remat="layers"))
    held = encoder.prepare({name: jnp.asarray(value) for name, value in params.items()})
    gradient = precise_jit(jax.grad(lambda params: jnp.square(encoder(params, *batch).frames).mean()))(held)
    for name, by in gradient.items():
        assert np.isfinite(by).all(), name
        # The codebook of k-means is trained by a loss of its own.
        assert bool((by != 0).any()) or (variant, name) == ("k-means", "quantizer.codes"), name


@variants
def test_files_of_fairseq(variant: str, tmp_path: Path) -> None:
    """With ``args``, and heads that are ignored."""
    reference, params = made(variant)
    state = reference.model.state_dict() | {"wav2vec_predictions.project_to_steps.weight": torch.ones(3)}
    arguments = argparse.Namespace(arch="wav2vec", **reference.settings)
    torch.save({"args": arguments, "model": state}, tmp_path / "vq.pt")
    converted = convert(tmp_path / "vq.pt")
    assert converted.manifest.architecture == VARIANTS[variant]
    assert converted.params.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(converted.params[name], value, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator": "gru"}, "aggregator is 'gru', which is not supported: expected 'cnn'"),
        ({"skip_connections_feat": True}, "skip_connections_feat is True"),
        ({"non_affine_group_norm": True}, "non_affine_group_norm is True"),
        ({"vq_dim": 8}, "vq_dim is 8: expected 0, or the features' 16"),
        ({"vq_type": "lfq"}, "vq_type: expected one of gumbel, kmeans, none, found 'lfq'"),
        ({"activation": "tanh"}, "activation: expected one of gelu"),
        ({"conv_aggregator_layers": "[(16, 2, 2)]"}, "expected layers of 16 channels"),
        ({"conv_aggregator_layers": "[(8, 2, 1)]"}, "expected layers of 16 channels"),
        ({"conv_feature_layers": "open('x')"}, "conv_feature_layers is \"open('x')\""),
        ({"vq_groups": 3}, "conv_dim: expected a last one that 3 groups divide, found 16"),
        ({"residual_scale": 0.0}, "residual_scale: expected a positive number, found 0.0"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = made("gumbel")[0].save(tmp_path / "saved")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"model_cfg": content["model_cfg"] | changes}, path)
    with refuses(ConversionError, words):
        convert(path)
    del content["model_cfg"]
    torch.save(content, path)
    with refuses(ConversionError, "no settings beside the weights"):
        convert(path)


def test_options_and_sizes() -> None:
    config = VARIANTS["gumbel"]
    with refuses(SystemConfigError, "hop:", "a frame every 160 samples"):
        build_encoder(config, Options(hop=320))
    with refuses(SystemConfigError, "layers:", "its input and 3 blocks"):
        build_encoder(config, Options((4,)))
    with refuses(SystemConfigError, "conv_dim, conv_kernel, conv_stride"):
        dataclasses.replace(config, conv_kernel=(1, 2))
