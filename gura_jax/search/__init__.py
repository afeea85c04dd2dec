"""Search from the command line: queries that are sounds, an approximate index, and a page of what was found.

The exact search itself is :meth:`gura_jax.EmbeddingStore.search`.
"""

from gura_jax.search.index import Index, open_index
from gura_jax.search.page import check_page, write_page
from gura_jax.search.queries import Failure, Query, read_queries, try_queries

__all__ = ["Failure", "Index", "Query", "check_page", "open_index", "read_queries", "try_queries", "write_page"]
