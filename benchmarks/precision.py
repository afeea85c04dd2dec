"""How far bfloat16, and float32 at default precision, are from float32 at the highest: each hidden state, or part.

python benchmarks/precision.py [ENCODER ...] [--weights random|pretrained]
"""

import argparse
from typing import Any

import jax
import numpy as np
import work
from run import machine

from gura_jax import ENCODERS, load_model

CHOICES = ({"dtype": "bfloat16"}, {"precision": "default"})


def parts(encoder: str, weights: Any, audio: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """Hidden states [T, D] of an encoder, by name; of one without any, every part of its computation."""
    model = load_model(encoder, weights=weights, **options)
    (member,) = model.fusion.members

    def every(params: Any, audio: jax.Array, lengths: jax.Array) -> dict[str, jax.Array]:
        with jax.default_matmul_precision(model.compilation.precision):
            states = {name: value[0] for name, value, _ in member.encoder.states(params, audio, lengths)}
        chosen = [name for name in states if name.startswith("state ")] or states
        return {name: states[name] for name in chosen}

    batch = audio[None], np.array([len(audio)], np.int32)
    found = jax.device_get(jax.jit(every)(model.params[member.name], *batch))
    return {name: found[name] for name in member.encoder.parts if name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", default=["hubert-base", "wav2vec2-large", "crepe-full"])
    parser.add_argument("--weights", default="random")
    arguments = parser.parse_args()
    for encoder in arguments.encoders:
        if encoder not in ENCODERS:
            parser.error(f"{encoder}: expected one of {', '.join(ENCODERS)}")
    about = machine()
    print(f"{about['date']}; {about['machine']}; jax {about['versions']['jax']}; {arguments.weights} weights; 4 s")
    print("\n| encoder | output | bfloat16 | default precision |\n|---|---|---|---|")
    audio = work.clips("4x4")[0]
    for encoder in arguments.encoders:
        exact, *others = (parts(encoder, arguments.weights, audio, **options) for options in ({}, *CHOICES))
        for name, expected in exact.items():
            deviations = (np.linalg.norm(each[name] - expected) / np.linalg.norm(expected) for each in others)
            print(f"| {encoder} | {name} | " + " | ".join(f"{x:.1e}" for x in deviations) + " |", flush=True)


if __name__ == "__main__":
    main()
