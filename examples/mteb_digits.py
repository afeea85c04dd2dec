"""Tasks of your own for MTEB: python examples/mteb_digits.py FOLDER [--system NAME] [--weights random] [--out OUT].

FOLDER holds recordings named DIGIT_SPEAKER_NUMBER.wav, as in the Free Spoken Digit Dataset. One task is to recognise
digits of speakers that the classifier was not trained on; the other to cluster recordings by speaker.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering
from mteb.abstasks.task_metadata import TaskMetadata

from gura_jax.errors import InputError
from gura_jax.evaluate.mteb import run
from gura_jax.mteb import load

NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.wav")
ABOUT: dict[str, Any] = {
    "dataset": {"path": "spoken-digits", "revision": "1"},
    "modalities": ["audio"],
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
}


def recordings(folder: Path) -> list[tuple[Path, str, str]]:
    """Find recordings: path, digit and speaker."""
    found = [(path, NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, match[1], match[2]) for path, match in found if match]


def data_set(rows: list[tuple[Path, str, str]], label: str) -> Dataset:
    """Put recordings into a data set, labelled by digit and speaker; one column is named for the task."""
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path, _, _ in rows]
    digits, speakers = [int(digit) for _, digit, _ in rows], [speaker for _, _, speaker in rows]
    columns: dict[str, Any] = {"audio": audio, label: speakers if label == "labels" else digits}
    return Dataset.from_dict(columns).cast_column("audio", Audio())


class SpokenDigits(AbsTaskClassification):
    """Digits, tested on the last third of the speakers."""

    metadata = TaskMetadata(
        name="SpokenDigits",
        description="Digits by unseen speakers.",
        type="AudioClassification",
        main_score="accuracy",
        **ABOUT,
    )
    input_column_name = "audio"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load_data(self, *_: Any, **__: Any) -> None:
        rows = recordings(self.folder)
        speakers = sorted({speaker for _, _, speaker in rows})
        unseen = speakers[-(len(speakers) // 3) :] if len(speakers) >= 3 else []
        if not unseen:
            raise InputError(f"{self.folder}: expected DIGIT_SPEAKER_NUMBER.wav of three speakers, found {speakers}")
        split = {name: [row for row in rows if (row[2] in unseen) == (name == "test")] for name in ("train", "test")}
        self.dataset: Any = DatasetDict({name: data_set(own, "label") for name, own in split.items()})
        self.data_loaded = True


class SpokenDigitsSpeakers(AbsTaskClustering):
    """Speakers, of all recordings."""

    metadata = TaskMetadata(
        name="SpokenDigitsSpeakers",
        description="Clusters of one speaker each.",
        type="AudioClustering",
        main_score="v_measure",
        **ABOUT,
    )
    input_column_name = "audio"
    max_fraction_of_documents_to_embed = None

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset: Any = DatasetDict({"test": data_set(recordings(self.folder), "labels")})
        self.data_loaded = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--system", default="crepe")
    parser.add_argument("--weights", choices=["pretrained", "random"], default="pretrained")
    parser.add_argument("--size", choices=["tiny"])
    parser.add_argument("--out", type=Path, default=Path("mteb-results"))
    arguments = parser.parse_args()
    encoder = load(arguments.system, weights=arguments.weights, size=arguments.size)
    tasks = [SpokenDigits(arguments.folder), SpokenDigitsSpeakers(arguments.folder)]
    outcome = run(encoder, tasks, arguments.out, show_progress_bar=True)
    for score in outcome.scores:
        print(f"{score.task:24} {score.metric:12} {score.score:.4f}")
    print(f"-> {outcome.folder}")


if __name__ == "__main__":
    main()
