"""Formats of a store. A format is one module and one row of SINKS.

The commit protocol (:mod:`gura_jax.dataset.commit`) and the reader (:mod:`gura_jax.dataset.reader`) are the same for
all formats.
"""

from gura_jax.dataset.sinks.npy import Npy
from gura_jax.dataset.sinks.parquet import Parquet
from gura_jax.dataset.sinks.sink import Cells, Create, Open, Rows, Shard, Sink

__all__ = ["DEFAULT", "SINKS", "Cells", "Create", "Open", "Rows", "Shard", "Sink"]

DEFAULT = "npy"
SINKS: dict[str, Sink] = {DEFAULT: Npy(), "parquet": Parquet()}
