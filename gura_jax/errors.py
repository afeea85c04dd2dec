"""The errors that gura_jax raises on purpose.

Each message says what was expected, what was found, and what to do. The command line prints the message
alone and exits with 1; anything else that escapes is a bug.
"""

import difflib
import re
from collections.abc import Iterable


class GuraError(Exception):
    """Base of every error that gura_jax raises on purpose."""


class AudioError(GuraError, ValueError):
    """Audio that cannot be embedded: wrong rank, type, length or values, or a file that cannot be read."""


class SystemConfigError(GuraError, ValueError):
    """A system, member or encoder that is unknown, or described wrongly."""


class CheckpointError(GuraError):
    """A checkpoint that is missing, incomplete, damaged, too new, or of another architecture."""


class ConversionError(GuraError):
    """PyTorch weights that cannot be converted; the message lists everything that is wrong."""


class DownloadError(ConversionError):
    """PyTorch weights that cannot be downloaded: no network, or a server that fails."""


class InputError(GuraError, ValueError):
    """A manifest, a folder or a path that does not say which clips to embed."""


class TrainingError(GuraError):
    """A training that cannot go on: a loss that is not finite, or devices without memory for it."""


class TargetError(GuraError, ValueError):
    """A device to compile for that is unknown, or whose compiler is missing or of another version."""


class StoreError(GuraError):
    """An output folder that cannot be written, or stored embeddings that cannot be read."""


def expected(found: object, known: Iterable[str]) -> str:
    """Say of a name that is not in a table which ones are close to it, or all there are."""
    names = list(known)
    close = difflib.get_close_matches(str(found), names)
    choices = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
    return f"{found!r} is not known; {choices}"


def reason(error: BaseException) -> str:
    """Return what an error of a library or the system says, in one line, without the number that Python adds to it."""
    said = getattr(error, "strerror", None) or str(error)
    return re.sub(r"\[Errno \d+\] ", "", " ".join(said.split()))
