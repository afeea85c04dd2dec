"""How far bfloat16, and float32 at default precision, are from float32 at the highest: each hidden state, and CREPE.

python benchmarks/precision.py [ENCODER ...] [--weights random|pretrained]
"""

import argparse

import numpy as np
import work
from run import machine

from gura_jax import ENCODERS, Member, System, load_model
from gura_jax.models.crepe import HOP as CREPE_HOP

CHOICES = ({"dtype": "bfloat16"}, {"precision": "default"})


def states(encoder: str, weights: str, audio: np.ndarray, **options: str) -> list[np.ndarray]:
    """Outputs of an encoder, [T, D] each: hidden states, or CREPE's embedding and pitch activation."""
    model = load_model(System(encoder, (Member(encoder),)), weights=weights, seed=0, **options)  # pyright: ignore
    if encoder.startswith("crepe"):
        return [model.timestamp_embeddings(audio)[0][0], model.pitch_activation(audio, hop=CREPE_HOP)[0]]
    return list(model.hidden_states(audio)[0])


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
    audio = work.clips("4x4")[0][None]
    for encoder in arguments.encoders:
        exact, *others = (states(encoder, arguments.weights, audio, **options) for options in ({}, *CHOICES))
        for i, expected in enumerate(exact):
            name = f"state {i}" if not encoder.startswith("crepe") else ("embedding", "pitch activation")[i]
            deviations = (np.linalg.norm(each[i] - expected) / np.linalg.norm(expected) for each in others)
            print(f"| {encoder} | {name} | " + " | ".join(f"{x:.1e}" for x in deviations) + " |", flush=True)


if __name__ == "__main__":
    main()
