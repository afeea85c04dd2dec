"""One contender in a process of its own: reads a workload's name a line, answers with a line of JSON.

python benchmarks/worker.py PEER SYSTEM WEIGHTS_FOLDER
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import work

FLAX_MODEL = "FlaxWav2Vec2Model"  # of transformers 4 alone
MATRIX = 2048  # of the square matrix product whose rate is the machine's

Embed = Callable[[Sequence[np.ndarray]], Any]


def main() -> None:
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    peer, system, folder = sys.argv[1:]
    start = time.perf_counter()
    embed, product = load(peer, work.CASES[system], folders(Path(folder), system))
    print(json.dumps({"load_seconds": time.perf_counter() - start, "peak_bytes": peak()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(embed, product, *line.split())), file=answers, flush=True)


def folders(root: Path, system: str) -> dict[str, Path]:
    """Where the PyTorch weights of each encoder of a system are."""
    return {str(m.encoder): root / str(m.encoder) for m in work.CASES[system].members}


def answer(embed: Embed, product: Callable[[], object], command: str, path: str = "") -> dict[str, float]:
    if command == "product":
        return {"seconds": timed(product)}
    audio = work.clips(command)
    reset_peak()
    start = time.perf_counter()
    frames = embed(audio)
    seconds = time.perf_counter() - start
    if path:
        np.savez(path, *[np.asarray(x) for x in frames])
    return {"seconds": seconds, "peak_bytes": peak()}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak() -> int:
    """Peak resident memory of this process in bytes, since :func:`reset_peak` where the kernel can tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def load(peer: str, system: Any, weights: Mapping[str, Path]) -> tuple[Embed, Callable[[], object]]:
    """A contender's function from clips to frames, and its matrix product."""
    if peer == "gura_jax" or peer.startswith("gura_jax:"):
        return load_gura_jax(system, weights, dict(o.split("=") for o in peer.split(":")[1:]))
    if peer == "flax":
        return load_flax(weights)
    return load_torch(peer, system, weights)


def load_gura_jax(system: Any, weights: Mapping[str, Path], options: Mapping[str, Any]) -> tuple[Embed, Any]:
    from gura_jax import load_model

    names = {m.name: weights[str(m.encoder)] for m in system.members}
    model = load_model(system, weights=names, **options)
    return lambda clips: model.timestamp_embeddings(list(clips))[0], jax_product()


def load_torch(mode: str, system: Any, weights: Mapping[str, Path]) -> tuple[Embed, Any]:
    import torch
    from torch_recipe import Recipe

    torch.set_num_threads(os.cpu_count() or 1)
    x = torch.randn(MATRIX, MATRIX)
    return Recipe(system, weights, mode).timestamp_embeddings, lambda: x @ x


def load_flax(weights: Mapping[str, Path]) -> tuple[Embed, Any]:
    """transformers 4's own Flax wav2vec 2.0, the mean of all hidden states."""
    import jax
    import transformers

    import gura_jax.convert.references  # noqa: F401 - mends a torchaudio that fails

    (path,) = weights.values()
    kind: Any = getattr(transformers, FLAX_MODEL)
    model = kind.from_pretrained(path, from_pt=True)

    @jax.jit
    def frames(params: Any, audio: jax.Array) -> Any:
        states = model(audio, params=params, output_hidden_states=True).hidden_states
        return sum(states) / len(states)

    def embed(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        batches = [clips] if len({len(clip) for clip in clips}) == 1 else [[clip] for clip in clips]
        return [np.asarray(x) for batch in batches for x in frames(model.params, np.stack(batch))]

    return embed, jax_product()


def jax_product() -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(np.random.default_rng(0).standard_normal((MATRIX, MATRIX)), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return lambda: product(x).block_until_ready()


if __name__ == "__main__":
    main()
