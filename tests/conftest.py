"""Strict JAX, several CPU devices, and no accelerator: set before JAX starts."""

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = "GURA_JAX_TESTS_XLA"  # where the processes of a test run keep what they compile: many need the same programs
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="gura-jax-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # processes beside each other: threads of PyTorch's would only wait for cores
    os.environ["OMP_NUM_THREADS"] = "1"

sys.path.append(str(Path(sys.prefix) / "tpu"))  # libtpu, see Makefile

import jax

jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the default tests in a third of the time: without LLVM's optimisation, which leaves XLA's as it is.

    And by the older code generator of XLA for CPUs, which JAX 0.12 no longer has. The command in a process of its own,
    and the tests marked slow, compile as users do.
    """
    if config.option.markexpr.startswith("not slow"):
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 12):
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """From Z to A: the last file is the longest and the first are short, so that two processes end together."""
    items.sort(key=lambda item: item.path, reverse=True)


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it for cycles took 0.7 s each time, of a hundred times."""
    importlib.import_module("hypothesis")  # which looks for what holds its parts, and would not find what is frozen
    gc.collect()
    gc.freeze()


gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and few cycles: looking for them took 5 % of the time


@pytest.fixture(autouse=True, scope="module")
def _memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each file: its cached models, compiled programs, and what the C library would keep in pieces."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that files are given by ``os.replace``, in order."""
    order: list[str] = []
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    return order
