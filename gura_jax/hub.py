"""Files of a repository on the Hugging Face hub, listed and read by ranges, through huggingface_hub.

Its own conventions hold: ``HF_TOKEN`` or a login, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
"""

import re
from collections.abc import Iterator
from typing import Any

from gura_jax.errors import InputError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROOT = re.compile(r"hf://datasets/[^/@]+/[^/@]+(@[^/@]+)?(?=/|$)")


def split(url: str) -> tuple[str, str]:
    """Divide a URL into its repository with the revision, and the path there.

    Raises:
        InputError: it names no data set.
    """
    match = _ROOT.match(url)
    if match is None:
        raise InputError(f"{url}: expected hf://datasets/OWNER/NAME, perhaps @REVISION, and perhaps a path")
    return match[0], url[match.end() :].strip("/")


def pinned(url: str) -> str:
    """Replace the revision of a URL by the commit that it is now, by which its files stay the same.

    Raises:
        OSError: there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    root, path = split(url)
    repository, _, revision = root.removeprefix("hf://datasets/").partition("@")
    if not _COMMIT.fullmatch(revision):
        revision = HfApi().dataset_info(repository, revision=revision or None).sha
    return f"hf://datasets/{repository}@{revision}" + (f"/{path}" if path else "")


class Repository:
    """A revision of a data set.

    Args:
        root: as from :func:`split`.
    """

    def __init__(self, root: str) -> None:
        from huggingface_hub import HfFileSystem

        self.root = root.removeprefix("hf://")
        self.files: Any = HfFileSystem()

    def read(self, path: str, span: tuple[int, int] | None) -> tuple[bytes, int]:
        """Return a file's bytes from one place to another (None: all), and its size.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """
        name = f"{self.root}/{path}"
        size = int(self.files.info(name)["size"])
        start, stop = span or (0, size)
        stop = min(stop, size)
        if start >= stop:
            return b"", size
        return self.files.cat_file(
            name, start=start, end=stop, cache_type="none", block_size=max(1, stop - start)
        ), size

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The files below a path, at any depth, with their sizes.

        Raises:
            OSError: it cannot be listed.
        """
        found = self.files.find(f"{self.root}/{prefix}".rstrip("/"), detail=True)
        for name in sorted(found):
            yield name[len(self.root) + 1 :], int(found[name]["size"])
