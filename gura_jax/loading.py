"""``load_model``: from a system's description to encoders and weights on the devices."""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import Mesh, NamedSharding

from gura_jax import checkpoint, parallel
from gura_jax.backend import Platform, find_platform, platform_of
from gura_jax.errors import CheckpointError, InputError, SystemConfigError, expected
from gura_jax.files import is_folder, read_json
from gura_jax.fusion import FusedMember, Fusion
from gura_jax.model import Model
from gura_jax.models.checks import check_encoder, check_traced, initial_params
from gura_jax.models.encoder import DTypeName, Options, Remat
from gura_jax.models.families import (
    ENCODERS,
    PREPROCESSOR,
    build_encoders,
    config_from_source,
    find_preset,
    normalises,
)
from gura_jax.models.layers import Layers
from gura_jax.systems import HUB_ID, Member, System, find_system

Weights = Literal["pretrained", "random"] | Mapping[str, str | Path]
"""Of a system's members: see :func:`load_model`."""

Size = Literal["tiny"]


def load_model(
    system: str | Path | System,
    *,
    layers: Layers | None = None,
    weights: Weights = "pretrained",
    size: Size | None = None,
    seed: int = 0,
    parallel_by: parallel.Parallel = "jit",
    devices: Sequence[Any] | None = None,
    mesh: Mesh | None = None,
    shard: parallel.Shard | None = None,
    dtype: DTypeName = "float32",
    precision: parallel.Precision = "highest",
    platform: str | None = None,
    remat: Remat | None = None,
) -> Model:
    """Load a system.

    Args:
        system: a name (see ``gura-jax systems``); the path of a TOML or YAML file, or of a folder that ``Model.save``
            wrote; a :class:`System`; or one encoder: a name in :data:`ENCODERS`, the path of a checkpoint or of a
            Hugging Face folder, or a hub id.
        layers: of that one encoder, see :func:`gura_jax.models.layers.layer_weights`; by default the last.
        weights: ``"pretrained"``, from the checkpoint folder; ``"random"``, for trying out; or for some members,
            by name, either of these or the path of a checkpoint or of PyTorch weights that
            :func:`gura_jax.convert.convert` takes.
        size: ``"tiny"`` puts a small encoder of the same kind in the place of each, with random weights.
        seed: of random weights; of each member also by its name.
        parallel_by: ``"jit"`` or ``"pmap"``, over ``devices``.
        devices: by default all local ones.
        mesh: instead of ``devices``: batches are divided along its axis ``data``; it may be that of several processes,
            of which each then gives rows of its own.
        shard: how weights are divided: ``"fsdp"`` along ``data``, ``"tensor"`` along the mesh's axis ``model``; None:
            each device has a copy.
        dtype: of convolutions and matrix products; norms, softmax and sums, and what comes out, are float32. On a
            CPU CREPE stays in float32.
        precision: of float32 products: ``"highest"``, or ``"default"``, which is TF32 on a GPU and bfloat16 on a TPU.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``: whose sizes and forms to compute by; by default the devices'.
        remat: ``"layers"``: a gradient computes what lies within a layer or a block of frames again, instead of
            keeping it.

    Raises:
        SystemConfigError: an unknown system, member, encoder or platform.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    described = find_system(system, layers)
    if parallel_by not in get_args(parallel.Parallel):
        raise SystemConfigError(f"parallel_by: {expected(parallel_by, get_args(parallel.Parallel))}")
    if devices is not None:
        devices = list(devices)
        if not devices:
            raise SystemConfigError("devices: expected at least one, found none")
        if not all(isinstance(device, jax.Device) for device in devices) or len(set(devices)) < len(devices):
            raise SystemConfigError(f"devices: expected devices that differ, as of jax.devices(), found {devices!r}")
    if not isinstance(seed, int):
        raise SystemConfigError(f"seed: expected an integer, found {seed!r}")
    for option, value, choices in (
        ("dtype", dtype, get_args(DTypeName)),
        ("precision", precision, get_args(parallel.Precision)),
        ("remat", remat, (None, *get_args(Remat))),
        ("shard", shard, (None, *get_args(parallel.Shard))),
    ):
        if value not in choices:
            raise SystemConfigError(f"{option}: {expected(value, filter(None, choices))}")
    if size not in (None, "tiny"):
        raise SystemConfigError(f"size: expected 'tiny' or None, found {size!r}")
    chosen = member_weights(described, weights)
    if mesh is not None and devices is not None:
        raise SystemConfigError("devices, mesh: expected one of them, found both")
    mesh = parallel.check_mesh(parallel.make_mesh(devices) if mesh is None else mesh, parallel_by, shard)
    row = platform_of(mesh.devices.flat) if platform is None else find_platform(platform)
    fusion = _build_system(described, size, dtype, row, remat)
    params, sources = {}, {}
    for member, built in zip(described.members, fusion.members, strict=True):
        abstract = built.encoder.abstract_params()
        shardings = parallel.weight_shardings(built.encoder, abstract, mesh, shard)
        loaded = _load_weights(member, built, chosen[member.name], size, seed, shardings)
        params[member.name], sources[member.name] = loaded.params, loaded.source
    compilation = parallel.Compilation(mesh, parallel_by, precision, shard)
    return Model(described, fusion, params, sources, compilation, dtype, row)


def outline(
    system: str | Path | System,
    *,
    size: Size | None = None,
    platform: str | None = None,
    dtype: DTypeName = "float32",
    devices: Sequence[Any] | None = None,
    shard: parallel.Shard | None = None,
    remat: Remat | None = None,
) -> Model:
    """A model without weights, for its sizes and for compiling: nothing is loaded, and it embeds nothing.

    Raises:
        SystemConfigError: an unknown system, member, encoder or platform.
    """
    described = find_system(system)
    mesh = parallel.make_mesh(devices)
    row = platform_of(mesh.devices.flat) if platform is None else find_platform(platform)
    fusion = _build_system(described, size, dtype, row, remat)
    return Model(described, fusion, {}, {}, parallel.Compilation(mesh, shard=shard), dtype, row)


def member_weights(system: System, weights: Weights) -> dict[str, str]:
    """Where the weights of each member are to come from: ``"pretrained"``, ``"random"``, or a path.

    Raises:
        SystemConfigError: weights of members that there are not, or no weights.
    """
    names = [m.name for m in system.members]
    if isinstance(weights, Mapping):
        chosen = dict(weights)
        for name, value in chosen.items():
            if name not in names:
                raise SystemConfigError(f"weights: member {expected(name, names)}")
            if not isinstance(value, (str, Path)):
                raise SystemConfigError(
                    f"weights: member {name!r}: expected 'pretrained', 'random' or a path, found {value!r}"
                )
    elif weights in ("pretrained", "random"):
        chosen = {m.name: weights for m in system.members if m.weights is None}
    else:
        raise SystemConfigError(
            f"weights: expected 'pretrained', 'random' or a mapping from member to path, found {weights!r}"
        )
    return {m.name: str(chosen.get(m.name, m.weights or "pretrained")) for m in system.members}


def _build_system(
    system: System, size: Size | None, dtype: DTypeName, platform: Platform, remat: Remat | None = None
) -> Fusion:
    """A system's encoders and how they are combined, without weights."""
    members = tuple(_build(member, size, dtype, platform, remat) for member in system.members)
    return Fusion(members, system.combination, system.feature_size, system.scene_groups)


def _build(member: Member, size: Size | None, dtype: DTypeName, platform: Platform, remat: Remat | None) -> FusedMember:
    """A member's encoders, without weights."""
    where = f"member {member.name!r}"
    options = Options(member.layers, dtype, platform=platform, remat=remat)
    if isinstance(member.encoder, str):
        _, config, published = find_encoder(member.encoder)
        normalise = published if member.normalise is None else member.normalise
        options = dataclasses.replace(options, normalise=normalise)
        config = config.tiny() if size == "tiny" else config
        encoder, scenes = build_encoders(config, options, member.scene)
    else:
        if isinstance(member.encoder, type):
            raise SystemConfigError(
                f"{where}: expected an encoder, by name, by path, or as an object (see gura_jax.Encoder), found the "
                f"class {member.encoder.__qualname__}"
            )
        if member.normalise:
            raise SystemConfigError(f"{where}: normalise: an encoder that is an object does so itself, if at all")
        config, encoder, scenes = None, member.encoder, member.encoder
        check_encoder(encoder, where)
    if member.scene == "pooled" and not encoder.pooled_size:
        raise SystemConfigError(
            f"{where}: scene: expected 'frames', as it has no embedding of the whole clip, found 'pooled'"
        )
    return FusedMember(member.name, encoder, scenes, member.scene, config, options)


class _Loaded(NamedTuple):
    params: Any
    source: Mapping[str, Any]


def _load_weights(
    member: Member,
    built: FusedMember,
    weights: str,
    size: Size | None,
    seed: int,
    shardings: dict[str, NamedSharding],
) -> _Loaded:
    encoder = built.encoder
    # By name, so that a member has the same random weights in every system.
    key = jax.random.key((seed + zlib.crc32(member.name.encode())) % 2**32)
    if not isinstance(member.encoder, str):
        if weights not in ("pretrained", "random"):
            raise SystemConfigError(f"member {member.name!r} brings its own weights: {weights} is of no use to it")
        params = encoder.prepare(_place(initial_params(encoder, key, f"member {member.name!r}"), shardings))
        check_traced(encoder, params, f"member {member.name!r}")
        return _Loaded(params, {"source": f"given as {type(member.encoder).__qualname__}"})
    if weights == "random":
        params = _place(encoder.init(key), shardings)
        return _Loaded(encoder.prepare(params), {"source": "random", "seed": seed})
    if size == "tiny" and built.config != find_encoder(member.encoder).config:
        raise SystemConfigError(
            f"member {member.name!r}: size='tiny' has random weights only: pass weights='random' "
            "(--weights random on the command line)"
        )
    where = find_weights(member, weights)
    if isinstance(where, str) or where.is_file() or is_hugging_face(where):
        from gura_jax.convert import convert

        arrays, manifest = convert(where)
        checkpoint.check_architecture(member.name, built.config, manifest.architecture, str(where))
        params = _place(arrays, shardings)
    else:
        manifest = checkpoint.read_manifest(where)
        checkpoint.check_architecture(member.name, built.config, manifest.architecture, str(where))
        params = checkpoint.load(where, encoder.abstract_params(), shardings)
    return _Loaded(encoder.prepare(params), {"source": manifest.source, "fingerprint": manifest.fingerprint})


def _place(params: Any, shardings: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """Put weights on their devices, one by one, so that there are never two copies of all of them."""
    params = dict(params)
    return {name: jax.device_put(params.pop(name), shardings[name]) for name in list(params)}


def find_weights(member: Member, weights: str) -> Path | str:
    """Where the weights of a member are: the path of a checkpoint or of PyTorch weights, or a hub id.

    Args:
        member: its encoder is a name, a path or a hub id.
        weights: ``"pretrained"`` or a path.

    Raises:
        CheckpointError: there are none.
    """
    home = find_home(str(member.encoder))
    if weights != "pretrained" and os.path.isfile(weights):
        return Path(weights)
    if weights == "pretrained" and isinstance(home, str):
        return home
    folder = Path(home) if weights == "pretrained" else checkpoint.find_folder(weights)
    if is_folder(folder):
        return folder
    if weights == "pretrained":
        raise CheckpointError(_how_to_get(str(member.encoder), folder))
    raise CheckpointError(
        f"member {member.name!r}: expected a checkpoint, or a folder or file of PyTorch weights, at {weights}"
    )


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's, and not a checkpoint."""
    return (folder / "config.json").is_file() and not (folder / checkpoint.MANIFEST).is_file()


class Found(NamedTuple):
    """An encoder that was named: where its weights are or would be, and its config."""

    home: Path | str  # a folder, or a hub id
    config: Any
    normalise: bool  # its input, unless a member says otherwise


def find_home(encoder: str) -> Path | str:
    """Find where the weights of a registered encoder are or would be, or of one in a folder or on the hub (its id).

    Raises:
        SystemConfigError: there is none.
    """
    if encoder in ENCODERS:
        return checkpoint.checkpoint_folder() / encoder
    folder = checkpoint.find_folder(encoder)
    if is_folder(folder):
        return folder
    if HUB_ID.fullmatch(encoder):
        folder = checkpoint.checkpoint_folder() / encoder.replace("/", "--")  # as gura-jax convert names it
        return folder if is_folder(folder) else encoder
    raise SystemConfigError(
        f"encoder {expected(encoder, ENCODERS)} (or the path of a folder, a checkpoint's name in "
        f"{checkpoint.checkpoint_folder()}, or a hub id)"
    )


def find_encoder(encoder: str) -> Found:
    """Find a registered encoder, or one in a folder or on the hub, and read its config.

    Raises:
        SystemConfigError: there is none, or its config is not supported.
        ConversionError: it is on the hub, and cannot be downloaded.
    """
    folder = find_home(encoder)
    if encoder in ENCODERS:
        preset = find_preset(encoder)
        return Found(folder, preset.config, preset.normalise)
    if isinstance(folder, str):
        from gura_jax.convert import read_config

        return Found(folder, *read_config(folder))
    if not is_hugging_face(folder):
        manifest = checkpoint.read_manifest(folder)
        return Found(folder, manifest.architecture, manifest.normalise)
    path = folder / PREPROCESSOR
    preprocessor = _read_object(path, dict) if path.is_file() else {}
    normalise = path.is_file() and _read_object(path, normalises)
    read = lambda content: config_from_source({**content, PREPROCESSOR: preprocessor})  # noqa: E731
    return Found(folder, _read_object(folder / "config.json", read), normalise)


def _read_object(path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What a function makes of a JSON object in a file; its errors say which file."""
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise SystemConfigError(f"expected an object, found {type(content).__name__}")
        return read(content)
    except SystemConfigError as error:
        raise SystemConfigError(f"{path}: {error}") from None
    except InputError as error:
        raise SystemConfigError(str(error)) from None


def _how_to_get(encoder: str, folder: Path) -> str:
    if encoder in ENCODERS and find_preset(encoder).source is None:
        return f"no weights of {encoder} can be fetched by name: pass weights='random', or the path of a file of them"
    return (
        f"no pretrained weights of {encoder} at {folder}. Run\n    gura-jax convert {encoder}\n"
        "or pass weights='random' (--weights random) to try things out without them"
    )
