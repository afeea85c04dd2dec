"""What `import gura_jax` brings, and what it does not; and which modules may import which."""

import ast
import graphlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import gura_jax

HEAVY = (
    "torch",
    "transformers",
    "torchcrepe",
    "mteb",
    "librosa",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "soundfile",
    "av",
    "soxr",
    "pyarrow",
    "yaml",
    "typer",
    "tqdm",
    "orbax",
    "huggingface_hub",
    "safetensors",
)
WITHOUT_TORCH = (
    "gura_jax.audit.report",
    "gura_jax.cli",
    "gura_jax.convert",
    "gura_jax.convert.wav2vec2",
    "gura_jax.dataset.run",
    "gura_jax.evaluate.run",
    "gura_jax.plot",
    "gura_jax.tsne",
    "gura_jax.search",
)
IMPORT = """
import importlib, json, sys, time
import jax, flax.nnx
found = {}
for module in sys.argv[1:]:
    before, start = set(sys.modules), time.perf_counter()
    importlib.import_module(module)
    seconds = time.perf_counter() - start
    found[module] = seconds, sorted({m.split(".")[0] for m in set(sys.modules) - before})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> Mapping[str, set[str]]:
    """The top-level modules that each adds to those of jax, of flax and of the ones before it, in one process."""
    command = [sys.executable, "-c", IMPORT, "gura_jax", *WITHOUT_TORCH]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    for module, (seconds, _) in found.items():
        print(f"import {module}: {seconds:.2f} s after the others")
    return {module: set(modules) for module, (_, modules) in found.items()}


def test_import_is_light(imported: Mapping[str, set[str]]) -> None:
    assert "gura_jax" in imported["gura_jax"]
    assert imported["gura_jax"] & set(HEAVY) == set()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_nothing_imports_torch(module: str, imported: Mapping[str, set[str]]) -> None:
    assert (
        imported[module] & {"torch", "transformers", "torchcrepe", "librosa", "matplotlib", "sklearn", "plotly"}
        == set()
    )


# From the ground up: a module imports its own floor and those below, and there is no circle.
FLOORS = (
    ("errors",),
    ("backend", "targets", "counting", "audio", "pyav", "files", "hub"),
    ("objects",),
    (
        "convert.keys",
        *(f"convert.{name}" for name in ("fairseq", "wav2vec2", "wavlm", "data2vec", "mms", "crepe")),
        *(f"convert.{name}" for name in ("conformer", "wav2vec2_conformer", "w2v_bert", "vq_wav2vec", "tera")),
        *(f"convert.{name}" for name in ("whisper", "ast", "beats", "dasheng")),
        *(f"convert.{name}" for name in ("panns", "passt", "byols", "efficientnet", "wav2clip")),
    ),
    ("models", "batching", "nearest", "convert.sources"),
    ("fusion", "parallel", "checkpoint", "convert.references"),
    ("systems", "convert"),
    ("model",),
    ("loading",),
    ("dataset", "plot", "convert.parity"),
    ("evaluate", "tsne", "search", "hear", "compiling"),
    ("mteb", "evaluate.mteb", "finetune", "audit"),
    ("cli",),
)
PACKAGE = Path(gura_jax.__file__).parent


def sources() -> dict[str, Path]:
    """Every module by its name under ``gura_jax``."""
    paths = [*PACKAGE.rglob("*.py"), *(PACKAGE / "convert").glob("*.py")]
    parts = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in paths}
    names = {".".join(own[:-1] if own[-1] == "__init__" else own): path for path, own in parts.items()}
    return {name: path for name, path in names.items() if name}


def imports(path: Path, modules: Iterable[str]) -> set[str]:
    """The modules of gura_jax that one imports as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gura_jax":
            package = (node.module or "").partition(".")[2]
            names = [f"{package}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in modules else package for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "gura_jax"}
    return found - {""}  # gura_jax itself: its version


def floor(module: str) -> int:
    """Of the longest name that the module's begins with."""
    found = [(len(name), i) for i, names in enumerate(FLOORS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} has no floor: say in FLOORS what it may import"
    return max(found)[1]


def test_imports_go_down() -> None:
    modules = sources()
    graph = {name: imports(path, modules) for name, path in modules.items()}
    upward = [f"{a} imports {b}" for a, below in graph.items() for b in below if floor(b) > floor(a)]
    assert upward == []
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names a circle


def test_only_conversion_and_adapters_import_torch() -> None:
    """Not even inside a function."""
    for name, path in sources().items():
        statements = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import))
        found = {alias.name for statement in statements for alias in statement.names}
        if name.split(".")[0] not in ("convert", "hear") and name != "audit.transformers_model":
            assert found & {"torch", "transformers", "torchcrepe"} == set(), name


# What is public


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
    assert len(sources()) > 40
    for module in sources():
        importlib.import_module(f"gura_jax.{module}")


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    project = PACKAGE.parent / "pyproject.toml"
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
