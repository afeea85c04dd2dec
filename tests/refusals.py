"""How the tests of wrong input look at an error: it is ours, and its message names what was expected and found."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gura_jax.errors import GuraError


@contextlib.contextmanager
def refuses(error: type[GuraError], *fragments: str) -> Iterator[pytest.ExceptionInfo[GuraError]]:
    """Expect exactly this error, with a message that holds every fragment."""
    with pytest.raises(error) as caught:
        yield caught
    _check(error, caught.value, fragments)


def refusal(error: type[GuraError], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of exactly this error, which the call must end in."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return _check(error, caught.value, ())


def _check(error: type[GuraError], found: GuraError, fragments: tuple[str, ...]) -> str:
    assert type(found) is error, repr(found)
    message = str(found)
    assert "Traceback" not in message
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, f"{missing} not in: {message}"
    return message
