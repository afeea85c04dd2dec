"""Fine-tune a tiny encoder on spoken digits: python examples/finetune_digits.py FOLDER OUT.

FOLDER holds recordings named DIGIT_SPEAKER_TAKE.wav, as the Free Spoken Digit Dataset has them. The last take of each
speaker and digit is validated and tested with, in turns. Weights are random, so that nothing is downloaded.
"""

import csv
import sys
from pathlib import Path

from gura_jax import load_model
from gura_jax.finetune.loop import finetune
from gura_jax.finetune.settings import Settings
from gura_jax.finetune.tasks import read_labelled


def write_manifest(folder: Path, path: Path) -> Path:
    recordings = sorted(folder.glob("[0-9]_*_*.wav"))
    last = max(int(file.stem.split("_")[2]) for file in recordings)
    held_out = 0
    with open(path, "w", newline="", encoding="utf-8") as manifest:
        rows = csv.writer(manifest)
        rows.writerow(["id", "path", "digit", "split"])
        for file in recordings:
            digit, _, take = file.stem.split("_")
            held_out += int(take) == last
            split = "train" if int(take) < last else ("valid", "test")[held_out % 2]
            rows.writerow([file.stem, file.resolve(), digit, split])
    return path


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    task = read_labelled(write_manifest(folder, out / "digits.csv"), label="digit", root=folder)
    model = load_model("hubert_base", size="tiny", weights="random")
    settings = Settings(epochs=20, batch_size=16, learning_rate=3e-3, patience=20)
    result = finetune(model, task, settings, out / "run")
    print(f"accuracy on {len(task.clips['test'])} recordings: {result.test['top1_acc']:.2f} (chance: 0.10)")
    print(f"a system for every command: {out / 'run' / 'model'}")


if __name__ == "__main__":
    main()
