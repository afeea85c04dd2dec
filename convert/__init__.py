"""PyTorch weights to Flax. The key tables need no PyTorch, so it is imported with the first use of :func:`convert`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gura_jax.convert.conversion import Converted, convert, read_config

__all__ = ["Converted", "convert", "read_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gura_jax.convert import conversion

    return getattr(conversion, name)
