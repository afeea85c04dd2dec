"""The sizes and forms that a platform's row has, each beside others, by the compiler of a device that need not be here.

python benchmarks/sizes.py [--target tpu:v5e:1x1] [FIELD ...]

Each table: seconds to compile, and memory of what is neither weights nor audio; scenes in bfloat16.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

from run import machine

from gura_jax.backend import PLATFORMS
from gura_jax.compiling import Program
from gura_jax.loading import outline
from gura_jax.targets import GB, parse_target


class Case(NamedTuple):
    """A system, a batch of clips, and the values of a field of :class:`gura_jax.backend.Platform`."""

    system: str
    clips: int
    seconds: int
    values: tuple[Any, ...]


CASES = {
    "scan_layers": Case("hubert_base", 16, 10, (False, True)),
    "frames": Case("hubert_base", 16, 10, (256, 512, 1024, 2048, 1 << 20)),
    "scores": Case("hubert_base", 1, 600, (1 << 24, 1 << 26, 1 << 28, 1 << 30)),
    "tokens": Case("hubert_base", 1, 600, (1 << 12, 1 << 14, 1 << 16)),
    "crepe_taps": Case("crepe", 16, 10, (None, 4, 8, 16)),
    "crepe_frames": Case("crepe", 16, 10, (128, 256, 512, 1024)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tpu:v5e:1x1")
    parser.add_argument("fields", nargs="*", metavar="FIELD", help=", ".join(CASES))
    options = parser.parse_args()
    target = parse_target(options.target)
    devices, name = target.devices(), target.device.platform
    about, row = machine(), PLATFORMS[name]
    print(f"{about['date']}; {options.target}, compiled on {about['machine']}; jax {about['versions']['jax']}")
    for field in options.fields or CASES:
        system, clips, seconds, values = CASES[field]
        print(f"\n{field}: {system}, {clips} x {seconds} s\n\n| {field} | compile, s | temporary, GB |\n|---|---|---|")
        for value in values:
            PLATFORMS[name] = dataclasses.replace(row, **{field: value})
            model = outline(system, devices=devices, dtype="bfloat16")
            compiled = Program(model, target).compile(clips, seconds * model.sample_rate)
            mark = " (in use)" if value == getattr(row, field) else ""
            figures = (
                "| does not fit |"
                if compiled is None
                else (f"| {compiled.seconds:.0f} | {compiled.memory.temporaries / GB:.2f} |")
            )
            print(f"| {value}{mark} {figures}", flush=True)
        PLATFORMS[name] = row


if __name__ == "__main__":
    main()
