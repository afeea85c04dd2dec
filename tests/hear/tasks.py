"""Write five tiny HEAR tasks of tones in noise, one of each kind that heareval supports."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

RATE = 16_000
HERTZ = {"low": 220.0, "middle": 660.0, "high": 1760.0}
PITCHES = (57, 62, 68)  # MIDI
TRAIN_VALID_TEST = {"train": 24, "valid": 9, "test": 9}  # clips of each split
FOLDS = {"fold00": 9, "fold01": 9, "fold02": 9}
EVENT_SECONDS, SLOT_SECONDS = 6.0, 1.0


class Clip(NamedTuple):
    """A clip [samples], and its labels in HEAR's format."""

    audio: np.ndarray
    labels: list[Any]


def tone(hertz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return 0.3 * np.sin(2 * np.pi * (hertz * t + rng.random()))


def noise(seconds: float, rng: np.random.Generator) -> np.ndarray:
    return 0.01 * rng.standard_normal(round(seconds * RATE))


def one_label(i: int, rng: np.random.Generator) -> Clip:
    label = list(HERTZ)[i % len(HERTZ)]
    return Clip(tone(HERTZ[label], 1.0, rng) + noise(1.0, rng), [label])


def one_pitch(i: int, rng: np.random.Generator) -> Clip:
    pitch = PITCHES[i % len(PITCHES)]
    return Clip(tone(440 * 2 ** ((pitch - 69) / 12), 1.0, rng) + noise(1.0, rng), [pitch])


def some_labels(i: int, rng: np.random.Generator) -> Clip:
    """Make a clip of any length with none, some or all of the labels."""
    seconds = rng.uniform(0.5, 2.0)
    labels = [label for bit, label in enumerate(HERTZ) if i >> bit & 1]
    return Clip(sum((tone(HERTZ[label], seconds, rng) for label in labels), noise(seconds, rng)), labels)


def events(i: int, rng: np.random.Generator) -> Clip:
    """Make a clip with one tone in each second; labels are in milliseconds."""
    audio, labels = noise(EVENT_SECONDS, rng), []
    for slot in np.arange(0, EVENT_SECONDS, SLOT_SECONDS):
        label = str(rng.choice(list(HERTZ)))
        start, seconds = slot + rng.uniform(0, 0.3), rng.uniform(0.3, 0.6)
        sound = tone(HERTZ[label], seconds, rng)
        audio[round(start * RATE) :][: len(sound)] += sound
        labels.append({"label": label, "start": 1000 * start, "end": 1000 * (start + seconds)})
    return Clip(audio, labels)


SCORES = ["top1_acc", "mAP", "d_prime", "aucroc"]
SCENE: Mapping[str, Any] = {"embedding_type": "scene", "sample_duration": 1.0}
EVENT: Mapping[str, Any] = {
    "embedding_type": "event",
    "prediction_type": "multilabel",
    "sample_duration": EVENT_SECONDS,
}
# Each: function that makes a clip, clips of each split, labels, metadata.
TASKS: Mapping[str, tuple[Any, Mapping[str, int], list[Any], Mapping[str, Any]]] = {
    "classes": (
        one_label,
        TRAIN_VALID_TEST,
        list(HERTZ),
        {**SCENE, "prediction_type": "multiclass", "split_mode": "trainvaltest", "evaluation": SCORES},
    ),
    "tags": (
        some_labels,
        TRAIN_VALID_TEST,
        list(HERTZ),
        {
            **SCENE,
            "sample_duration": None,
            "prediction_type": "multilabel",
            "split_mode": "trainvaltest",
            "evaluation": [*SCORES[1:], SCORES[0]],
        },
    ),
    "pitches": (
        one_pitch,
        FOLDS,
        list(PITCHES),
        {
            **SCENE,
            "prediction_type": "multiclass",
            "split_mode": "new_split_kfold",
            "nfolds": len(FOLDS),
            "evaluation": ["pitch_acc", "chroma_acc"],
        },
    ),
    "onsets": (
        events,
        {"train": 6, "valid": 3, "test": 3},
        list(HERTZ),
        {**EVENT, "split_mode": "trainvaltest", "evaluation": ["event_onset_200ms_fms", "segment_1s_er"]},
    ),
    "notes": (
        events,
        dict.fromkeys(FOLDS, 3),
        list(HERTZ),
        {
            **EVENT,
            "split_mode": "presplit_kfold",
            "nfolds": len(FOLDS),
            "evaluation": ["event_onset_50ms_fms", "event_onset_offset_50ms_20perc_fms"],
            "use_scoring_for_early_stopping": False,
            "evaluation_params": {
                "event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]},
                "task_specific_param_grid": {"max_epochs": [20], "check_val_every_n_epoch": [1]},
            },
        },
    ),
}


def write_tasks(folder: Path) -> Iterator[str]:
    """Write the tasks; yields the names of their folders."""
    rng = np.random.default_rng(0)
    for name, (make, splits, labels, about) in TASKS.items():
        task = folder / f"{name}-v1-tiny"
        for split, count in splits.items():
            audio_folder = task / str(RATE) / split
            audio_folder.mkdir(parents=True)
            clips = {f"{split}-{i:02d}.wav": make(i, rng) for i in range(count)}
            for file, clip in clips.items():
                soundfile.write(audio_folder / file, clip.audio, RATE, subtype="PCM_16")
            (task / f"{split}.json").write_text(json.dumps({file: clip.labels for file, clip in clips.items()}))
        metadata = {"task_name": name, "version": "v1", "mode": "tiny", "splits": list(splits), **about}
        (task / "task_metadata.json").write_text(json.dumps(metadata))
        rows = [f"{i},{label}" for i, label in enumerate(labels)]
        (task / "labelvocabulary.csv").write_text("\n".join(["idx,label", *rows, ""]))
        yield task.name


if __name__ == "__main__":
    print(*write_tasks(Path(sys.argv[1])), sep="\n")
