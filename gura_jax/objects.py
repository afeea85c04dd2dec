"""Objects of a bucket, a web server or a hub: opened by ranges, listed, written and removed.

obstore reads and writes; what it lacks, the Hugging Face hub, is :mod:`gura_jax.hub`.

Credentials, regions and endpoints come from where each store's own tools take them (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME``, a machine's role, ...), and
never from a URL. Requests that fail for a while are repeated by obstore, with growing and random pauses.
"""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from gura_jax import hub
from gura_jax.errors import InputError, StoreError, reason
from gura_jax.files import PositionedFile

T = TypeVar("T")

# A scheme and the extra that brings its client; web servers are only read.
SCHEMES = {"s3": "s3", "gs": "gcs", "az": "azure", "https": "s3", "http": "s3", "hf": "hf"}
WRITTEN = ("s3", "gs", "az")
LISTED = (*WRITTEN, "hf")
PINNED = ("hf",)  # whose URLs name a revision
FIRST_BYTES = 1 << 16  # of an object: a header, or a short clip
BLOCK_BYTES, LARGEST_BLOCK = 1 << 20, 1 << 23  # read ahead of what is asked for, more and more where it goes on
RETRIES: dict[str, Any] = {
    "max_retries": 50,  # the time is the bound: a pause that a server asks for is not read, but outlasted
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=20), "base": 3},
}
ATTEMPTS = 6  # at a request whose answer breaks off
# Of a connection on which nothing comes; a large object may take its time.
CLIENT: dict[str, Any] = {
    "timeout": timedelta(hours=6),
    "read_timeout": timedelta(seconds=60),
    "connect_timeout": timedelta(seconds=10),
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ONE_SLASH = re.compile(rf"({'|'.join(SCHEMES)}):/(?!/)")
# Of signed URLs; else a "?" may be part of a key.
_SIGNED = re.compile(r"[?&](X-Amz-|X-Goog-|AWSAccessKeyId=|GoogleAccessId=|Signature=|sig=|token=)", re.IGNORECASE)
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*")


def scheme(text: str) -> str:
    """Return the scheme of a URL; empty for a local path."""
    match = _URL.match(text)
    return match[1] if match else ""


class Place(NamedTuple):
    """An object or a prefix: the client of its bucket, and its key there."""

    store: Any
    key: str


class Entry(NamedTuple):
    """An object of a listing; two of one version have the same content."""

    key: str
    size: int
    version: str | None = None


class Answer(NamedTuple):
    """Some bytes of an object, its size, its version where it has one, and when it was changed where that is known."""

    content: bytes
    size: int
    version: str | None
    modified: str | None = None


def check_url(url: str) -> str:
    """Return a URL that can be opened, without a slash at its end.

    Raises:
        InputError: another scheme, no bucket or host, a key that no client takes, or credentials or a query in it,
            which are not repeated.
    """
    kind = scheme(url)
    if kind not in SCHEMES:
        raise InputError(f"{kind}://...: expected a path or a URL of {', '.join(SCHEMES)}, in small letters")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its text repeats what may be a part of a password
        parts = None
    if parts is None or (":" in parts.netloc and "@" not in parts.netloc and kind not in ("http", "https")):
        raise InputError(
            f"{kind}://...: expected a URL, found one whose host or port is none (not shown): credentials are taken "
            "from the environment"
        )
    secret = _SIGNED.search(url) or (kind in ("http", "https") and (parts.query or parts.fragment))
    if "@" in parts.netloc or secret:
        shown = parts.path.split("&")[0].rpartition("@")[2]
        raise InputError(
            f"{kind}://...{shown}: expected a URL without user, password, query or fragment in it, "
            "found one with (not shown): credentials are taken from the environment, as the store's own tools do"
        )
    if not parts.netloc:
        raise InputError(f"{url}: expected a bucket or a host after {kind}://, found none")
    url = url.rstrip("/")
    key = url[len(bucket(url)) + 1 :]
    odd = key and any(part in ("", ".", "..") for part in key.split("/"))
    if odd or not url.isprintable() or " " in parts.netloc:
        raise InputError(
            f"{url!r}: expected a URL whose parts are names that can be printed, found an empty one, a dot, two or a "
            "control character, which no client of buckets takes: rename the object"
        )
    return url


def check_place(text: str) -> str:
    """Return a path or URL as it is.

    Raises:
        InputError: a URL with one slash, which would be a local path.
    """
    if match := _ONE_SLASH.match(text):
        raise InputError(
            f"{match[1]}:/...: expected a path or a URL, found one slash after {match[1]}: write {match[1]}://"
        )
    return text


def locate(url: str) -> Place:
    """Find the client and the key of a URL.

    Raises:
        InputError: see :func:`check_url`; or the client is not installed.
    """
    root = bucket(check_url(url))
    return Place(_client(root), url[len(root) :].strip("/"))


def bucket(url: str) -> str:
    """Return the start of a URL that names the bucket, the host or the repository."""
    if scheme(url) == "hf":
        return hub.split(url)[0]
    root = _ROOT.match(url)
    assert root is not None, "it has a scheme"
    return root[0]


def pinned(url: str) -> str:
    """Return a URL whose objects stay the same, where it names a revision; another one as it is.

    Raises:
        InputError: there is no such repository or revision.
    """
    if scheme(url) not in PINNED:
        return url
    try:
        return hub.pinned(url)
    except ModuleNotFoundError:
        raise _no_client(url, "huggingface_hub") from None
    except errors() as error:
        raise InputError(f"{url}: expected a data set on the hub, found: {why(error)}") from None


def _no_client(url: str, package: str) -> InputError:
    return InputError(f"{url}: expected {package}, found none: pip install 'gura-jax[{SCHEMES[scheme(url)]}]'")


@functools.cache
def _client(root: str) -> Any:
    if scheme(root) == "hf":
        try:
            return hub.Repository(root)
        except ModuleNotFoundError:
            raise _no_client(root, "huggingface_hub") from None
    try:
        from obstore.store import from_url
    except ModuleNotFoundError:
        raise _no_client(root, "obstore") from None
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if scheme(root) == "s3" and endpoint and not endpoint.startswith(("http://", "https://")):
        raise InputError("AWS_ENDPOINT_URL: expected http:// or https:// and a host, found neither (not shown)")
    plain = {
        "http": True,
        "s3": endpoint.startswith("http://"),
        "az": bool(os.environ.get("AZURE_STORAGE_USE_EMULATOR")),
    }.get(scheme(root), False)
    return from_url(root, client_options={**CLIENT, "allow_http": plain}, retry_config=RETRIES)  # pyright: ignore


def why(error: BaseException) -> str:
    """Return the reason of a failed request in words, without the server's whole answer."""
    name = type(error).__name__
    if name in _REASONS:
        return _REASONS[name]
    text = re.sub(r"//\S*@", "//", reason(error))  # credentials of an endpoint are not repeated
    if found := re.search(r'invalid path: Path "(.{1,200}?)" contained', text):
        return f"the key {found[1]!r}, with an empty part or a dot, which obstore does not list: rename it"
    for part, words in _KINDS.items():
        if part in text:
            return words
    if status := re.search(r"status code: (\d{3})(?: ([A-Z][A-Za-z ]+))?", text):
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        found = {"404": "no such object or bucket", "403": "access denied"}.get(status[1], status[2] or "")
        return f"HTTP {status[1]}: {code[1] if code else found}" if status[1] not in ("404", "403") else found
    return re.split(r" in [\d.]+[mµn]?s\b|,? after \d+ retries|\.? Debug source|, source:", text)[0][:300]


_KINDS = {
    "Range request not supported": "a web server that serves no ranges of bytes, which are needed: download it",
    "invalid path": "a key with an empty part or a dot, which obstore does not list: rename it",
    "kind: Connect": "no connection to its server: check the network, and the endpoint",
    "kind: Timeout": "no answer in time",
}
_REASONS = {  # obstore has errors of its own, and Python's where there is one
    "NotFoundError": "no such object or bucket",
    "FileNotFoundError": "no such object or bucket",
    "PermissionDeniedError": "access denied: check the credentials",
    "PermissionError": "access denied: check the credentials",
    "UnauthenticatedError": "no valid credentials",
    "PreconditionError": "it was replaced meanwhile",
    "RepositoryNotFoundError": "no such data set, or none that may be read: see HF_TOKEN",
    "GatedRepoError": "access denied: see HF_TOKEN",
    "RevisionNotFoundError": "no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
}


def errors() -> tuple[type[BaseException], ...]:
    """What requests raise; also what the clients raise when the network is not there."""
    try:
        from obstore.exceptions import BaseError
    except ModuleNotFoundError:
        return (OSError, ValueError)
    return (BaseError, OSError, ValueError)  # of a key or URL that it does not take


def open_object(url: str, at: int = 0, version: str | None = None) -> "ObjectFile":
    """Open an object to read it: its first bytes are fetched at once, or those at a place within.

    Args:
        url: of the object.
        at: where reading begins.
        version: that it must have.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is of another version.
    """
    return ObjectFile(locate(url), url, at, version)


def entry(place: Place) -> Entry:
    """Describe an object without reading it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be found out.
    """
    try:
        if isinstance(place.store, hub.Repository):
            return Entry(place.key, place.store.read(place.key, (0, 0))[1], place.store.root)
        meta = _requested(lambda: _obstore().head(place.store, place.key))
        return Entry(place.key, int(meta["size"]), meta.get("e_tag"))
    except errors() as error:
        raise _as_os_error(error, place.key) from None


def read_object(url: str) -> bytes:
    """Return an object's content.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    return get(locate(url))


def get(place: Place) -> bytes:
    """As :func:`read_object`."""
    try:
        return _read(place).content
    except errors() as error:
        raise _as_os_error(error, place.key) from None


def _read(place: Place, span: tuple[int, int] | None = None, version: str | None = None) -> Answer:
    """Read an object, or its bytes from one place to another."""
    if isinstance(place.store, hub.Repository):
        return Answer(*place.store.read(place.key, span), None)  # a revision is a version
    options: dict[str, Any] = {}
    if span is not None:
        options["range"] = span
    if version is not None:
        options["if_match"] = version

    def request() -> Answer:
        answer = _obstore().get(place.store, place.key, options=options)
        meta = answer.meta
        changed = meta["last_modified"]  # 1970: the server does not say it
        modified = changed.isoformat() if changed.timestamp() else None
        return Answer(bytes(answer.bytes()), int(meta["size"]), meta.get("e_tag"), modified)

    return _requested(request)


def put(place: Place, content: Any) -> str | None:
    """Write an object, complete or not at all, by one request, and return its version.

    Raises:
        OSError: it cannot be written.
    """
    try:
        return _put(place, content, "overwrite")
    except errors() as error:
        raise _as_os_error(error, place.key) from None


def create(place: Place, content: Any) -> bool:
    """Write an object if there is none, and say whether, by one request.

    Raises:
        OSError: it cannot be written.
    """
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    try:
        _put(place, content, "create")
    except (FileExistsError, AlreadyExistsError, PreconditionError):
        return False
    except errors() as error:
        raise _as_os_error(error, place.key) from None
    return True


def _put(place: Place, content: Any, mode: str) -> str | None:
    # Never in parts: what a killed process leaves of those is charged for, and seen by nobody.
    answer = _requested(lambda: _obstore().put(place.store, place.key, content, mode=mode, use_multipart=False))
    return answer.get("e_tag")


def delete(place: Place) -> None:
    """Remove an object, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        _requested(lambda: _obstore().delete(place.store, place.key))
    except errors() as error:
        found = _as_os_error(error, place.key)
        if not isinstance(found, FileNotFoundError):
            raise found from None


def entries(place: Place) -> Iterator[Entry]:
    """List the objects below a prefix, at any depth, a page at a time.

    Raises:
        OSError: it cannot be listed.
    """
    last: str | None = None
    attempts = 0
    if isinstance(place.store, hub.Repository):
        try:
            yield from (Entry(*each) for each in place.store.list(place.key))
        except errors() as error:
            raise _as_os_error(error, place.key) from None
        return
    while True:
        try:
            for page in _obstore().list(place.store, place.key or None, offset=last, chunk_size=1000):
                for item in page:
                    last, attempts = item["path"], 0
                    yield Entry(item["path"], item["size"], item.get("e_tag"))
            return
        except errors() as error:
            attempts += 1
            if attempts == ATTEMPTS or not _broke_off(error):
                raise _as_os_error(error, place.key) from None
            _pause(attempts)


def children(place: Place) -> dict[str, int]:
    """The objects right below a prefix, by name, and their sizes.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        found = _requested(lambda: _obstore().list_with_delimiter(place.store, place.key or None))
    except errors() as error:
        raise _as_os_error(error, place.key) from None
    return {item["path"].rsplit("/", 1)[-1]: item["size"] for item in found["objects"]}


def _requested(request: Callable[[], T]) -> T:
    """Make a request again whose answer breaks off, which obstore does only where an object's content does."""
    for attempt in range(1, ATTEMPTS):
        try:
            return request()
        except errors() as error:
            if not _broke_off(error):
                raise
            _pause(attempt)
    return request()


def _broke_off(error: BaseException) -> bool:
    return "body error" in str(error)


def _pause(attempt: int) -> None:
    time.sleep(random.uniform(0, 0.1 * 2**attempt))


def _obstore() -> Any:
    """The module; its functions are looked up in each call."""
    import obstore

    return obstore


def _as_os_error(error: BaseException, key: str) -> OSError:
    missing = isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"
    return FileNotFoundError(2, why(error), key) if missing else OSError(5, why(error), key)


class ObjectFile(PositionedFile):
    """An object as a file that can seek: read in blocks, of which one is held.

    All blocks are of the object that was opened: another one under its name is an error.
    """

    def __init__(self, place: Place, name: str, at: int = 0, version: str | None = None) -> None:
        self.place, self.name = place, name
        try:
            answer = _read(place, (at, at + FIRST_BYTES), version)
        except errors() as error:
            if "status code: 416" not in str(error) or at:
                raise _as_os_error(error, name) from None
            answer, at = Answer(b"", 0, None), 0  # an empty object has no range
        self._start = at
        self._block, self.size, self.version, self.modified = answer
        self._next = BLOCK_BYTES

    def end(self) -> int:
        """The object's size."""
        return self.size

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, unless the object ends before: libsndfile takes less for the end."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self.size:
            own = self._position - self._start
            if not 0 <= own < len(self._block):
                self._fetch(len(view) - done)
                own = self._position - self._start
            part = self._block[own : own + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _fetch(self, wanted: int) -> None:
        """Read a block from here on: more of it each time where reading goes on, little where it jumps."""
        goes_on = self._position == self._start + len(self._block)
        self._next = min(2 * self._next, LARGEST_BLOCK) if goes_on else BLOCK_BYTES
        size = max(wanted, self._next if goes_on else FIRST_BYTES)
        self._start, self._block = self._position, self.range(self._position, min(self._position + size, self.size))

    def range(self, start: int, stop: int) -> bytes:
        """Return the bytes from one place to another, also of a closed file.

        Raises:
            OSError: they cannot be read, or the object was replaced.
        """
        if start >= stop:
            return b""
        try:
            content = _read(self.place, (start, stop), self.version).content
        except errors() as error:
            raise _as_os_error(error, self.name) from None
        if len(content) != stop - start:
            raise OSError(5, f"expected {stop - start} bytes, found {len(content)}", self.name)
        return content


def cannot_write(url: str, error: BaseException) -> StoreError:
    """Return the error for a prefix that cannot be written to."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else why(error)
    return StoreError(
        f"{url}: expected a bucket that can be written to, found: {said}: check its name, the credentials and what "
        "they allow (reading, writing, listing and deleting)"
    )
