"""The errors that gura_jax raises on purpose.

Each message says what was expected, what was found, and what to do. The command line prints the message
alone and exits with 1; anything else that escapes is a bug.
"""


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


class StoreError(GuraError):
    """An output folder that cannot be written, or stored embeddings that cannot be read."""
