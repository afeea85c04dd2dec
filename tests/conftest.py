"""Strict JAX, several CPU devices, and no accelerator: set before JAX starts."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

CACHE = "GURA_JAX_TESTS_XLA"  # where the processes of a test run keep what they compile: many need the same programs
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="gura-jax-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file_at_a_time() -> Iterator[None]:
    """Compiled programs would otherwise add up to gigabytes in a process that runs many files."""
    yield
    jax.clear_caches()
