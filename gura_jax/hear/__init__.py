"""HEAR 2021's common API: one importable module for each system, for example ``gura_jax.hear.fusion_cat_xwc``.

Each has ``load_model``, ``get_scene_embeddings`` and ``get_timestamp_embeddings``. ``gura_jax.hear.custom`` is any
system, chosen by the option ``system``. The modules differ only in the system, so they are created here from the table.
"""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

from gura_jax.errors import SystemConfigError
from gura_jax.models.families import import_families
from gura_jax.systems import SYSTEMS

try:
    from gura_jax.hear import interface
except ModuleNotFoundError as error:
    raise SystemConfigError(f"gura_jax.hear needs the package {error.name}: pip install 'gura-jax[hear]'") from None

CUSTOM = "custom"


def _module(name: str, system: str | None) -> types.ModuleType:
    """Create the HEAR module of a system; None: of the system that the options name."""

    def load_model(model_file_path: str | Path = "", **options: Any) -> interface.HearModel:
        return interface.load(system, model_file_path, options)

    load_model.__doc__ = interface.load.__doc__
    module = types.ModuleType(f"{__name__}.{name}", f"HEAR 2021's common API of {system or 'a system of your own'}.")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    functions = (load_model, interface.get_scene_embeddings, interface.get_timestamp_embeddings)
    vars(module).update({function.__name__: function for function in functions})
    return module


import_families()
for _name in (*SYSTEMS, CUSTOM):
    # Once the package is imported, Python finds its modules here, without looking for files.
    _made = _module(_name, None if _name == CUSTOM else _name)
    sys.modules[_made.__name__] = globals()[_name] = _made
