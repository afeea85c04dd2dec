"""Make HEAR tasks without downloads: notes and beats from a soundfont, words from a speech synthesiser.

python examples/make_tasks.py FOLDER [--digits DIR]

Needs fluidsynth, a soundfont of General MIDI, and espeak-ng (Debian: fluidsynth timgm6mb-soundfont espeak-ng).
``--digits`` takes recordings of spoken digits, named DIGIT_SPEAKER_NUMBER.wav as in the Free Spoken Digit Dataset.
The files are the same each time.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mido
import numpy as np
import soundfile
import soxr

from gura_jax.audio import load_audio
from gura_jax.errors import AudioError, GuraError, InputError

RATE = 16_000
PROGRAMS = ("fluidsynth", "espeak-ng")
SOUNDFONTS = tuple(Path("/usr/share/sounds/sf2") / f"{name}.sf2" for name in ("TimGM6mb", "default-GM", "FluidR3_GM"))
INSTALL = "apt-get install fluidsynth timgm6mb-soundfont espeak-ng"
NOTE_MS, CLIP_SECONDS = 800, 1.0
QUIET = 1e-3  # peak; a quieter clip means that the synthesiser failed

PIANO_KEYS = range(21, 109)  # MIDI
# General MIDI programs. Validation and test have other instruments than training.
PITCH_PROGRAMS = {"train": (0, 4, 16, 24, 40, 56), "valid": (11, 71), "test": (25, 73)}
# Four of each family, one for each fold. No two share recordings; in TimGM6mb the two grand pianos (0 and 1) do, violin
# and viola (40 and 41), and nearly piccolo and recorder (72 and 74).
FAMILIES = {
    "keyboard": (0, 2, 4, 6),
    "mallet": (9, 11, 12, 13),
    "organ": (16, 17, 18, 19),
    "guitar": (24, 25, 26, 27),
    "strings": (40, 42, 43, 48),
    "brass": (56, 57, 58, 60),
    "reed": (65, 66, 68, 71),
    "pipe": (72, 73, 75, 77),
}
FAMILY_NOTES = range(43, 91, 4)
DRUMS = {"kick": 36, "snare": 38, "hihat": 42}
DRUM_CHANNEL = 9
EVENT_MS = 200.0
BEAT_SECONDS = 5.0
BEAT_CLIPS = {"train": 12, "valid": 5, "test": 5}

WORDS = {
    "train": ("bed", "bird", "cat", "dog", "down", "five", "four", "go", "happy", "house", "left", "marvin"),
    "valid": ("nine", "no", "off", "on"),
    "test": ("right", "seven", "sheila", "stop"),
}
# espeak-ng's voices: an accent, and a variant that changes the speaker. British English is en, as for en-gb espeak-ng
# 1.51 ignores the variant.
VOICES = {
    "train": ("en-us+m1", "en-us+f2", "en+m3", "en+f1", "en-gb-scotland+m2", "en-029+f4", "en-gb-x-rp+m7"),
    "valid": ("en-us+f5", "en-gb-x-gbclan+m4"),
    "test": ("en+f3", "en-us+m6", "en-gb-scotland+f2"),
}
SPEEDS = (140, 190)  # words a minute
MIN_FOLDS, MAX_FOLDS = 3, 6  # of digits: HEAR needs three; the Free Spoken Digit Dataset has six speakers, fifty takes
_DIGIT = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")


class Clip(NamedTuple):
    """A clip of a task: its file name, samples and labels."""

    name: str
    audio: np.ndarray
    labels: Sequence[Any]


def missing() -> list[str]:
    """List what is not installed."""
    found = [name for name in PROGRAMS if shutil.which(name) is None]
    return found if any(font.is_file() for font in SOUNDFONTS) else [*found, "a soundfont"]


def run(command: Sequence[str | Path]) -> bytes:
    """Run a program; returns its standard output."""
    done = subprocess.run(command, check=False, capture_output=True, timeout=300)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise AudioError(f"{command[0]}: expected exit status 0, found {done.returncode}: {said or 'nothing was said'}")
    return done.stdout


def write_task(folder: Path, splits: Mapping[str, Iterable[Clip]], labels: Sequence[Any], **meta: Any) -> None:
    """Write a task in HEAR's format. Two equal clips are an error: one could be trained on and the other tested."""
    kfold = meta["split_mode"] != "trainvaltest"
    heard: dict[bytes, str] = {}
    for split, clips in splits.items():
        (folder / str(RATE) / split).mkdir(parents=True)
        listed = {}
        for clip in clips:
            peak = float(np.abs(clip.audio).max())
            if not QUIET < peak <= 1:
                raise AudioError(f"{folder.name}/{split}/{clip.name}: expected a sound, found a peak of {peak:g}")
            same = heard.setdefault(clip.audio.tobytes(), f"{split}/{clip.name}")
            if same != f"{split}/{clip.name}":
                raise AudioError(f"{folder.name}/{split}/{clip.name}: expected another sound than that of {same}")
            soundfile.write(folder / str(RATE) / split / clip.name, clip.audio, RATE, subtype="PCM_16")
            listed[clip.name] = clip.labels
        (folder / f"{split}.json").write_text(json.dumps(listed, indent=1))
    rows = "".join(f"{i},{label}\n" for i, label in enumerate(labels))
    (folder / "labelvocabulary.csv").write_text(f"idx,label\n{rows}")
    task, version, mode = folder.name.split("-")
    about = {"task_name": task, "version": version, "mode": mode, "splits": list(splits), **meta}
    about |= {"nfolds": len(splits)} if kfold else {}
    (folder / "task_metadata.json").write_text(json.dumps(about, indent=1))


class Note(NamedTuple):
    """A note: MIDI key, start and length in milliseconds, velocity."""

    key: int
    start: int
    length: int
    velocity: int


def render(notes: Sequence[Note], *, program: int = 0, channel: int = 0) -> np.ndarray:
    """Render notes by one instrument, without reverberation; returns audio [n]."""
    events = [(note.start, "note_on", note) for note in notes]
    events += [(note.start + note.length, "note_off", note) for note in notes]
    track = mido.MidiTrack([mido.Message("program_change", program=program, channel=channel, time=0)])
    track.insert(0, mido.MetaMessage("set_tempo", tempo=1_000_000, time=0))  # with 1000 ticks a beat: milliseconds
    last = 0
    for time, kind, note in sorted(events, key=lambda event: event[:2]):
        track.append(mido.Message(kind, note=note.key, velocity=note.velocity, channel=channel, time=time - last))
        last = time
    track.append(mido.MetaMessage("end_of_track", time=1000))
    font = next(font for font in SOUNDFONTS if font.is_file())
    with tempfile.TemporaryDirectory() as name:
        score, sound = Path(name) / "score.mid", Path(name) / "sound.wav"
        mido.MidiFile(ticks_per_beat=1000, tracks=[track]).save(score)
        command = ["fluidsynth", "-n", "-i", "-q", "-R", "0", "-C", "0", "-g", "0.5", "-r", str(RATE), "-F", sound]
        run([*command, font, score])
        return load_audio(sound, sample_rate=RATE)


def single_notes(program: int, keys: Sequence[int], velocities: Sequence[int]) -> list[np.ndarray]:
    """Render a clip [n] of each key by one instrument."""
    spacing = 2 * NOTE_MS  # a released note is silent by the next
    notes = [Note(k, i * spacing, NOTE_MS, v) for i, (k, v) in enumerate(zip(keys, velocities, strict=True))]
    audio, size = render(notes, program=program), round(CLIP_SECONDS * RATE)
    clips = []
    for note in notes:
        start = note.start * RATE // 1000
        clip = audio[start : start + size]
        clips.append(np.pad(clip, (0, size - len(clip))))
    return clips


def write_notes(folder: Path) -> None:
    """Write two tasks: pitch over the piano's range, tested on unseen instruments; and families of instruments."""
    rng = np.random.default_rng(0)
    keys = list(PIANO_KEYS)
    splits: dict[str, list[Clip]] = {}
    for split, programs in PITCH_PROGRAMS.items():
        splits[split] = []
        for program in programs:
            audio = single_notes(program, keys, rng.integers(70, 120, len(keys)).tolist())
            # In a soundfont, the highest notes of some instruments are silent.
            heard = [(key, clip) for key, clip in zip(keys, audio, strict=True) if np.abs(clip).max() > QUIET]
            splits[split] += [Clip(f"{program:03d}-{key:03d}.wav", clip, [str(key)]) for key, clip in heard]
    scene = {"embedding_type": "scene", "prediction_type": "multiclass", "sample_duration": CLIP_SECONDS}
    evaluation = ["pitch_acc", "chroma_acc"]
    write_task(folder / "pitch-v1-demo", splits, keys, **scene, split_mode="trainvaltest", evaluation=evaluation)
    folds: dict[str, list[Clip]] = {f"fold{i:02d}": [] for i in range(4)}
    for family, programs in FAMILIES.items():
        for clips, program in zip(folds.values(), programs, strict=True):
            velocities = rng.integers(70, 120, len(FAMILY_NOTES)).tolist()
            audio = single_notes(program, list(FAMILY_NOTES), velocities)
            clips += [
                Clip(f"{program:03d}-{key:03d}.wav", clip, [family])
                for key, clip in zip(FAMILY_NOTES, audio, strict=True)
            ]
    evaluation = ["top1_acc", "mAP", "d_prime", "aucroc"]
    task = folder / "instrument_family-v1-demo"
    write_task(task, folds, sorted(FAMILIES), **scene, split_mode="new_split_kfold", evaluation=evaluation)


def beat(rng: np.random.Generator) -> tuple[list[Note], list[dict[str, Any]]]:
    """Make a drum pattern with human timing; returns its notes and events."""
    step = 60_000 / rng.uniform(80, 130) / 2  # ms: an eighth note
    notes, events = [], []
    for i in range(int(BEAT_SECONDS * 1000 / step)):
        drum = "hihat" if i % 2 else ("kick", "snare")[i // 2 % 2]
        start = round(i * step + rng.normal(60, 8))
        if rng.random() < 0.2 or start + EVENT_MS > 1000 * BEAT_SECONDS:
            continue
        notes.append(Note(DRUMS[drum], max(0, start), 100, int(rng.integers(80, 120))))
        events.append({"label": drum, "start": float(max(0, start)), "end": max(0, start) + EVENT_MS})
    return notes, events


def write_beats(folder: Path) -> None:
    """Write a task: onsets of the parts of a drum kit."""
    rng = np.random.default_rng(1)
    splits: dict[str, list[Clip]] = {}
    size = round(BEAT_SECONDS * RATE)
    for split, count in BEAT_CLIPS.items():
        splits[split] = []
        for i in range(count):
            notes, events = beat(rng)
            audio = render(notes, channel=DRUM_CHANNEL)[:size]
            splits[split].append(Clip(f"{i:02d}.wav", np.pad(audio, (0, size - len(audio))), events))
    write_task(
        folder / "beats-v1-demo",
        splits,
        list(DRUMS),
        embedding_type="event",
        prediction_type="multilabel",
        split_mode="trainvaltest",
        sample_duration=BEAT_SECONDS,
        evaluation=["event_onset_200ms_fms", "segment_1s_er"],
        evaluation_params={
            "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50, 100]},
            "task_specific_param_grid": {"max_epochs": [60]},
        },
    )


def say(word: str, voice: str, speed: int) -> np.ndarray:
    """Synthesise a word [n], one second from its start."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", word]
    samples, rate = soundfile.read(io.BytesIO(run(command)), dtype="float32")
    audio = soxr.resample(samples, rate, RATE)
    start = int(np.argmax(np.abs(audio) > QUIET))
    size = round(CLIP_SECONDS * RATE)
    audio = audio[start : start + size]
    return np.pad(0.7 * audio, (0, size - len(audio)))


def write_words(folder: Path) -> None:
    """Write two tasks: words by unseen voices, and voices by unseen words."""
    words = [word for some in WORDS.values() for word in some]
    voices = [voice for some in VOICES.values() for voice in some]
    spoken = {(w, v, s): say(w, v, s) for w in words for v in voices for s in SPEEDS}
    scene = {"embedding_type": "scene", "prediction_type": "multiclass", "sample_duration": CLIP_SECONDS}
    for task, parts, index in (("word", VOICES, 1), ("speaker", WORDS, 0)):
        splits = {
            split: [
                Clip(f"{'-'.join(map(str, key)).replace('+', '_')}.wav", audio, [key[1 - index]])
                for key, audio in spoken.items()
                if key[index] in some
            ]
            for split, some in parts.items()
        }
        labels = words if task == "word" else voices
        evaluation = ["top1_acc", "mAP"]
        write_task(
            folder / f"{task}-v1-demo", splits, labels, **scene, split_mode="trainvaltest", evaluation=evaluation
        )


def digit_files(recordings: Path) -> list[tuple[Path, re.Match[str]]]:
    """Find recordings of digits; the match holds digit, speaker and take."""
    if not recordings.is_dir():
        raise InputError(f"{recordings}: expected a folder of recordings named DIGIT_SPEAKER_NUMBER.wav, found none")
    found = [(path, match) for path in sorted(recordings.iterdir()) if (match := _DIGIT.fullmatch(path.name))]
    for part, name in ((2, "speakers"), (3, "takes")):
        values = {match[part] for _, match in found}
        if len(values) < MIN_FOLDS:
            expected = f"recordings named DIGIT_SPEAKER_NUMBER.wav of at least {MIN_FOLDS} {name}"
            raise InputError(f"{recordings}: expected {expected}, found {len(values)}")
    return found


def write_digits(folder: Path, recordings: Path) -> None:
    """Write two tasks: digits by unseen speakers, and speakers by unseen takes."""
    found = digit_files(recordings)
    scene = {"embedding_type": "scene", "prediction_type": "multiclass", "sample_duration": None}
    for task, label, fold in (("digit", 1, 2), ("digit_speaker", 2, 3)):
        groups = sorted({match[fold] for _, match in found})
        folds: dict[str, list[Clip]] = {f"fold{i:02d}": [] for i in range(min(len(groups), MAX_FOLDS))}
        for path, match in found:
            index = groups.index(match[fold]) % MAX_FOLDS
            folds[f"fold{index:02d}"].append(Clip(path.name, load_audio(path, sample_rate=RATE), [match[label]]))
        labels = sorted({match[label] for _, match in found})
        evaluation = ["top1_acc", "mAP"]
        write_task(
            folder / f"{task}-v1-demo", folds, labels, **scene, split_mode="presplit_kfold", evaluation=evaluation
        )


def make_tasks(folder: Path, digits: Path | None) -> None:
    """Write all tasks into a folder, and replace its content.

    Raises:
        GuraError: a program is missing or fails, or the recordings do not suffice.
    """
    if lacking := missing():
        raise InputError(f"expected {', '.join(lacking)} to be installed: {INSTALL}")
    if digits is not None:
        digit_files(digits)  # fails before minutes of work
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / "tasks"
        made.mkdir()
        for write in (write_notes, write_beats, write_words):
            write(made)
        if digits is not None:
            write_digits(made, digits)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--digits", type=Path)
    arguments = parser.parse_args()
    try:
        make_tasks(arguments.folder, arguments.digits)
    except GuraError as error:
        sys.exit(f"error: {error}")
