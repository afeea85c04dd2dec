"""Normalised input: each clip by itself, as transformers has it; and for which members it is on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import PADDING_BOUND, VARIANTS, padded, precise_jit, relative, speech, torch_encoder
from refusals import refuses
from toy import opened, write_clips

from gura_jax import ConversionError, Member, System, SystemConfigError, checkpoint, load_model
from gura_jax.convert import convert
from gura_jax.convert.parity import compare
from gura_jax.loading import outline
from gura_jax.models.encoder import normalised

QUIET_ROUNDING = 1e-4  # relative: an offset's rounding, 1e-8, over the root of the epsilon


def test_a_clip_is_normalised_as_transformers_has_it() -> None:
    """Quiet, with an offset, silent, and constant; in a batch with garbage past their ends."""
    clips = [speech(4000, 1), 1e-4 * speech(3000, 2), 0.5 + 0.01 * speech(5000, 3), np.full(700, 0.3, np.float32)]
    ours = precise_jit(normalised)(*padded(clips, 6000, garbage=3.0))
    extract: Any = transformers.Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm
    for row, clip in zip(ours, clips, strict=True):
        (exact,) = extract([clip.astype(np.float64)], None)
        scale = len(clip) ** 0.5  # the norm of a normalised clip; of a constant one only rounding is left
        assert np.linalg.norm(row[: len(clip)] - exact) <= QUIET_ROUNDING * scale, len(clip)
        assert not np.asarray(row[len(clip) :]).any()


@pytest.mark.slow
def test_a_system_with_it_is_pytorchs_too() -> None:
    """Parity gives the reference what transformers' feature extractor would."""
    clips = [speech(4000, 1), 0.01 * speech(2500, 2)]
    system = System("both", (Member("wavlm-large"), Member("hubert-base", "mean", normalise=True)), "concatenate")
    assert [member.options.normalise for member in outline(system).fusion.members] == [True, True]
    rows = list(compare(system, clips, weights="random", size="tiny"))
    assert rows
    assert all(row.passed for row in rows)


def test_the_volume_then_changes_nothing() -> None:
    frames = {}
    for normalise in (False, True):
        system = System("one", (Member("wav2vec2-large", normalise=normalise),))
        model = load_model(system, weights="random", size="tiny")
        loud, quiet = model.embed([speech(4000), 0.1 * speech(4000)])
        frames[normalise] = relative(quiet.frames, loud.frames)
    assert frames[True] <= PADDING_BOUND
    assert frames[False] > 100 * PADDING_BOUND


# For which members


def folder(path: Path, preprocessor: dict[str, Any] | None) -> Path:
    """A Hugging Face folder with this ``preprocessor_config.json``."""
    torch_encoder(VARIANTS["wav2vec2 base"]).save_pretrained(path)
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


@pytest.mark.parametrize(
    ("preprocessor", "expected"),
    [
        (None, False),
        ({"do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}, True),
        ({"do_normalize": False}, False),
        ({"sampling_rate": 16_000}, True),  # transformers' own default
        ({"do_normalize": True, "feature_extractor_type": "SeamlessM4TFeatureExtractor"}, False),
    ],
)
def test_a_folder_says_so(preprocessor: dict[str, Any] | None, expected: bool, tmp_path: Path) -> None:
    """And a checkpoint that is converted from it, and what is saved of a model of it."""
    path = folder(tmp_path / "model", preprocessor)
    converted = convert(path)
    checkpoint.save(tmp_path / "checkpoint", converted.params, converted.manifest)
    load_model(path).save(tmp_path / "saved")
    for place in ("model", "checkpoint", "saved"):
        (member,) = outline(str(tmp_path / place)).fusion.members
        assert member.options.normalise is expected, place
    (member,) = outline(System("own", (Member(str(path), normalise=not expected),))).fusion.members
    assert member.options.normalise is not expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", "object"),
        ('{"do_normalize": 1}', "do_normalize: expected true or false, found 1"),
        ("{", "JSON"),
    ],
)
def test_a_preprocessor_that_makes_no_sense(text: str, named: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "model", None)
    (path / "preprocessor_config.json").write_text(text)
    for error, call in ((SystemConfigError, outline), (ConversionError, convert)):
        with refuses(error, "preprocessor_config.json", named):
            call(str(path))


def test_manifests_of_earlier_versions_are_read(tmp_path: Path) -> None:
    converted = convert(folder(tmp_path / "model", {"do_normalize": True}))
    checkpoint.save(tmp_path / "checkpoint", converted.params, converted.manifest)
    path = tmp_path / "checkpoint" / checkpoint.MANIFEST
    content = json.loads(path.read_text())
    assert content.pop("normalise") is True
    path.write_text(json.dumps(content))
    found = checkpoint.read_manifest(tmp_path / "checkpoint")
    assert found == dataclasses.replace(converted.manifest, normalise=False)
    assert found.fingerprint == converted.manifest.fingerprint


@pytest.mark.parametrize("settings", [{"cfg": {"task": {"normalize": True}}}, {"args": {"normalize": True}}])
def test_fairseqs_files_say_so(settings: dict[str, Any], tmp_path: Path) -> None:
    from test_convert import fairseq_arguments, fairseq_state

    model = {"_name": "hubert", **fairseq_arguments("hubert layer")}
    if "cfg" in settings:
        settings["cfg"]["model"] = model
    else:
        settings["args"] |= model
    torch.save({**settings, "model": fairseq_state("hubert layer")}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt").manifest.normalise


def test_the_papers_encoders_are_used_without() -> None:
    for name, expected in {"hubert-large": False, "wav2vec2-large": False, "xls-r-300m": True}.items():
        assert outline(name).fusion.members[0].options.normalise is expected


def test_runs_tell(tmp_path: Path) -> None:
    write_clips(tmp_path / "in", [0.5])
    for normalise in (False, True):
        system = System("one", (Member("wav2vec2-base", normalise=normalise),))
        out = tmp_path / str(normalise)
        opened(tmp_path / "in", out, model=load_model(system, weights="random", size="tiny"))
        (member,) = json.loads((out / "run.json").read_text())["system"]["members"]
        assert member.get("normalise", False) is normalise


def test_where_there_is_no_place_for_it() -> None:
    with refuses(SystemConfigError, "normalise: CREPE normalises each of its frames"):
        outline(System("one", (Member("crepe-tiny", normalise=True),)))
    with refuses(SystemConfigError, "normalise: expected true or false, found 'yes'"):
        Member("hubert-base", normalise="yes")  # pyright: ignore[reportArgumentType]


def test_nothing_but_silence_has_a_finite_result() -> None:
    assert not np.asarray(normalised(jnp.zeros((2, 10)), jnp.array([10, 0]))).any()
