"""Run one of HEAR's clients, unmodified, with a current PyTorch and without TensorFlow.

python tests/hear/client.py CLIENT ARGUMENT...

CLIENT: hearvalidator.validate, heareval.embeddings.runner or heareval.predictions.runner.
"""

import importlib.machinery
import os
import runpy
import sys
import types


def main() -> None:
    stand_in_for_tensorflow()
    # Lightning's checkpoints hold classes; heareval reads only those that it has just written.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    del sys.argv[0]
    if sys.argv[0] == "heareval.predictions.runner":
        let_epochs_be_set()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def stand_in_for_tensorflow() -> None:
    """Provide the two names of TensorFlow that the clients use with a PyTorch model."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)  # torch asks for it
    vars(tensorflow).update(
        __version__="0",
        Module=type("Module", (), {}),  # no model is one
        test=types.SimpleNamespace(is_gpu_available=lambda **_: True),
    )
    sys.modules["tensorflow"] = tensorflow


def let_epochs_be_set() -> None:
    """Restore the setter of the loop's epoch, which heareval needs and Lightning removed in 1.6."""
    from pytorch_lightning.loops import FitLoop  # pyright: ignore[reportMissingImports]

    def get(loop: FitLoop) -> int:
        return loop.epoch_progress.current.completed

    def put(loop: FitLoop, epoch: int) -> None:
        loop.epoch_progress.current.completed = epoch

    FitLoop.current_epoch = property(get, put)


if __name__ == "__main__":
    main()
