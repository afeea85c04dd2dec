"""examples/make_tasks.py: the tasks of make evaluate-demo sound as labelled."""

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from gura_jax.errors import AudioError, InputError
from gura_jax.evaluate.hear.tasks import read_task

ROOT = Path(__file__).parent.parent
ONSET_MS = 20.0  # delay after which a drum must be heard
SAME = 0.985  # correlation of two instruments that share a recording; of others it is below 0.98


def load() -> Any:
    spec = importlib.util.spec_from_file_location("make_tasks", ROOT / "examples" / "make_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_tasks = load()
needs_programs = pytest.mark.skipif(
    bool(make_tasks.missing()), reason=f"needs {', '.join(make_tasks.missing())}: {make_tasks.INSTALL}"
)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the highest correlation of two clips, shifted by up to 12 ms."""
    first, second = (np.fft.rfft(clip - clip.mean(), 2 * len(clip)) for clip in (a, b))
    correlation = np.abs(np.fft.irfft(first * second.conj()))
    return max(correlation[:200].max(), correlation[-200:].max()) / float(np.sqrt((a @ a) * (b @ b)))


def write_recordings(folder: Path, speakers: Sequence[str], takes: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for digit in "01":
        for speaker in speakers:
            for take in range(takes):
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", 0.1 * rng.standard_normal(4000), 8000)


def fundamental(audio: np.ndarray, expected: float) -> float:
    """Find the fundamental in Hz by autocorrelation, within half an octave of the expected one."""
    correlation = np.fft.irfft(np.abs(np.fft.rfft(audio, 2 * len(audio))) ** 2)
    low, high = int(16_000 / expected / 1.4), int(16_000 / expected * 1.4) + 1
    lag = low + int(np.argmax(correlation[low:high]))
    around = correlation[lag - 1 : lag + 2]
    return 16_000 / (lag + 0.5 * (around[0] - around[2]) / (around[0] - 2 * around[1] + around[2]))


@needs_programs
@pytest.mark.parametrize("program", [0, 40, 73])
def test_notes_have_the_pitch_of_their_key(program: int) -> None:
    keys = [57, 64, 76]
    for key, audio in zip(keys, make_tasks.single_notes(program, keys, [100] * 3), strict=True):
        hertz = 440 * 2 ** ((key - 69) / 12)
        assert len(audio) == 16_000
        assert abs(12 * np.log2(fundamental(audio[1600:9600], hertz) / hertz)) < 0.5  # semitones


@needs_programs
def test_drums_are_heard_when_their_labels_say() -> None:
    notes, events = make_tasks.beat(np.random.default_rng(3))
    audio = make_tasks.render(notes, channel=make_tasks.DRUM_CHANNEL)
    assert {event["label"] for event in events} == set(make_tasks.DRUMS)
    window = int(16 * ONSET_MS)
    for event in events:
        start = round(16 * event["start"])
        before, after = audio[start - window : start], audio[start : start + window]
        assert np.abs(after).max() > 2 * np.abs(before).max()


@needs_programs
@pytest.mark.parametrize("family", make_tasks.FAMILIES)
def test_instruments_of_a_family_are_other_recordings(family: str) -> None:
    """They are in different folds; a shared recording would be both trained on and tested."""
    keys = [43, 51, 63]
    played = {p: make_tasks.single_notes(p, keys, [100] * 3) for p in make_tasks.FAMILIES[family]}
    for a, b in combinations(played, 2):
        found = [alike(*clips) for clips in zip(played[a], played[b], strict=True)]
        assert max(found) < SAME, f"{a} and {b}"


@needs_programs
def test_voices_differ() -> None:
    voices = [voice for some in make_tasks.VOICES.values() for voice in some]
    assert len({make_tasks.say("seven", voice, 140).tobytes() for voice in voices}) == len(voices) == 12


@needs_programs
def test_words_begin_at_once_and_differ() -> None:
    first, second = make_tasks.say("seven", "en-us+m1", 140), make_tasks.say("seven", "en+f3", 140)
    for audio in (first, second):
        assert len(audio) == 16_000
        assert np.abs(audio[:160]).max() > make_tasks.QUIET * 0.5
        assert 0.05 < np.abs(audio).max() <= 1
    assert not np.array_equal(first, second)


@needs_programs
def test_tasks_are_hears_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer notes, words and beats than in the demonstration."""
    monkeypatch.setattr(make_tasks, "PIANO_KEYS", range(60, 63))
    monkeypatch.setattr(make_tasks, "PITCH_PROGRAMS", {"train": (0, 4), "valid": (11,), "test": (25,)})
    families = {name: make_tasks.FAMILIES[name] for name in ("keyboard", "brass")}
    monkeypatch.setattr(make_tasks, "FAMILIES", families)
    monkeypatch.setattr(make_tasks, "FAMILY_NOTES", range(60, 62))
    monkeypatch.setattr(make_tasks, "BEAT_CLIPS", {"train": 2, "valid": 1, "test": 1})
    monkeypatch.setattr(make_tasks, "WORDS", {"train": ("bed",), "valid": ("nine",), "test": ("stop",)})
    voices = {"train": ("en-us+m1",), "valid": ("en-us+f5",), "test": ("en+f3",)}
    monkeypatch.setattr(make_tasks, "VOICES", voices)
    recordings = tmp_path / "recordings"
    write_recordings(recordings, ("ada", "bob", "cleo"), 3)
    for name in ("a", "b"):
        make_tasks.make_tasks(tmp_path / name, recordings)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    tasks = {path.name.split("-")[0]: read_task(path) for path in sorted((tmp_path / "a").iterdir())}
    assert list(tasks) == ["beats", "digit", "digit_speaker", "instrument_family", "pitch", "speaker", "word"]
    assert {task.prediction for task in tasks.values()} == {"multiclass", "multilabel"}
    assert [len(tasks[name].folds) for name in ("digit", "digit_speaker", "instrument_family")] == [3, 3, 4]
    for name, task in tasks.items():
        sounds = {
            split: {digests(task.folder / "16000" / split)[file] for file in clips}
            for split, clips in task.clips.items()
        }
        for split, clips in task.clips.items():
            assert set(clips) == {path.name for path in (task.folder / "16000" / split).iterdir()}
            others = set().union(*(found for other, found in sounds.items() if other != split))
            assert not sounds[split] & others, f"{name}: {split} has sounds of another split"
    # Every test clip is unseen in training.
    assert {label for labels in tasks["word"].clips["test"].values() for label in labels} == {"bed", "nine", "stop"}
    assert {label for labels in tasks["speaker"].clips["test"].values() for label in labels} == {
        "en-us+m1",
        "en-us+f5",
        "en+f3",
    }


def test_recordings_that_are_none_or_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder of recordings"):
        make_tasks.write_digits(tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="of at least 3 speakers, found 0"):
        make_tasks.write_digits(tmp_path / "out", tmp_path)
    write_recordings(tmp_path / "two", ("ada", "bob"), 3)
    with pytest.raises(InputError, match="of at least 3 speakers, found 2"):
        make_tasks.write_digits(tmp_path / "out", tmp_path / "two")
    write_recordings(tmp_path / "once", ("ada", "bob", "cleo"), 2)
    with pytest.raises(InputError, match="of at least 3 takes, found 2"):
        make_tasks.write_digits(tmp_path / "out", tmp_path / "once")


def test_many_takes_share_folds(tmp_path: Path) -> None:
    """No speaker is in two folds of the digit task, no take in two folds of the speaker task."""
    write_recordings(tmp_path / "recordings", ("ada", "bob", "cleo"), 8)
    make_tasks.write_digits(tmp_path, tmp_path / "recordings")
    for name, part, folds in (("digit", 1, 3), ("digit_speaker", 2, make_tasks.MAX_FOLDS)):
        task = read_task(tmp_path / f"{name}-v1-demo")
        assert len(task.splits) == folds
        groups = [{Path(file).stem.split("_")[part] for file in clips} for clips in task.clips.values()]
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_tasks, "PROGRAMS", ("no-such-synthesiser",))
    with pytest.raises(InputError, match=r"expected no-such-synthesiser.* to be installed: apt-get install fluidsynth"):
        make_tasks.make_tasks(tmp_path / "tasks", None)


def test_a_program_that_fails_is_quoted() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such voice')"]
    with pytest.raises(AudioError, match="found 1: no such voice"):
        make_tasks.run(command)


def test_the_same_sound_twice_is_a_fault(tmp_path: Path) -> None:
    audio = 0.1 * np.ones(16_000, np.float32)
    splits = {"train": [make_tasks.Clip("a.wav", audio, ["x"])], "test": [make_tasks.Clip("b.wav", audio, ["x"])]}
    with pytest.raises(AudioError, match=r"test/b\.wav: expected another sound than that of train/a\.wav"):
        make_tasks.write_task(tmp_path / "t-v1-x", splits, ["x"], split_mode="trainvaltest")


def test_silence_is_a_fault(tmp_path: Path) -> None:
    clip = make_tasks.Clip("a.wav", np.zeros(16_000), ["x"])
    with pytest.raises(AudioError, match="expected a sound, found a peak of 0"):
        make_tasks.write_task(tmp_path / "t-v1-x", {"train": [clip]}, ["x"], split_mode="trainvaltest")
