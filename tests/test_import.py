"""What `import gura_jax` brings, and what it does not."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gura_jax

HEAVY = (
    "torch",
    "transformers",
    "torchcrepe",
    "librosa",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "soundfile",
    "soxr",
    "pyarrow",
    "yaml",
    "typer",
    "tqdm",
    "orbax",
    "huggingface_hub",
    "safetensors",
)
IMPORT = """
import json, sys, time
import jax, flax.nnx
before = set(sys.modules)
start = time.perf_counter()
import {module}
print(json.dumps([time.perf_counter() - start, sorted({{m.split(".")[0] for m in set(sys.modules) - before}})]))
"""


def imported(module: str) -> set[str]:
    """The top-level modules that it adds to those of jax and flax."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module=module)], capture_output=True, text=True, check=True
    )
    seconds, modules = json.loads(run.stdout)
    print(f"import {module}: {seconds:.2f} s after jax and flax")
    assert "gura_jax" in modules
    return set(modules)


def test_import_is_light() -> None:
    assert imported("gura_jax") & set(HEAVY) == set()


@pytest.mark.parametrize(
    "module", ["gura_jax.cli", "gura_jax.dataset", "gura_jax.evaluate.run", "gura_jax.plot", "gura_jax.tsne"]
)
def test_nothing_imports_torch(module: str) -> None:
    assert (
        imported(module) & {"torch", "transformers", "torchcrepe", "librosa", "matplotlib", "sklearn", "plotly"}
        == set()
    )


def test_all_is_complete() -> None:
    assert list(gura_jax.__all__) == sorted(gura_jax.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n))
    modules = {name for name, value in vars(gura_jax).items() if type(value) is type(gura_jax)}
    public = {name for name in vars(gura_jax) if not name.startswith("_")} - modules
    assert public == set(gura_jax.__all__)


def test_what_is_public_is_documented() -> None:
    for name in gura_jax.__all__:
        value = getattr(gura_jax, name)
        if callable(value):
            assert value.__doc__, name


def test_every_module_can_be_imported() -> None:
    root = Path(gura_jax.__file__).parent
    modules = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
    assert len(modules) > 10
    for module in modules:
        importlib.import_module(".".join(module.parts).removesuffix(".__init__"))


def test_typed() -> None:
    assert (Path(gura_jax.__file__).parent / "py.typed").is_file()
    project = Path(gura_jax.__file__).parent.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not a source checkout")
    settings = tomllib.loads(project.read_text())
    setuptools = settings["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"]["gura_jax"]
    # Every package is listed, as setuptools packages no other.
    found = {
        ".".join(p.parent.relative_to(project.parent).parts) for p in project.parent.glob("gura_jax/**/__init__.py")
    }
    assert found | {"gura_jax.convert"} == set(setuptools["packages"])
    assert settings["project"]["version"] == gura_jax.__version__


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("gura-jax") == gura_jax.__version__
