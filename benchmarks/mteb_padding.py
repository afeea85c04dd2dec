"""A clip's embedding alone and among others, through MTEB's own wrapper of HuBERT and through gura_jax's.

python benchmarks/mteb_padding.py [NAME...] [--size tiny]

Both have the same random weights, from one Hugging Face folder; needs gura-jax[mteb].
"""

import argparse
import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers

from gura_jax import ENCODERS, mteb
from gura_jax.audio import synthetic_clip
from gura_jax.convert.references import find_reference
from gura_jax.models.families import find_family

# isort: split
import datasets
from mteb._create_dataloaders import create_dataloader
from mteb.mocks.mock_tasks import MockAudioClassification
from mteb.models.model_implementations.hubert_models import HubertWrapper

RATE = 16_000  # Hz
SECONDS = (4.0, 2.5, 1.3, 0.6)
NAMES = ("hubert-base", "hubert-large")  # group norm and layer norm in the feature encoder
Embed = Callable[[Sequence[np.ndarray]], np.ndarray]


class Difference(NamedTuple):
    """The largest distance of a clip's embedding among others from the one alone, and the smallest cosine of both."""

    distance: float  # relative, Euclidean
    cosine: float


def save(name: str, folder: Path, size: str | None) -> Path:
    """Save an encoder with random weights, and its feature extractor, as Hugging Face does."""
    config = ENCODERS[name].config
    config = config.tiny() if size else config
    find_reference(find_family(config.model_type).reference).random(config, seed=0).save(folder)
    normalise = config.feat_extract_norm == "layer"  # as the published checkpoints do
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True).save_pretrained(folder)
    return folder


def through(encoder: Any) -> Embed:
    """Return a function that passes clips to an encoder as MTEB does, in one batch."""
    metadata = MockAudioClassification.metadata

    def embed(clips: Sequence[np.ndarray]) -> np.ndarray:
        audio = [{"array": clip, "sampling_rate": RATE} for clip in clips]
        data = datasets.Dataset.from_dict({"audio": audio}).with_format("numpy")
        loader = create_dataloader(data, task_metadata=metadata, batch_size=len(clips))
        found = encoder.encode(
            loader, task_metadata=metadata, hf_split="test", hf_subset="default", show_progress_bar=False
        )
        return np.asarray(found)

    return embed


def compare(embed: Embed, clips: Sequence[np.ndarray]) -> Difference:
    """Embed clips one by one, and together."""
    alone, together = np.concatenate([embed([clip]) for clip in clips]), embed(clips)
    norms = np.linalg.norm(alone, axis=1)
    cosines = (alone * together).sum(axis=1) / (norms * np.linalg.norm(together, axis=1))
    return Difference(float((np.linalg.norm(together - alone, axis=1) / norms).max()), float(cosines.min()))


def wrappers(folder: Path) -> tuple[Embed, Embed]:
    """Load a folder into MTEB's wrapper and into gura_jax's."""
    return through(HubertWrapper(str(folder), revision="main", device="cpu")), through(mteb.load(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny"], help="small encoders of the same kinds")
    parser.add_argument("names", nargs="*", choices=NAMES, default=NAMES, metavar="NAME")
    arguments = parser.parse_args()
    size = arguments.size
    clips = [synthetic_clip(seconds, sample_rate=RATE) for seconds in SECONDS]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mteb", "transformers", "torch", "gura-jax")]
    print(f"{', '.join(versions)}; clips of {', '.join(f'{s:g}' for s in SECONDS)} s; random weights, float32\n")
    print("| encoder | norm | MTEB's: alone and among others | cosine | gura_jax's | both, alone |")
    print("|---|---|---|---|---|---|")
    for name in arguments.names:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = wrappers(save(name, Path(folder) / name, size))
        found, own = compare(theirs, clips), compare(ours, clips)
        a, b = theirs(clips[:1]), ours(clips[:1])
        norm = ENCODERS[name].config.feat_extract_norm
        print(
            f"| {name} | {norm} | {found.distance:.1e} | {found.cosine:.6f} | {own.distance:.1e} | "
            f"{np.linalg.norm(a - b) / np.linalg.norm(a):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    main()
