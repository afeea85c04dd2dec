"""HEAR 2021's common API: one importable module a system, as ``gura_jax.hear.fusion_cat_xwc``.

Each has ``load_model``, ``get_scene_embeddings`` and ``get_timestamp_embeddings``; ``gura_jax.hear.custom`` is any
system, by its option ``system``. They differ in the system's name alone, so they are made from the table here.
"""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

from gura_jax.errors import SystemConfigError
from gura_jax.systems import SYSTEMS

try:
    from gura_jax.hear import interface
except ModuleNotFoundError as error:
    raise SystemConfigError(f"gura_jax.hear needs the package {error.name}: pip install 'gura-jax[hear]'") from None

CUSTOM = "custom"


def _module(name: str, system: str | None) -> types.ModuleType:
    """The HEAR module of a system; of the one that its options name, where ``system`` is None."""

    def load_model(model_file_path: str | Path = "", **options: Any) -> interface.HearModel:
        return interface.load(system, model_file_path, options)

    load_model.__doc__ = interface.load.__doc__
    module = types.ModuleType(f"{__name__}.{name}", f"HEAR 2021's common API of {system or 'a system of your own'}.")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    functions = (load_model, interface.get_scene_embeddings, interface.get_timestamp_embeddings)
    vars(module).update({function.__name__: function for function in functions})
    return module


for _name in (*SYSTEMS, CUSTOM):
    # Python looks here once it has imported the package, and before it looks for a file.
    _made = _module(_name, None if _name == CUSTOM else _name)
    sys.modules[_made.__name__] = globals()[_name] = _made
