"""The main job, from nothing: convert weights, embed the example clips, draw them. Run by ``make demo``."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gura_jax.audio import load_audio
from gura_jax.cli import EXIT_NO_DOWNLOAD
from gura_jax.plot import Clip, embedding_figure

ROOT = Path(__file__).parent.parent
AUDIO = ROOT / "examples" / "audio"
OUT = ROOT / "demo"
SPEECH_ENCODERS = ("hubert-base", "wav2vec2-base")
FUSION = "fusion_cat_xwc_base"


def gura_jax(*arguments: str | Path) -> bool:
    """Run the command line, and show what is run; False where weights cannot be downloaded."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) else a for a in arguments]
    print(f"\n$ gura-jax {shlex.join(shown)}", flush=True)
    program = Path(sys.executable).with_name("gura-jax")
    result = subprocess.run([program, *map(str, arguments)], cwd=ROOT, check=False)
    if result.returncode not in (0, EXIT_NO_DOWNLOAD):
        sys.exit(result.returncode)
    return result.returncode == 0


def picture(system: str) -> Path:
    """Spectrogram and embedding of each clip in a store."""
    store = OUT / system
    frames = np.load(store / "frames-00000.npy", mmap_mode="r")
    clips = []
    for row in pq.read_table(store / "meta-00000.parquet").to_pylist():
        index = np.arange(row["num_frames"])
        clips.append(
            Clip(
                title=Path(row["id"]).stem,
                audio=load_audio(row["path"]),
                frames=frames[row["frame_start"] + index],
                times=row["frame_offset_ms"] + row["frame_hop_ms"] * index,
            )
        )
    path = OUT / f"{system}.png"
    random = json.loads((store / "run.json").read_text())["random_weights"]
    embedding_figure(clips, path, title=system + (f" (random weights: {', '.join(random)})" if random else ""))
    return path


def main() -> None:
    gura_jax("convert", "crepe-full")
    gura_jax("embed", AUDIO, "--system", "crepe", "--out", OUT / "crepe", "--timestamps", "--overwrite")

    weights = []
    for encoder in SPEECH_ENCODERS:
        if not gura_jax("convert", encoder):
            weights += ["--weights", f"{encoder}=random"]
    if weights:
        print(
            "\nNot all pretrained speech encoders can be had here (see above), so the fusion runs with random weights\n"
            "in their place: the same computation, but those thirds of its embedding mean nothing."
        )
    gura_jax("embed", AUDIO, "--system", FUSION, "--out", OUT / FUSION, "--timestamps", "--overwrite", *weights)

    pictures = [picture(system) for system in ("crepe", FUSION)]
    print("\nMade in demo/:")
    for system in ("crepe", FUSION):
        scene, frames = (np.load(OUT / system / f"{kind}-00000.npy", mmap_mode="r") for kind in ("scene", "frames"))
        print(
            f"  {system}/: scene embeddings {scene.shape}, frames {frames.shape}, one row of meta-00000.parquet a clip"
        )
    for path in pictures:
        print(f"  {path.relative_to(OUT)}: each clip's spectrogram above its embedding over time")


if __name__ == "__main__":
    main()
