"""How the tests of wrong input look at an error: it is ours, and its message names what was expected and found."""

import contextlib
from collections.abc import Iterator

import pytest

from gura_jax.errors import GuraError


@contextlib.contextmanager
def refuses(error: type[GuraError], *fragments: str) -> Iterator[None]:
    """Expect exactly this error, with a message that holds every fragment."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error, repr(caught.value)
    message = str(caught.value)
    assert "Traceback" not in message
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"
