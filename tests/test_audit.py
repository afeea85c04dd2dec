"""gura_jax/audit: clips alone against batches, for our systems, HEAR modules and transformers' models."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import torch
import transformers
from matplotlib import image
from reference import SAMPLE_RATE, VARIANTS, speech, torch_encoder
from toy import Toy
from typer.testing import CliRunner

from gura_jax import Member, System, cli
from gura_jax.audit import compare, subjects
from gura_jax.audit.cases import CASES, RATIOS
from gura_jax.errors import AudioError, GuraError, InputError, SystemConfigError

FRAME = 400  # samples of a frame of the HEAR module


def audited(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["audit", *map(str, arguments)], catch_exceptions=False)


def as_json(*arguments: Any, code: int) -> dict[str, Any]:
    found = audited(*arguments, "--json")
    assert found.exit_code == code, found.output

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(found.stdout, parse_constant=refuse)


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    """Arguments that give two clips, one of them of no whole number of frames."""
    arguments = []
    for i, samples in enumerate((4000, 6543)):
        path = tmp_path / f"clip-{i}.wav"
        soundfile.write(path, speech(samples, i), SAMPLE_RATE)
        arguments += ["--audio", str(path)]
    return arguments


# The batches


def test_cases_are_what_is_promised() -> None:
    """Companions of every length, silence and noise, every position, both orders; and no case twice."""
    assert {(ratio, content) for case in CASES for ratio in case.companions for content in [case.content]} >= {
        (ratio, content) for ratio in RATIOS for content in ("silence", "noise")
    }
    assert {case.position() for case in CASES} == {"first", "middle", "last"}
    orders = {case.companions for case in CASES if len(set(case.companions)) > 1}
    assert len(orders) == 2
    assert {order[::-1] for order in orders} == orders
    assert len(set(CASES)) == len(CASES)
    clip = speech(1000)
    for case in CASES:
        batch = case.batch(clip, 700)
        assert batch[case.row] is clip
        assert [len(x) for i, x in enumerate(batch) if i != case.row] == [
            max(700, round(1000 * ratio)) for ratio in case.companions
        ]


# Our systems


def test_ours_pass(clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Group norm, where PyTorch fails."""
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    found = as_json("hubert_base", "--weights", "random", "--size", "tiny", *clips[:2], code=0)
    assert found["passed"]
    assert 0 < found["worst"]["frames"] <= compare.PADDING_BOUND == found["bound"]
    assert {row["mode"] for row in found["results"]} == {"one batch", "more padding", "packed by embed()"}
    assert all(row["frames_in_batch"] == row["frames_alone"] == 12 for row in found["results"])


def test_ours_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a clip that is too short is a failing case, and the others go on."""
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    system: Any = System("toy", (Member(Toy(), name="toy"),))
    subject = subjects.OwnSystem(system, "pretrained", None)
    clips = [compare.Clip("a", speech(4000)), compare.Clip("short", speech(390))]
    short, *results = [result for results in compare.audit(subject, clips) for result in results]
    assert short.clip == "short"
    assert "expected at least" in str(short.problem)
    assert {result.mode.name for result in results} == {mode.name for mode in subject.modes}
    assert subject.modes[-1].name == "on 2 devices"
    assert max(result.difference for result in results) <= compare.PADDING_BOUND


def test_ours_in_plain_words() -> None:
    with pytest.raises(SystemConfigError, match="hear:NAME, transformers:NAME"):
        audited("no_such_system")


# transformers


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, bool], str]:
    """Save a small encoder and its feature extractor; returns its name for the audit."""

    def save(variant: str, mask: bool) -> str:
        torch_encoder(VARIANTS[variant]).save_pretrained(tmp_path / "model")
        extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask, do_normalize=True)
        extractor.save_pretrained(tmp_path / "model")
        return f"transformers:{tmp_path / 'model'}"

    return save


def test_group_norm_of_transformers_fails(saved: Any, clips: list[str], tmp_path: Path) -> None:
    name = saved("hubert base", False)
    found = as_json(name, *clips, "--plot", tmp_path / "figure.png", code=1)
    assert not found["passed"]
    assert found["worst"]["mode"] == "without mask"
    assert found["worst"]["frames"] > 1e-2
    assert {(row["mode"], row["judged"]) for row in found["results"]} == {("without mask", True), ("with mask", False)}
    assert len(found["results"]) == 2 * 2 * len(CASES)
    for row in found["results"]:
        padded = max([1.0, *row["companions"]]) > 1
        assert row["passed"] != padded, row
        assert (row["frames"] > 1e-2) == padded, row
        assert row["frames_alone"] == row["frames_in_batch"] == (12 if row["clip"].endswith("0.wav") else 20)
    picture = image.imread(tmp_path / "figure.png")
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100


def test_layer_norm_of_transformers_passes_with_its_mask(saved: Any, clips: list[str]) -> None:
    found = as_json(saved("wav2vec2 large", True), *clips[:2], code=0)
    without = [row for row in found["results"] if row["mode"] == "without mask"]
    assert len(without) == len(CASES)
    assert max(row["frames"] for row in without) > 1e-2  # reported, and not judged
    # The audit of the same weights by ours is another command on the same folder.
    assert subjects.open_subject(found["model"].partition(":")[2]).sample_rate == SAMPLE_RATE


def test_an_extractor_of_spectrograms(tmp_path: Path) -> None:
    """Whisper's, which pads to 30 s by itself; the frames of a clip are counted by the mask."""
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1, vocab_size=10,
        decoder_attention_heads=2, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, max_target_positions=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    subject = subjects.open_subject(f"transformers:{tmp_path}", weights="random")
    alone, batch = (subject.embed(x, 0, subject.modes[0]) for x in ([speech(8000)], [speech(8000), speech(20_000)]))
    assert len(alone.frames) == len(batch.frames) == 25
    np.testing.assert_allclose(alone.frames, batch.frames, atol=1e-5)


def test_models_of_transformers_that_are_none(saved: Any, tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(SystemConfigError, match=r"expected an audio model, with its feature extractor \(bert\)"):
        audited(f"transformers:{tmp_path / 'text'}")
    with pytest.raises(SystemConfigError, match="expected a folder of Hugging Face's, or a hub id"):
        audited(f"transformers:{tmp_path / 'none'}")
    name = saved("hubert base", False)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemConfigError, match="found: "):
        audited(name)
    with pytest.raises(InputError, match="takes no --size"):
        audited(name, "--size", "tiny")


# HEAR modules


class Loud(torch.nn.Module):
    sample_rate = SAMPLE_RATE


def spectra(audio: torch.Tensor) -> torch.Tensor:
    """Log spectra [n, T, 80], each clip and frame by itself."""
    count = audio.shape[1] // FRAME
    return torch.log(torch.fft.rfft(audio[:, : count * FRAME].reshape(len(audio), count, FRAME)).abs()[..., :80] + 1)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A HEAR module ``loud`` that is exact; tests break ``embed``."""
    loud: Any = types.ModuleType("loud")
    loud.embed = spectra

    def timestamps(audio: torch.Tensor, model: Loud) -> tuple[torch.Tensor, torch.Tensor]:
        frames = loud.embed(audio)
        return frames, (25.0 * torch.arange(frames.shape[1])).expand(len(audio), -1)

    loud.load_model = lambda path="": Loud()
    loud.get_timestamp_embeddings = timestamps
    loud.get_scene_embeddings = lambda audio, model: timestamps(audio, model)[0].mean(1)
    monkeypatch.setitem(sys.modules, "loud", loud)
    return loud


def test_an_exact_module_passes(module: Any, clips: list[str]) -> None:
    found = as_json("hear:loud", *clips, code=0)
    assert found["worst"]["frames"] < 1e-6
    # A module cannot be told the lengths: of a padded clip it has no scene embedding.
    assert {row["scene"] is None for row in found["results"] if max([1.0, *row["companions"]]) > 1} == {True}
    assert {row["scene"] is None for row in found["results"] if max([1.0, *row["companions"]]) == 1} == {False}


def test_a_module_that_leaks_from_clip_to_clip_fails(module: Any, clips: list[str]) -> None:
    module.embed = lambda audio: spectra(audio) - 0.1 * spectra(audio).mean((0, 1))
    found = as_json("hear:loud", *clips, code=1)
    passed = {row["passed"] for row in found["results"] if row["companions"] == []}
    failed = {row["passed"] for row in found["results"] if row["companions"] and row["content"] == "noise"}
    assert (passed, failed) == ({True}, {False})


def test_a_module_with_other_numbers_of_frames_fails(module: Any, clips: list[str]) -> None:
    """It drops a frame of a batch, and all the others are right."""
    module.embed = lambda audio: spectra(audio)[:, : None if len(audio) == 1 else -1]
    found = as_json("hear:loud", *clips[:2], code=1)
    equal = [row for row in found["results"] if row["companions"] == [1.0]]
    assert [(row["frames_in_batch"], row["frames_alone"]) for row in equal] == [(9, 10)] * 2
    assert all(row["frames"] < 1e-6 and not row["passed"] for row in equal)
    assert "FAILED, 9 frames and not 10" in audited("hear:loud", *clips[:2]).stdout


def test_a_module_that_fails_in_a_batch_is_a_failing_case(module: Any, clips: list[str]) -> None:
    def embed(audio: torch.Tensor) -> torch.Tensor:
        if len(audio) == 2:
            raise RuntimeError("one clip at a time\nand a long explanation")
        return spectra(audio) / (len(audio) < 4)

    module.embed = embed
    found = as_json("hear:loud", *clips, code=1)
    problems = {len(row["companions"]): row["problem"] for row in found["results"]}
    assert problems[0] is None
    assert problems[1] == "RuntimeError: one clip at a time"
    assert "finite" in problems[3]
    told = audited("hear:loud", *clips)
    assert told.exit_code == cli.EXIT_FAILED
    assert "FAILED" in told.stdout
    assert "Traceback" not in told.output


def test_clips_that_are_too_short_for_the_model_are_failing_cases(
    module: Any, clips: list[str], tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "short.wav", speech(402), SAMPLE_RATE)
    module.embed = lambda audio: spectra(audio)[:, 1:]
    short, *others = as_json("hear:loud", "--audio", tmp_path / "short.wav", *clips, code=1)["results"]
    assert short["clip"].endswith("short.wav")
    assert "finite" in short["problem"]  # the mean of no frames
    assert {row["passed"] for row in others} == {True}


def test_files_that_cannot_be_read_are_no_fault_of_the_models(module: Any, clips: list[str], tmp_path: Path) -> None:
    """They are errors before it is loaded, or where only decoding tells, before it runs."""

    def called(*arguments: object) -> None:
        raise AssertionError("the model was asked")

    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "nan.wav", np.full(SAMPLE_RATE, np.nan), SAMPLE_RATE, subtype="FLOAT")
    module.embed, load = called, module.load_model
    for name, message, load_model in (
        ("none", "no such file", called),
        ("empty", "cannot be decoded", called),
        ("nan", "expected finite samples", load),
    ):
        module.load_model = load_model
        with pytest.raises(AudioError, match=rf"{name}\.wav: .*{message}"):
            audited("hear:loud", *clips, "--audio", tmp_path / f"{name}.wav")


def test_a_model_that_is_not_deterministic_is_found_out(module: Any, clips: list[str]) -> None:
    module.embed = lambda audio: spectra(audio) + torch.rand(1)
    found = as_json("hear:loud", *clips[:2], code=1)
    assert not found["results"][0]["passed"]
    assert found["results"][0]["companions"] == []


def test_refusals(module: Any, tmp_path: Path) -> None:
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        (("hear:no_such_module",), "module no_such_module: expected a module to import"),
        (("hear:json",), "found no load_model"),
        (("hear:loud", "--size", "tiny"), "takes no --size"),
        (("hear:loud", "--weights", "random"), "the model file that its load_model gets"),
        (("hear:loud", "--plot", tmp_path / "a.jpg"), r"--plot: expected \.png, \.svg, \.pdf"),
        (("hear:loud", "--plot", tmp_path / "none" / "a.png"), "--plot: expected a folder that exists"),
    )
    for arguments, message in cases:
        with pytest.raises(GuraError, match=message):
            audited(*arguments)


def test_the_bound_is_chosen(module: Any, clips: list[str]) -> None:
    module.embed = lambda audio: spectra(audio) * (1 + 1e-3 * (len(audio) > 1))
    assert audited("hear:loud", *clips, "--bound", 0.01).exit_code == 0
    assert audited("hear:loud", *clips).exit_code == cli.EXIT_FAILED
