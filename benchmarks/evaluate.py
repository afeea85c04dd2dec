"""gura-jax evaluate beside HEAR's own kit, on the same embeddings: time of the whole grid, memory, and scores by seed.

    python benchmarks/evaluate.py --kit PYTHON                        # synthetic scenes of --clips x --features
    python benchmarks/evaluate.py --kit PYTHON --tasks tasks/ --seeds 3    # HEAR tasks, by log spectra

PYTHON is an interpreter of an environment with heareval 2021.1.3 and pytorch-lightning 1.9.5.
"""

import argparse
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FRAME = 400  # samples of a spectrum
HOP = 800  # samples from a frame of an event task to the next
FLOOR = 1e-3  # of magnitudes
RATE = 16_000
CLIP_SPREAD = 3.0  # of clips around their class, to the classes' spread of 1: hard enough that scores differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", help="interpreter with heareval")
    parser.add_argument("--tasks", type=Path, help="HEAR tasks, in the place of synthetic embeddings")
    parser.add_argument("--clips", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument(
        "--max-epochs", type=int, help="of a point, fewer than the protocol's 500 where those take hours"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--child", nargs=3, metavar=("WHO", "FOLDER", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, folder, seed = options.child
        seconds, scores = (kit if who == "kit" else ours)(Path(folder), int(seed))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"seconds": seconds, "scores": scores, "peak_mib": peak}))
        return
    from gura_jax.evaluate.hear.tasks import find_tasks, read_task

    with tempfile.TemporaryDirectory() as work:
        if options.tasks:
            cases = [(task, spectra(task)) for task in map(read_task, find_tasks(options.tasks))]
        else:
            sizes = options.features, options.classes, options.max_epochs
            cases = [synthetic(Path(work), n, *sizes) for n in options.clips]
        print(f"{'task':24} {'by':8} {'seed':>4} {'seconds':>8} {'again':>8} {'peak MiB':>8}  test scores")
        for task, lookup in cases:
            folder = write_embeddings(task, lookup, Path(work) / "kit" / task.name)
            for who, python in (("gura_jax", sys.executable), ("kit", options.kit)):
                for seed in range(options.seeds if python else 0):
                    found = child(python, who, folder, seed)
                    scores = " ".join(f"{score:.4f}" for score in found["scores"].values())
                    seconds = " ".join(f"{x:8.1f}" for x in (*found["seconds"], float("nan"))[:2])
                    print(f"{task.name:24} {who:8} {seed:4} {seconds} {found['peak_mib']:8.0f}  {scores}", flush=True)


def child(python: str, who: str, folder: Path, seed: int) -> dict[str, Any]:
    """Each run in a process of its own; the time is without imports, and ours with what is compiled."""
    with tempfile.TemporaryDirectory() as logs:
        done = subprocess.run(
            [python, "-W", "ignore", os.path.abspath(__file__), "--child", who, str(folder), str(seed)],
            capture_output=True,
            text=True,
            cwd=logs,
            check=False,
        )
    if done.returncode:
        sys.exit(f"{who} failed on {folder.name}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def synthetic(work: Path, clips: int, features: int, classes: int, max_epochs: int | None) -> Any:
    """A scene task without audio: clips around the centres of their classes."""
    from gura_jax.evaluate.hear.tasks import read_task

    folder = work / f"{clips}x{features}"
    folder.mkdir()
    parts = {"train": clips * 6 // 10, "valid": clips * 2 // 10, "test": clips * 2 // 10}
    for split, count in parts.items():
        content = {f"{split}-{i}.wav": [str(i % classes)] for i in range(count)}
        (folder / f"{split}.json").write_text(json.dumps(content))
    vocabulary = "".join(f"{i},{i}\n" for i in range(classes))
    (folder / "labelvocabulary.csv").write_text("idx,label\n" + vocabulary)
    meta = {
        "task_name": folder.name,
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "trainvaltest",
        "splits": list(parts),
        "evaluation": ["top1_acc", "mAP", "d_prime", "aucroc"],
    }
    if max_epochs:
        meta["evaluation_params"] = {"task_specific_param_grid": {"max_epochs": [max_epochs]}}
    (folder / "task_metadata.json").write_text(json.dumps(meta))
    centres = np.random.default_rng(0).standard_normal((classes, features)).astype(np.float32)

    def lookup(split: str, name: str) -> tuple[np.ndarray, None]:
        number = int(name.split("-")[1].split(".")[0])
        noise = np.random.default_rng([list(parts).index(split), number]).standard_normal(features)
        return (centres[number % classes] + CLIP_SPREAD * noise).astype(np.float32), None

    return read_task(folder), lookup


def spectra(task: Any) -> Callable[[str, str], tuple[np.ndarray, np.ndarray | None]]:
    """Log spectra: embeddings that need no model."""
    import soundfile

    def lookup(split: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        audio, _ = soundfile.read(task.folder / str(RATE) / split / name, dtype="float32")
        step = HOP if task.embedding == "event" else FRAME
        frames = audio[: len(audio) // step * step].reshape(-1, step)[:, :FRAME]
        frames = np.log(np.abs(np.fft.rfft(frames, axis=1)) + FLOOR).astype(np.float32)
        if task.embedding == "event":
            return frames, 1000 / RATE * (HOP * np.arange(len(frames)) + FRAME / 2)
        return frames.mean(0), None

    return lookup


def write_embeddings(task: Any, lookup: Any, folder: Path) -> Path:
    """Embeddings and labels in the kit's layout."""
    from gura_jax.evaluate.task import frame_targets

    folder.mkdir(parents=True)
    for name in ("task_metadata.json", "labelvocabulary.csv", *(f"{split}.json" for split in task.splits)):
        (folder / name).write_bytes((task.folder / name).read_bytes())
    index = {label: i for i, label in enumerate(task.labels)}
    for split in task.splits:
        names = list(task.clips[split])  # in the kit's order
        rows, labels, times = [], [], []
        for name in names:
            embedding, when = lookup(split, name)
            if when is None:
                rows.append(embedding[None])
                labels.append(list(task.clips[split][name]))
            else:
                rows.append(embedding)
                targets = frame_targets(task.clips[split][name], when, index)
                labels += [[task.labels[i] for i in np.nonzero(row)[0]] for row in targets]
                times += [(name, float(t)) for t in when]
        array = np.concatenate(rows)
        array.tofile(folder / f"{split}.embeddings.npy")
        (folder / f"{split}.embedding-dimensions.json").write_text(json.dumps(array.shape))
        (folder / f"{split}.target-labels.pkl").write_bytes(pickle.dumps(labels))
        (folder / f"{split}.filename-timestamps.json").write_text(json.dumps(times))
    return folder


def ours(folder: Path, seed: int) -> tuple[list[float], dict[str, float]]:
    """The whole protocol on embeddings in the kit's layout; twice, as the second time nothing is compiled."""
    from gura_jax.evaluate.hear.protocol import PROTOCOLS
    from gura_jax.evaluate.hear.tasks import read_task
    from gura_jax.evaluate.protocol import evaluate_task

    task = read_task(folder)
    arrays: dict[tuple[str, str], tuple[np.ndarray, np.ndarray | None]] = {}
    for split in task.splits:
        shape = json.loads((folder / f"{split}.embedding-dimensions.json").read_text())
        values = np.memmap(folder / f"{split}.embeddings.npy", np.float32, "r", shape=tuple(shape))
        names = list(task.clips[split])
        if task.embedding == "scene":
            arrays |= {(split, name): (values[i], None) for i, name in enumerate(names)}
        else:
            files, times = zip(*json.loads((folder / f"{split}.filename-timestamps.json").read_text()), strict=True)
            for name in names:
                chosen = np.array([file == name for file in files])
                arrays[split, name] = (values[chosen], np.array(times)[chosen])
    seconds, found = [], {}
    for _ in range(2):
        start = time.perf_counter()
        scores = evaluate_task(task, lambda split, name: arrays[split, name], PROTOCOLS["hear2021"], seed)
        seconds.append(time.perf_counter() - start)
        found = {split: fold.test["test_score"] for split, fold in scores.folds.items()}
    return seconds, found


def kit(folder: Path, seed: int) -> tuple[list[float], dict[str, float]]:
    """The kit, with another seed of torch's, and what it needs to run on today's torch and Lightning 1.9."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its checkpoints hold classes
    import logging

    import pytorch_lightning  # pyright: ignore[reportMissingImports]
    from heareval.predictions import task_predictions as predictions  # pyright: ignore[reportMissingImports]
    from pytorch_lightning.loops import FitLoop  # pyright: ignore[reportMissingImports]

    FitLoop.current_epoch = property(  # Lightning 1.6 took the setter away
        lambda self: self.epoch_progress.current.completed,
        lambda self, value: setattr(self.epoch_progress.current, "completed", value),
    )

    def seed_everything(number: int, workers: bool = False) -> None:
        pytorch_lightning.seed_everything(number + seed, workers=workers)
        random.seed(number)  # the points of the grid stay the same

    predictions.seed_everything = seed_everything
    features = json.loads(next(iter(folder.glob("*.embedding-dimensions.json"))).read_text())[1]
    start = time.perf_counter()
    predictions.task_predictions(
        embedding_path=folder,
        embedding_size=features,
        grid_points=8,
        gpus=None,
        in_memory=True,
        deterministic=True,
        grid="default",
        logger=logging.getLogger("kit"),
    )
    seconds = [time.perf_counter() - start]
    found = json.loads((folder / "test.predicted-scores.json").read_text())
    return seconds, {
        split: part["test_score"] for split, part in found.items() if isinstance(part, dict) and "test_score" in part
    }


if __name__ == "__main__":
    main()
