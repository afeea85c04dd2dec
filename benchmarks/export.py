"""Export a member's network of the published recipe for another runtime.

python benchmarks/export.py FORMAT SYSTEM WEIGHTS_FOLDER

FORMAT is onnx or openvino, whose packages must be importable. Each encoder of the system is written once, to
WEIGHTS_FOLDER/exported; and again when its weights are newer.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import work
from peers import exported
from torch_recipe import is_crepe, load_network
from worker import folders

from gura_jax.files import new_folder
from gura_jax.models.crepe import WINDOW

CLIPS, SAMPLES = 2, 16_000  # of the example; both are free in what is exported


def to_onnx(network: torch.nn.Module, example: torch.Tensor, free: int, path: Path) -> None:
    """Write ONNX whose first ``free`` axes are of any size."""
    axes = dict.fromkeys(range(free), torch.export.Dim.DYNAMIC)
    torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=(axes,), verbose=False)


def to_openvino(network: torch.nn.Module, example: torch.Tensor, free: int, path: Path) -> None:
    """Write OpenVINO's own format, from PyTorch directly: that keeps attention one operation, which ONNX does not."""
    import openvino  # pyright: ignore[reportMissingImports]

    shape = [-1 if axis < free else size for axis, size in enumerate(example.shape)]
    model = openvino.convert_model(network, example_input=example, input=[openvino.PartialShape(shape)])
    openvino.save_model(model, path, compress_to_fp16=False)


EXPORTERS: Mapping[str, Callable[[torch.nn.Module, torch.Tensor, int, Path], None]] = {
    "onnx": to_onnx,
    "openvino": to_openvino,
}


def main() -> None:
    form, system, folder = sys.argv[1:]
    weights = folders(Path(folder), system)
    for member in work.CASES[system].members:
        path = exported(weights[member.name], form)
        if path.exists() and path.stat().st_mtime > weights[member.name].stat().st_mtime:
            continue
        example, free = (torch.randn(CLIPS, WINDOW), 1) if is_crepe(member) else (torch.randn(CLIPS, SAMPLES), 2)
        with new_folder(path.parent) as temporary, torch.inference_mode():
            EXPORTERS[form](load_network(member, weights[member.name]), example, free, temporary / path.name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the exporters' own
    main()
