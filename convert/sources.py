"""Find PyTorch weights, check them, and read them one tensor at a time.

A source is a Hugging Face hub id, a folder in that layout, a file of weights, or a file inside an installed package.
What the files of each library look like is in the key tables. Files are not trusted: pickles are read with
``weights_only=True``, and no file can name another one outside its own folder.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from gura_jax.convert.keys import Contents, KeyTable, Wrapping
from gura_jax.errors import ConversionError, DownloadError, SystemConfigError
from gura_jax.models.families import PREPROCESSOR, normalises

CONFIG = "config.json"
# In order of preference; the second and fourth list shards.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_MAPPED_BYTES = 256 * 2**20  # pages of a mapped file stay resident until it is closed: re-open it after so many
_JSON_BYTES = 64 * 2**20
_HUB_SECONDS = 30.0
_HDF5 = (".h5", ".hdf5")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", *_HDF5)
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
_SAFETENSORS_DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL")


class Format(NamedTuple):
    """A kind of checkpoint that can be read: a library and one family's key table for it."""

    library: str
    table: KeyTable


class _Inert:
    """Placeholder for a class that a checkpoint names beside its weights: takes anything, does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What is pickled beside weights: arguments, and NumPy numbers among statistics.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]


@dataclass(frozen=True)
class _WeightFile:
    path: Path
    under: tuple[str, ...]  # keys of the outer dicts that the state dict sits under
    shapes: Mapping[str, tuple[int, ...]]
    inert: tuple[str, ...] = ()  # see Wrapping


@dataclass(frozen=True)
class Source:
    """Weights that were opened and checked, but not read yet.

    Attributes:
        formats: those that the weights may be in; they agree on where the config comes from.
        description: hub id and commit, or the name of the folder or file, without its path.
        sha256: file name -> hex digest, of each weight file and the ``config.json`` that was read, sorted by name.
        config: the encoder's config, ``model_type`` included, in the names of ``config.json``; None where the
            source does not say.
        shapes: key -> shape, of every tensor.
        normalise: whether clips are normalised before they are given to the encoder.
    """

    formats: tuple[Format, ...]
    description: str
    sha256: Mapping[str, str]
    config: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    normalise: bool
    _files: tuple[_WeightFile, ...] = field(repr=False)

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Read tensors one at a time, file by file.

        Args:
            keys: which of `shapes` to read; each is yielded once.

        Yields:
            key and array, of the shape that `shapes` names. Every array owns its memory. Floats of any width
            come as float32, integers as they are.

        Raises:
            ConversionError: a key that the source does not have, or a file that changed since it was opened.
        """
        wanted = list(dict.fromkeys(keys))
        unknown = [key for key in wanted if key not in self.shapes]
        if unknown:
            raise ConversionError(_listing(f"{self.description} does not hold these tensors", unknown))
        for file in self._files:
            yield from _read(file, [key for key in wanted if key in file.shapes])


def open_source(spec: str | Path, formats: Iterable[Format], language: str | None = None) -> Source:
    """Open PyTorch weights, check them and hash them, without keeping them in memory.

    Args:
        spec: ``PACKAGE:NAME``, weights inside an installed package that some key table names; a folder or a file;
            or else, where it is text, the hub id ``owner/name``.
        formats: that can be read.
        language: whose adapters take the place of those among the other weights (MMS): of a folder, of the hub, or of
            a file that holds those of several languages.

    Raises:
        ConversionError: nothing there, no network, files that are incomplete, damaged, malicious or of an
            unknown kind, a config that is missing or means another computation. The message lists everything
            wrong.
    """
    try:
        return _open(spec, os.fspath(spec), list(formats), language)
    except OSError as error:
        raise ConversionError(f"cannot read {spec}: {error.strerror or error}") from error


def _open(spec: str | Path, text: str, formats: Sequence[Format], language: str | None) -> Source:
    assets = {name: path for _, table in formats for name, path in table.assets.items()}
    if text.split(":")[0] in {name.split(":")[0] for name in assets}:
        return _open_asset(text, assets, formats)
    place = os.path.expanduser(text)
    if language is not None and not _LANGUAGE.fullmatch(language):
        raise ConversionError(f"language: expected the name of an adapter, such as fra, found {language!r}")
    if os.path.isdir(place):
        return _open_folder(Path(place), Path(place).resolve().name, formats, language)
    if os.path.isfile(place):
        return _open_file(Path(place), Path(place).name, formats, language)
    if isinstance(spec, Path) or text.startswith((".", "/", "~")) or text.endswith(_WEIGHT_SUFFIXES):
        raise ConversionError(f"there is no file or folder {text}")
    try:
        validate_repo_id(text)
        if "/" not in text:
            raise HFValidationError("a model's owner is missing")
    except HFValidationError as error:
        raise ConversionError(
            f"{text!r} is no file or folder, and not a hub id either (expected owner/name, such as "
            f"facebook/hubert-base-ls960), nor one of {_either(assets)}"
        ) from error
    return _open_hub(text, formats, language)


def _either(names: Iterable[str]) -> str:
    """The distinct names: "a, b or c"."""
    *most, last = dict.fromkeys(names)
    return f"{', '.join(most)} or {last}" if most else last


def _listing(title: str, faults: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  - {fault}" for fault in faults)])


def _refuse_if(faults: Sequence[str], description: str) -> None:
    if faults:
        raise ConversionError(_listing(f"cannot convert {description}", faults))


# Where the files are


def _open_asset(name: str, assets: Mapping[str, str], formats: Sequence[Format]) -> Source:
    package = name.split(":")[0]
    if name not in assets:
        published = _either(asset for asset in assets if asset.split(":")[0] == package)
        raise ConversionError(f"{name}: expected {published}, the published weights")
    # Through the distribution's files: importing the package could import anything.
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConversionError(
            f"{name} comes with the package {package}, which is not installed: pip install {package}"
        ) from error
    path = Path(str(distribution.locate_file(assets[name])))
    if not path.is_file():
        raise ConversionError(
            f"the installed {package} {distribution.version} lacks {assets[name].partition('/')[2]}: "
            f"pip install --force-reinstall {package}"
        )
    return _open_file(path, f"{package} {distribution.version} {path.name}", formats, None)


def _open_hub(repo: str, formats: Sequence[Format], language: str | None) -> Source:
    api = HfApi()
    faults: list[str] = []
    try:
        siblings = api.model_info(repo, timeout=_HUB_SECONDS).siblings or []
        names = sorted(sibling.rfilename for sibling in siblings)
        weights = _preferred(names)
        if CONFIG not in names:
            faults.append(f"no {CONFIG}: expected a model in Hugging Face's layout")
        if weights is None:
            faults.append(f"no PyTorch weights: expected {' or '.join(WEIGHTS)}; found {', '.join(names)}")
        _refuse_if(faults, f"{api.endpoint}/{repo}")
        assert weights is not None
        folder = Path(api.hf_hub_download(repo, CONFIG)).parent  # named by the commit
        path = Path(api.hf_hub_download(repo, weights, revision=folder.name))
        _fetch_preprocessor(api, repo, folder.name)
        shards = _shards(path, faults) if weights.endswith(".json") else {}
        faults += [f"{weights} names {name}, which is not there" for name in shards if name not in names]
        _refuse_if(faults, f"{repo}@{folder.name}")
        if language is not None:
            shards[_adapter(language, names, f"{repo}@{folder.name}")] = set()
        for name in shards:
            api.hf_hub_download(repo, name, revision=folder.name)
    except ConversionError:
        raise
    except Exception as error:  # huggingface_hub's version decides which HTTP library's errors arrive
        kind, refusal = _refusal(api.endpoint, repo, error)
        try:
            folder = Path(api.hf_hub_download(repo, CONFIG, local_files_only=True)).parent
            source = _open_folder(folder, f"{repo}@{folder.name}", formats, language)
        except LocalEntryNotFoundError:
            raise kind(refusal) from error
        except ConversionError as fault:
            raise kind(f"{refusal}\nIn the cache there is only a part: {fault}") from error
        _warn_of_no_preprocessor(repo, folder)
        return source
    return _open_folder(folder, f"{repo}@{folder.name}", formats, language)


def read_hub_config(repo: str) -> tuple[dict[str, Any], bool]:
    """The ``config.json`` of a model on the hub, and whether its input is normalised; without a network, of the cache.

    Raises:
        ConversionError: there is none, or it cannot be fetched or read.
    """
    api = HfApi()
    faults: list[str] = []
    try:
        path = Path(api.hf_hub_download(repo, CONFIG))
        try:
            _fetch_preprocessor(api, repo, path.parent.name)
        except LocalEntryNotFoundError:  # no network
            _warn_of_no_preprocessor(repo, path.parent)
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ConversionError(f"{api.endpoint}/{repo} has no {CONFIG}: expected a model in its layout") from error
        kind, refusal = _refusal(api.endpoint, repo, error)
        raise kind(refusal) from error
    content, normalise = _described(path, faults)
    _refuse_if(faults, repo)
    assert content is not None
    return content, normalise


def _described(path: Path, faults: list[str]) -> tuple[dict[str, Any] | None, bool]:
    """A ``config.json``, with the preprocessor's beside it under that file's name; and whether clips are normalised."""
    content, preprocessor = _read_json(path, faults), path.with_name(PREPROCESSOR)
    own = _read_json(preprocessor, faults) if preprocessor.is_file() else None
    if own is None:
        return content, False
    try:
        return None if content is None else {**content, PREPROCESSOR: own}, normalises(own)
    except SystemConfigError as error:
        faults.append(f"{preprocessor.name}: {error}")
        return content, False


def _fetch_preprocessor(api: HfApi, repo: str, commit: str) -> None:
    """Fetch it if there is one; if not, the cache remembers that."""
    try:
        api.hf_hub_download(repo, PREPROCESSOR, revision=commit)
    except LocalEntryNotFoundError:  # no network: one of the next
        raise
    except EntryNotFoundError:
        pass


def _warn_of_no_preprocessor(repo: str, folder: Path) -> None:
    """Say so where the cache does not know if there is one."""
    if try_to_load_from_cache(repo, PREPROCESSOR, revision=folder.name) is None:
        warnings.warn(
            f"{repo}: its {PREPROCESSOR} is not in the cache and cannot be fetched, so its input is taken as it is: "
            "say normalise=True or False of the member, or try again with a network",
            stacklevel=2,
        )


def _refusal(endpoint: str, repo: str, error: BaseException) -> tuple[type[ConversionError], str]:
    """The error to raise, and its message."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:  # "not in the cache either"
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 404:
        return ConversionError, f"{endpoint} has no model {repo}: check the spelling"
    if status in (401, 403):
        return ConversionError, (
            f"{endpoint} does not give access to {repo} (HTTP {status}): it is not there, private, or gated. "
            f"Check the spelling, accept its terms at {endpoint}/{repo}, and log in with: hf auth login"
        )
    return DownloadError, (
        f"cannot download {repo} from {endpoint} ({_first_line(error)}). With a network, run this again: the "
        f"files that arrived whole are kept. Without one, fetch {CONFIG}, {PREPROCESSOR} (if there is one) and "
        "model.safetensors (or else pytorch_model.bin; of a sharded checkpoint the .index.json and every shard that it "
        "names) from "
        f"{endpoint}/{repo}/tree/main on another machine, put them in one folder, and run: "
        "gura-jax convert FOLDER --name NAME"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _preferred(names: Iterable[str]) -> str | None:
    present = set(names)
    return next((name for name in WEIGHTS if name in present), None)


# Folders and files


def _open_folder(folder: Path, description: str, formats: Sequence[Format], language: str | None) -> Source:
    faults: list[str] = []
    config, normalise = _described(folder / CONFIG, faults)
    wrapping = _merged(formats)
    names = sorted(entry.name for entry in folder.iterdir())
    weights = _preferred(names)
    files: list[_WeightFile] = []
    if weights is None:
        found = ", ".join(names) or "nothing"
        faults.append(f"no weights: expected one of {', '.join(WEIGHTS)}; found {found}")
    else:
        files = _open_shards(folder / weights, wrapping, faults) if weights.endswith(".json") else []
        if not weights.endswith(".json") and (opened := _open_weights(folder / weights, wrapping, faults)):
            files = [opened[0]]
    if language is not None:
        adapter = _open_weights(folder / _adapter(language, names, description), wrapping, faults)
        if adapter is not None:
            files = _replaced(files, adapter[0])
            description = _described_with(description, language)
    for file in files:
        if file.under:
            libraries = _either(library for library, _ in _wrapped(file.under, formats))
            place = f"{file.path.name} holds its weights under {file.under[-1]!r}"
            faults.append(f"{place}, as {libraries} does: give the file itself")
    _refuse_if(faults, description)
    fitting = [each for each in formats if each.table.config == CONFIG]
    return _source(fitting, description, files, config, folder / CONFIG, normalise)


_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MAX_NAMED = 20  # languages in an error: MMS has a thousand
_ADAPTER = re.compile(r"adapter\.([A-Za-z0-9_-]+)\.(?:safetensors|bin)")


def _adapter(language: str, names: Iterable[str], description: str) -> str:
    """The file of a language's adapters."""
    found = {match[1]: name for name in sorted(names) if (match := _ADAPTER.fullmatch(name))}
    _refuse_unless(language, found, description)
    return found[language]


def _refuse_unless(language: str | None, found: Iterable[str], description: str) -> None:
    """Refuse a language that there are no adapters of, or none where one must be chosen."""
    languages = sorted(found)
    if language not in languages:
        some = ", ".join(languages[:MAX_NAMED]) or "none"
        raise ConversionError(
            f"{description}: language: expected one that it has adapters of, {some}"
            f"{', ...' if len(languages) > MAX_NAMED else ''}, found {language!r}"
        )


def _replaced(files: Iterable[_WeightFile], adapter: _WeightFile) -> list[_WeightFile]:
    """The files, without the tensors that the last one has."""
    own = adapter.shapes
    return [*(replace(f, shapes={k: v for k, v in f.shapes.items() if k not in own}) for f in files), adapter]


def _described_with(description: str, language: str) -> str:
    return f"{description} with the adapters of {language}"


def _open_shards(index: Path, wrapping: Wrapping, faults: list[str]) -> list[_WeightFile]:
    files: list[_WeightFile] = []
    holder: dict[str, str] = {}  # key -> the shard it was found in
    for name, listed in _shards(index, faults).items():
        path = index.parent / name
        if not path.is_file():
            faults.append(f"{index.name} names {name}, which is not there")
            continue
        opened = _open_weights(path, wrapping, faults)
        if opened is None:
            continue
        files.append(opened[0])
        shapes = opened[0].shapes
        faults += [f"{key} is in both {holder[key]} and {name}" for key in shapes if key in holder]
        holder |= dict.fromkeys(shapes, name)
        faults += [
            f"{index.name} says that {name} holds {key}, but it does not" for key in sorted(listed - shapes.keys())
        ]
        faults += [f"{name} holds {key}, but {index.name} does not say so" for key in sorted(shapes.keys() - listed)]
    return files


def _shards(index: Path, faults: list[str]) -> dict[str, set[str]]:
    """Shard name -> its keys; every name is a plain file name of the index's own format."""
    content = _read_json(index, faults)
    if content is None:
        return {}
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        faults.append(f"{index.name} has no weight_map that names a shard for each tensor")
        return {}
    suffix = ".safetensors" if "safetensors" in index.name else ".bin"
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        shards.setdefault(name if isinstance(name, str) else repr(name), set()).add(key)
    bad = [name for name in shards if not (_SHARD_NAME.fullmatch(name) and name.endswith(suffix))]
    faults += [f"{index.name} names the shard {name!r}: expected a plain *{suffix} file name" for name in bad]
    return {name: keys for name, keys in sorted(shards.items()) if name not in bad}


def _open_file(path: Path, description: str, formats: Sequence[Format], language: str | None) -> Source:
    if path.suffix == ".json":
        raise ConversionError(f"{path.name} holds no weights: give the folder that it is in")
    faults: list[str] = []
    wrapping = _merged(formats)
    opened = _open_weights(path, wrapping, faults)
    if opened is None:
        raise ConversionError(_listing(f"cannot convert {description}", faults))
    file, settings = opened
    files = [file]
    languages = _languages(settings, wrapping)
    if languages:
        _refuse_unless(language, languages, description)
    elif language is not None:
        raise ConversionError(
            f"language {language}: expected a folder or a hub id with a file of its adapters, or a file that holds "
            f"those of several languages, as fairseq's of MMS; found {description}"
        )
    if language is not None:
        place, content = languages[language]
        files = _replaced(files, _weights(path, place, content, wrapping, faults))
        description = _described_with(description, language)
    fitting = _fitting(file, formats)
    config: Mapping[str, Any] | None = None
    normalise = False
    beside = path.with_name(CONFIG)
    if fitting:
        read = fitting[0].table.config
        fitting = [each for each in fitting if each.table.config == read]
        if read == CONFIG:
            config, normalise = _described(beside, faults)
        elif read is not None:
            config = dict(read(Contents(file.shapes, settings), faults))
            normalise = config.pop("do_normalize", False) is True
    elif file.shapes:
        faults.append(_unknown(file, formats))
    _refuse_if(faults, description)
    return _source(fitting, description, files, config, beside, normalise)


def _languages(settings: Mapping[str, Any], wrapping: Wrapping) -> dict[str, tuple[tuple[str, ...], dict[Any, Any]]]:
    """Language -> where in the file its weights are, and what is there."""
    return {
        name: ((holder, name), content)
        for holder in wrapping.languages
        if isinstance(settings.get(holder), dict)
        for name, content in settings[holder].items()
        if isinstance(name, str) and isinstance(content, dict)
    }


def _fitting(file: _WeightFile, formats: Sequence[Format]) -> list[Format]:
    """The formats that a bare file may be in."""
    if file.under:
        wrapped = _wrapped(file.under, formats)
        # If none recognises it: that of the oldest family, which says most of what others are.
        return [each for each in wrapped if each.table.recognises(file.shapes)] or wrapped[::-1]
    return [each for each in formats if not each.table.wrapping and each.table.recognises(file.shapes)]


def _wrapped(under: Sequence[str], formats: Sequence[Format]) -> list[Format]:
    """The formats whose files have an entry of this name that holds the weights."""
    return [each for each in formats if each.table.wrapping and under[-1] in each.table.wrapping.state]


def _merged(formats: Sequence[Format]) -> Wrapping:
    """The names that any of the formats gives to entries of a pickle."""
    wrappings = [table.wrapping for _, table in formats if table.wrapping]
    state, settings, inert, languages = (
        tuple(dict.fromkeys(name for wrapping in wrappings for name in getattr(wrapping, field)))
        for field in ("state", "settings", "inert", "languages")
    )
    nested = "|".join(filter(None, (wrapping.nested for wrapping in wrappings)))
    return Wrapping(state, settings, inert, nested, languages)


def _unknown(file: _WeightFile, formats: Sequence[Format]) -> str:
    for library, table in formats:
        if table.wrapping and table.recognises(file.shapes):
            settings = _either(table.wrapping.settings)
            return f"{library}'s weights without their {settings}: give the checkpoint as {library} wrote it"
    libraries = _either(library for library, table in formats if table.recognise and not table.wrapping)
    some = ", ".join(sorted(file.shapes)[:5])
    return (
        f"not a known kind of weights: expected keys of {libraries}; found {some}, ... "
        f"For another model with a {CONFIG}, give the folder that holds both"
    )


def _source(
    formats: Sequence[Format],
    description: str,
    files: Sequence[_WeightFile],
    config: Mapping[str, Any] | None,
    beside: Path,
    normalise: bool,
) -> Source:
    paths = list(dict.fromkeys(file.path for file in files))
    if formats[0].table.config == CONFIG:
        paths += [path for path in (beside, beside.with_name(PREPROCESSOR)) if path.is_file()]
    sha256: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as stream:
            sha256[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    shapes = {key: shape for file in files for key, shape in file.shapes.items()}
    return Source(tuple(formats), description, sha256, config, shapes, normalise, tuple(files))


def _read_json(path: Path, faults: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        faults.append(f"no {path.name}")
        return None
    if path.stat().st_size > _JSON_BYTES:
        faults.append(f"{path.name} is {path.stat().st_size} bytes long: expected a small JSON file")
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        faults.append(f"{path.name} is not JSON ({error})")
        return None
    if not isinstance(content, dict):
        faults.append(f"{path.name} holds a JSON {type(content).__name__}: expected an object")
        return None
    return content


# One file of weights


def _open_weights(path: Path, wrapping: Wrapping, faults: list[str]) -> tuple[_WeightFile, dict[str, Any]] | None:
    """The file's tensors by name and shape, and the settings that a pickle holds beside them."""
    try:
        if path.suffix == ".safetensors":
            return _open_safetensors(path, faults), {}
        if path.suffix in _HDF5:
            return _open_hdf5(path, faults), {}
        content = _unpickle(path, wrapping.inert)
    except ConversionError as error:
        faults.append(str(error))
        return None
    settings = {key: content[key] for key in (*wrapping.settings, *wrapping.languages) if key in content}
    return _weights(path, (), content, wrapping, faults), settings


def _weights(
    path: Path, place: tuple[str, ...], content: dict[Any, Any], wrapping: Wrapping, faults: list[str]
) -> _WeightFile:
    """The tensors at some place of a pickle, by name and shape."""
    name = next((key for key in wrapping.state if isinstance(content.get(key), dict)), None)
    state = content[name] if name else content
    nested = {k for k, v in state.items() if isinstance(v, dict) and re.fullmatch(wrapping.nested, str(k))}
    state = {key: value for key, value in state.items() if key not in nested}
    shapes: dict[str, tuple[int, ...]] = {}
    size = path.stat().st_size
    for key, value in state.items():
        fault = _tensor_fault(value, size)
        if not isinstance(key, str):
            faults.append(f"{path.name} names an entry {key!r}: expected text")
        elif fault:
            faults.append(f"{path.name}: {key} is {fault}")
        else:
            shapes[key] = tuple(value.shape)
    if not state:
        faults.append(f"{path.name} holds no tensors")
    return _WeightFile(path, (*place, name) if name else place, shapes, wrapping.inert)


def _tensor_fault(value: object, file_bytes: int) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}: expected a tensor"
    if value.is_nested or value.layout != torch.strided:
        return "sparse or nested: expected a dense tensor"
    if value.is_quantized:
        return "quantized: expected a tensor of floats"
    if value.is_meta:
        return "a meta tensor, without values: expected a saved tensor"
    if value.dtype not in _FLOATS + _INTEGERS:
        return f"of {value.dtype}: expected floats of 16, 32 or 64 bits, or integers"
    if value.numel() * value.element_size() > file_bytes:  # an expanded view of a few numbers
        return f"of shape {tuple(value.shape)}, larger than the whole file"
    return None


def _open_safetensors(path: Path, faults: list[str]) -> _WeightFile:
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(key)
                shapes[key] = tuple(tensor.get_shape())
                if tensor.get_dtype() not in _SAFETENSORS_DTYPES:
                    faults.append(
                        f"{path.name}: {key} is of {tensor.get_dtype()}: "
                        "expected floats of 16, 32 or 64 bits, or integers"
                    )
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path.name} is no whole safetensors file ({error}): fetch it again") from error
    if not shapes:
        faults.append(f"{path.name} holds no tensors")
    return _WeightFile(path, (), shapes)


def _open_hdf5(path: Path, faults: list[str]) -> _WeightFile:
    """A file of Keras 2, whose groups repeat the layer's name with a number that differs by file."""
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    with _datasets(path) as datasets:
        for name, dataset in datasets.items():
            key = _keras_key(name)
            if key in names:
                faults.append(f"{path.name}: {names[key]} and {name} are both {key}: expected one of them")
            names[key] = name
            fault = _dataset_fault(dataset)
            if fault:
                faults.append(f"{path.name}: {name} is {fault}")
            else:
                shapes[key] = tuple(dataset.shape)
    if not names:
        faults.append(f"{path.name} holds no tensors")
    return _WeightFile(path, (), shapes)


def _dataset_fault(dataset: Any) -> str | None:
    if dataset.shape is None or dataset.dtype not in (np.float16, np.float32, np.float64):
        return f"of {dataset.dtype}: expected floats of 16, 32 or 64 bits"
    if dataset.external or dataset.is_virtual or dataset.compression or dataset.compression_opts:
        return "compressed, or in other files: expected numbers as they are"
    if dataset.id.get_storage_size() != dataset.size * dataset.dtype.itemsize:  # claimed, and not written
        return f"of shape {tuple(dataset.shape)}, which the file does not hold"
    return None


@contextlib.contextmanager
def _datasets(path: Path) -> Iterator[dict[str, Any]]:
    """The datasets by name, while the file is open; links to other files are not followed."""
    import h5py

    found: dict[str, Any] = {}
    try:
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
            yield found
    except Exception as error:  # a damaged file can raise anything, also when its datasets are looked at
        raise ConversionError(f"{path.name} is no whole HDF5 file ({_first_line(error)}): fetch it again") from error


def _keras_key(name: str) -> str:
    """``conv1/conv1_4/kernel:0`` as ``conv1/kernel:0``."""
    return re.sub(r"^([^/]+)/\1(_\d+)?/", r"\1/", name)


def _read_hdf5(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    with _datasets(path) as datasets:
        names = {_keras_key(name): name for name in datasets}
        for key in keys:
            yield key, np.array(datasets[names[key]], np.float32)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _unpickle(path: Path, inert: Iterable[str]) -> dict[Any, Any]:
    """What torch.save wrote, mapped rather than read where the format allows; nothing in the file is run."""
    zipped = _is_zip(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ConversionError(f"{path.name} is a compressed archive: expected what torch.save writes")
        with torch.serialization.safe_globals([*_SAFE_GLOBALS, *((_Inert, name) for name in inert)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise ConversionError(
                f"{path.name} holds more than tensors: it asks to load {wanted[1]}, which could run code, "
                "so it was not loaded. Where you trust it, save its state_dict() alone, best as safetensors"
            ) from error
        raise ConversionError(f"{path.name} is no whole PyTorch file: fetch it again") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ConversionError(f"{path.name} is no whole PyTorch file ({_first_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path.name} holds a {type(content).__name__}: expected a state dict")
    return content


def _read(file: _WeightFile, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    safetensors = file.path.suffix == ".safetensors"
    try:
        if file.path.suffix in _HDF5:
            yield from _read_hdf5(file.path, keys)
            return
        mapped = safetensors or _is_zip(file.path)
        for chunk in _chunks(keys, file.shapes) if mapped else [keys]:
            if safetensors:
                with safe_open(file.path, framework="pt") as opened:
                    for key in chunk:
                        yield key, _array(opened.get_tensor(key))
            else:
                content = _unpickle(file.path, file.inert)
                state: Any = content
                for name in file.under:
                    state = state[name]
                state = {key: state[key] for key in chunk}
                del content  # an unmapped file's other tensors take memory
                for key in chunk:
                    yield key, _array(state.pop(key))
    except (OSError, RuntimeError, LookupError, SafetensorError) as error:
        raise ConversionError(f"{file.path.name} changed while it was read ({error}): start again") from error


def _chunks(keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for key in keys:
        chunk.append(key)
        size += 4 * math.prod(shapes[key])
        if size >= _MAPPED_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _array(tensor: torch.Tensor) -> np.ndarray:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format).numpy()
