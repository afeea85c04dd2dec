"""How far a clip's embedding in a padded batch is from the clip's alone: gura_jax beside PyTorch.

python benchmarks/padding.py [--size tiny]
"""

import argparse
import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gura_jax import ENCODERS, Member, System, load_model
from gura_jax.audio import synthetic_clip
from gura_jax.convert.references import find_reference
from gura_jax.models.families import find_family

SECONDS = (4.0, 2.5, 1.0)
ENCODER_NAMES = ("hubert-base", "wav2vec2-base", "hubert-large", "wav2vec2-large")


def distance(padded: np.ndarray, alone: np.ndarray) -> float:
    """Relative Euclidean distance."""
    return float(np.linalg.norm(padded - alone) / np.linalg.norm(alone))


def pytorch(model: torch.nn.Module, clips: list[np.ndarray], mask: bool) -> float:
    """Largest distance over the clips, of the last hidden state."""
    batch = np.zeros((len(clips), max(map(len, clips))), np.float32)
    valid = np.zeros(batch.shape, np.int64)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = clip
        valid[row, : len(clip)] = 1
    with torch.inference_mode():
        attention_mask = torch.from_numpy(valid) if mask else None
        padded = model(torch.from_numpy(batch), attention_mask=attention_mask).last_hidden_state.numpy()
        alone = [model(torch.from_numpy(clip)[None]).last_hidden_state[0].numpy() for clip in clips]
    return max(distance(p[: len(a)], a) for p, a in zip(padded, alone, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["tiny"], help="small encoders of the same kinds")
    arguments = parser.parse_args()

    clips = [synthetic_clip(seconds) for seconds in SECONDS]
    packages = ("gura-jax", "jax", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{platform.machine()} CPU, Python {platform.python_version()}, {versions}; float32, random weights")
    print(f"clips of {', '.join(f'{s:g}' for s in SECONDS)} s in one batch; relative distance of the last state\n")
    print("| encoder | norm of the feature encoder | gura_jax | PyTorch, with mask | PyTorch, without |")
    print("|---|---|---|---|---|")
    for name in ENCODER_NAMES:
        config = ENCODERS[name].config
        config = config.tiny() if arguments.size else config
        reference = find_reference(find_family(config.model_type).reference).random(config, seed=0)
        model: Any = reference.model
        with tempfile.TemporaryDirectory() as folder:
            ours = load_model(System(name, (Member(str(reference.save(Path(folder) / name))),)))
        padded, _ = ours.timestamp_embeddings(clips)
        alone = [ours.timestamp_embeddings(clip[None])[0][0] for clip in clips]
        worst = max(distance(p, a) for p, a in zip(padded, alone, strict=True))
        figures = [worst, pytorch(model, clips, mask=True), pytorch(model, clips, mask=False)]
        norm = config.feat_extract_norm
        print(f"| {name} | {norm} | " + " | ".join(f"{figure:.1e}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    main()
