"""The table of named systems, and systems of your own: in Python, or in a TOML or YAML file (:func:`read_system`).

The table is that of the paper's Tables 2 to 6, as the authors' code has them; each also with Base-size encoders.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from gura_jax import checkpoint
from gura_jax.audio import MAX_RATE, MIN_RATE, is_rate
from gura_jax.errors import SystemConfigError, expected
from gura_jax.files import is_folder, recover_folder, write_file
from gura_jax.fusion import COMBINATIONS, SceneOf
from gura_jax.models.encoder import Encoder
from gura_jax.models.families import ENCODERS
from gura_jax.models.layers import Layers

FUSED_SIZE = 1024  # the size of wav2vec 2.0 Large, which members are resampled to along features


@dataclasses.dataclass(frozen=True)
class Member:
    """One encoder of a system.

    Attributes:
        encoder: a name in :data:`ENCODERS`, the path of a checkpoint or of a Hugging Face folder, a hub id, or an
            object: an :class:`Encoder` of your own, whose weights are those that its ``init`` returns.
        layers: for encoders with hidden states, see :func:`gura_jax.models.layers.layer_weights`.
        weights: ``"random"``, or the path of a checkpoint or Hugging Face folder; None: those that
            ``load_model`` is asked for.
        name: its key in ``load_model(weights={...})``; by default the encoder's name.
        scene: its contribution to scene embeddings: the mean of its ``"frames"``, or, if the architecture has one, its
            embedding of the whole clip (``"pooled"``).
        normalise: whether each clip is given zero mean and unit variance first; None: as the encoder was published,
            except the paper's, which were used without.
    """

    encoder: str | Encoder
    layers: Layers = "last"
    weights: str | None = None
    name: str = ""
    scene: SceneOf = "frames"
    normalise: bool | None = None

    def __post_init__(self) -> None:
        for field in ("name", "weights"):
            value = getattr(self, field)
            if not isinstance(value, str) and not (field == "weights" and value is None):
                raise SystemConfigError(f"{field}: expected text, found {value!r}")
        if self.normalise is not None and not isinstance(self.normalise, bool):
            raise SystemConfigError(f"normalise: expected true or false, found {self.normalise!r}")
        if self.scene not in get_args(SceneOf):
            raise SystemConfigError(f"scene: {expected(self.scene, get_args(SceneOf))}")
        if not self.name:
            kind = self.encoder if isinstance(self.encoder, type) else type(self.encoder)
            name = Path(self.encoder).name if isinstance(self.encoder, str) else kind.__name__
            object.__setattr__(self, "name", name)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))


CombinationName = Literal["interleave", "interleave_time", "concatenate", "average"]


@dataclasses.dataclass(frozen=True)
class System:
    """An ensemble: members, and how they are combined.

    Attributes:
        name: written into everything that it embeds.
        members: one or more; the first sets the frame rate, which the others are resampled to.
        combination: a name in :data:`gura_jax.fusion.COMBINATIONS`.
        feature_size: size that each member is resampled to along features; None: as they are.
        scene_groups: a scene embedding is the mean over this many equal runs of frames, one after the other.
        sample_rate: of the audio that it takes, in Hz; None: the highest of its members'. Each clip is resampled once
            for each rate that a member takes.
    """

    name: str
    members: tuple[Member, ...]
    combination: CombinationName = "concatenate"
    feature_size: int | None = None
    scene_groups: int = 1
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise SystemConfigError(f"system name: expected text, found {self.name!r}")
        if not isinstance(self.members, (tuple, list)) or not all(isinstance(m, Member) for m in self.members):
            raise SystemConfigError(
                f"system {self.name!r}: members: expected a tuple of Member, found {self.members!r}"
            )
        object.__setattr__(self, "members", tuple(self.members))
        names = [m.name for m in self.members]
        if not names:
            raise SystemConfigError(f"system {self.name!r}: expected at least one member, found none")
        if len(set(names)) < len(names):
            raise SystemConfigError(
                f"system {self.name!r}: two members are called {max(names, key=names.count)!r}: give each a name"
            )
        if not isinstance(self.combination, str) or self.combination not in COMBINATIONS:
            raise SystemConfigError(f"system {self.name!r}: combination: {expected(self.combination, COMBINATIONS)}")
        for field in ("feature_size", "scene_groups", "sample_rate"):
            value = getattr(self, field)
            if value is None and field != "scene_groups":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SystemConfigError(f"system {self.name!r}: {field}: expected a positive integer, found {value!r}")
        if self.sample_rate is not None and not is_rate(self.sample_rate):
            raise SystemConfigError(
                f"system {self.name!r}: sample_rate: expected from {MIN_RATE} to {MAX_RATE} Hz, found "
                f"{self.sample_rate}"
            )
        how = COMBINATIONS[self.combination]
        frames = how.fixed_frames(len(names))
        if frames is not None and self.scene_groups > frames:
            raise SystemConfigError(
                f"system {self.name!r}: scene_groups: expected at most the {frames} frames of a clip, "
                f"found {self.scene_groups}"
            )
        pooled = [m.name for m in self.members if m.scene == "pooled"]
        if pooled and (self.scene_groups > 1 or not how.linear_scenes):
            raise SystemConfigError(
                f"system {self.name!r}: expected scene_groups = 1 and a combination of members' frames where a scene "
                f"is pooled ({', '.join(pooled)}), found scene_groups = {self.scene_groups} and {self.combination!r}"
            )


def _interleaved(name: str, members: Iterable[Member], **changes: Any) -> System:
    return System(name, tuple(members), "interleave", FUSED_SIZE, **changes)


def _named(systems: Iterable[System]) -> dict[str, System]:
    return {system.name: system for system in systems}


_HUBERT, _WAV2VEC2 = Member("hubert-xlarge"), Member("wav2vec2-large")
_HUBERT_MEAN, _WAV2VEC2_MEAN = Member("hubert-xlarge", "mean"), Member("wav2vec2-large", "mean")
_CREPE = Member("crepe-full")
_LARGE_PAIR = (Member("hubert-large"), _WAV2VEC2)

PUBLISHED: Mapping[str, System] = _named(
    [
        System("hubert_xlarge", (_HUBERT,)),
        System("wav2vec2_large", (_WAV2VEC2,)),
        System("fusion_hubert_xlarge", (_HUBERT_MEAN,)),
        System("fusion_wav2vec2", (_WAV2VEC2_MEAN,)),
        System("avg_hubert_wav2vec2", _LARGE_PAIR, "average"),
        System("cat_hubert_wav2vec2", _LARGE_PAIR, "concatenate"),
        System("avg_hubert_crepe", (_HUBERT, _CREPE), "average", FUSED_SIZE),
        System("avg_xwc", (_HUBERT, _WAV2VEC2, _CREPE), "average", FUSED_SIZE),
        _interleaved("cat_wc", (_WAV2VEC2, _CREPE)),
        _interleaved("cat_xwc", (_HUBERT, _WAV2VEC2, _CREPE)),
        _interleaved("fusion_cat_xwc", (_HUBERT_MEAN, _WAV2VEC2_MEAN, _CREPE)),
        _interleaved("fusion_cat_xwc_time", (_HUBERT_MEAN, _WAV2VEC2_MEAN, _CREPE), scene_groups=5),
        System("crepe", (_CREPE,)),
    ]
)


_BASE_ENCODERS = {
    "hubert-xlarge": "hubert-base",
    "hubert-large": "hubert-base",
    "wav2vec2-large": "wav2vec2-base",
}


def _base(system: System) -> System:
    """The same system with Base-size speech encoders."""
    members = [Member(_BASE_ENCODERS.get(m.name, m.name), m.layers) for m in system.members]
    return dataclasses.replace(system, name=base_name(system.name), members=tuple(members))


def _alone(encoder: str) -> list[System]:
    """The last hidden state of an encoder, and the mean of all."""
    name = encoder.replace("-", "_")
    return [System(name, (Member(encoder),)), System(f"fusion_{name}", (Member(encoder, "mean"),))]


def base_name(name: str) -> str:
    """The name of a published system with Base-size speech encoders."""
    return name.removesuffix("_xlarge").removesuffix("_large") + "_base"


def _both(*encoders: str) -> list[System]:
    return list(itertools.chain.from_iterable(map(_alone, encoders)))


def _pooled(*encoders: str) -> list[System]:
    """Encoders whose scenes are their own embeddings of the clip."""
    return [System(name.replace("-", "_"), (Member(name, scene="pooled"),)) for name in encoders]


_WAVLM_MEAN, _BEATS_MEAN = Member("wavlm-large", "mean"), Member("beats", "mean")

GROUPS: Mapping[str, Mapping[str, System]] = {
    "the paper's": PUBLISHED,
    "the paper's, with smaller encoders": _named(
        _base(system) for system in PUBLISHED.values() if system.name != "crepe"
    ),
    "the baselines of the paper's Table 2": _named(
        _pooled("passt", "panns-cnn14", "wav2clip", "byol-s", "efficientnet-b2")
    ),
    "speech": _named(
        _both(
            "wavlm-base",
            "wavlm-base-plus",
            "wavlm-large",
            "data2vec-audio-large",
            "unispeech-sat-large",
            "wav2vec2-conformer-rel-pos-large",
            "wav2vec2-conformer-rope-large",
            "w2v-bert-2",
            "vq-wav2vec",
            "vq-wav2vec-kmeans",
            "wav2vec-large",
            "tera",
            "whisper-tiny",
            "whisper-base",
            "whisper-small",
            "whisper-medium",
            "whisper-large-v2",
            "whisper-large-v3",
            "whisper-large-v3-turbo",
        )
    ),
    "music": _named(_both("mert-95m", "mert-330m")),
    "general audio": _named(
        [
            *_pooled("ast"),
            System("fusion_ast", (Member("ast", "mean"),)),
            *_both("beats", "dasheng-base", "dasheng-06b", "dasheng-12b"),
        ]
    ),
    "ensembles of today's encoders, not evaluated yet": _named(
        [
            _interleaved("speech_wavlm_hubert", (_WAVLM_MEAN, _HUBERT_MEAN)),
            _interleaved("music_mert_panns_crepe", (Member("mert-330m", "mean"), Member("panns-cnn14"), _CREPE)),
            _interleaved("general_wavlm_beats_crepe", (_WAVLM_MEAN, _BEATS_MEAN, _CREPE)),
        ]
    ),
}
"""The named systems, by what they are for."""

SYSTEMS: dict[str, System] = {name: system for group in GROUPS.values() for name, system in group.items()}


def group_of(name: str) -> str:
    """The group of a named system; those that were added by hand are "others"."""
    return next((group for group, systems in GROUPS.items() if name in systems), "others")


def find_system(system: "str | Path | System", layers: Layers | None = None) -> System:
    """Find a system.

    Args:
        system: a name in :data:`SYSTEMS`; the path of a TOML or YAML file, or of a folder that ``Model.save`` wrote;
            a :class:`System`, which is returned as it is; or one encoder, which becomes a system of one member: a
            name in :data:`ENCODERS`, the path of a checkpoint or of a Hugging Face folder, the name of a checkpoint
            in the checkpoint folder, or a hub id.
        layers: of that one encoder.

    Raises:
        SystemConfigError: an unknown name, a file that describes no system, or layers of a whole system.
    """
    if isinstance(system, (str, Path)) and str(system) and not str(system).strip("./"):
        system = Path(system).resolve()  # such as "."
    found = _described_system(system)
    if found is not None:
        if layers is not None:
            raise SystemConfigError(
                "layers: expected an encoder, such as a checkpoint's path, to choose them of, found the system "
                f"{found.name!r}, whose members have layers of their own"
            )
        return found
    spec = str(system)
    folder = checkpoint.find_folder(spec)
    if spec not in ENCODERS and is_folder(folder) and not any((folder / name).is_file() for name in ENCODER_FILES):
        raise SystemConfigError(
            f"system: expected the folder of a saved model ({checkpoint.SAVED_SYSTEM}), of a checkpoint "
            f"({checkpoint.MANIFEST}) or of a Hugging Face model (config.json), found none of these files in {folder}"
        )
    if spec in ENCODERS or is_folder(folder) or HUB_ID.fullmatch(spec):
        return System(
            Path(spec).resolve().name if is_folder(Path(spec)) else spec,
            (Member(spec, "last" if layers is None else layers),),
        )
    raise SystemConfigError(
        f"system {expected(system, [*SYSTEMS, *ENCODERS])} (or the path of a {', '.join(FILE_SUFFIXES)} file, of a "
        "checkpoint, a saved model or a Hugging Face folder, or a hub id)"
    )


def _described_system(system: "str | Path | System") -> System | None:
    if isinstance(system, System):
        return system
    if not isinstance(system, (str, Path)):
        raise SystemConfigError(f"system: expected a name, a path, or a System, found {system!r}")
    if str(system) in SYSTEMS:
        return SYSTEMS[str(system)]
    path = Path(system)
    with contextlib.suppress(OSError, ValueError):  # text that is no path
        recover_folder(path)
    if is_folder(path) and (path / checkpoint.SAVED_SYSTEM).is_file():
        return read_system(path / checkpoint.SAVED_SYSTEM)
    return read_system(path) if path.suffix in FILE_SUFFIXES and not is_folder(path) else None


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ENCODER_FILES = (checkpoint.MANIFEST, "config.json")  # one of which is in the folder of an encoder
FILE_SUFFIXES = (".toml", ".yaml", ".yml")


def read_system(path: Path) -> System:
    """Read a system from a TOML or YAML file.

    The keys are the fields of :class:`System` and, under ``members``, of :class:`Member`; ``extends`` names a
    system of the table to start from. Relative paths are relative to the file.

    Raises:
        SystemConfigError: the file cannot be read, or holds unknown keys or values.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            content = tomllib.loads(text)
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise SystemConfigError(f"system file {path} cannot be read: {error}") from None
    except Exception as error:  # each parser has errors of its own
        raise SystemConfigError(f"system file {path} is not valid {path.suffix[1:].upper()}: {error}") from None
    try:
        return _system_from_dict(content, path)
    except (SystemConfigError, TypeError) as error:
        raise SystemConfigError(f"system file {path}: {error}") from None


def write_system(system: System, path: Path) -> None:
    """Write a system as a TOML file that :func:`read_system` reads.

    Raises:
        SystemConfigError: a member is a Python object.
        StoreError: the file cannot be written.
    """
    objects = [m.name for m in system.members if not isinstance(m.encoder, str)]
    if objects:
        raise SystemConfigError(f"member {objects[0]!r} is a Python object: expected an encoder by name or path")
    lines = _toml_lines(system)
    for member in system.members:
        lines += ["", "[[members]]", *_toml_lines(member)]
    write_file(path.parent, path.name, ("\n".join(lines) + "\n").encode())


def _toml_lines(item: System | Member) -> list[str]:
    """Fields whose values are text, numbers or lists of numbers, which TOML writes as JSON does; paths are absolute."""
    names = [field.name for field in dataclasses.fields(item) if field.name != "members"]
    values = {name: getattr(item, name) for name in names}
    for name in ("encoder", "weights"):
        value = values.get(name)
        if value is not None and value not in ENCODERS and is_folder(Path(value)):
            values[name] = str(Path(value).resolve())
    return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]


def _system_from_dict(content: Any, path: Path) -> System:
    if not isinstance(content, dict):
        raise SystemConfigError("expected keys and values at the top level")
    fields: dict[str, Any] = {"name": path.stem} | _known_keys(content, System, "extends")
    base = fields.pop("extends", None)
    if "members" in fields:
        if not isinstance(fields["members"], list):
            raise SystemConfigError("members: expected a list of tables ([[members]])")
        members = []
        for i, member in enumerate(fields["members"]):
            try:
                members.append(_member_from_dict(member, path.parent))
            except SystemConfigError as error:
                raise SystemConfigError(f"members[{i}]: {error}") from None
        fields["members"] = tuple(members)
    elif base is None:
        raise SystemConfigError("expected members, or extends with the name of a system")
    if base is None:
        return System(**fields)
    if not isinstance(base, str) or base not in SYSTEMS:
        raise SystemConfigError(f"extends: {expected(base, SYSTEMS)}")
    return dataclasses.replace(SYSTEMS[base], **fields)


def _member_from_dict(content: Any, folder: Path) -> Member:
    if not isinstance(content, dict) or not content.get("encoder") or not isinstance(content["encoder"], str):
        raise SystemConfigError("each member needs an encoder, by name or path")
    fields = _known_keys(content, Member)
    for key, names in (("encoder", ENCODERS), ("weights", ("pretrained", "random"))):
        value = fields.get(key)
        if isinstance(value, str) and value not in names and is_folder(folder / value):
            fields[key] = str(folder / value)
        elif isinstance(value, str) and value.startswith("./"):  # beside the file, and nowhere else
            raise SystemConfigError(f"{key}: expected a folder at {folder / value}, found none")
    return Member(**fields)


def _known_keys(content: Mapping[str, Any], kind: type[System | Member], *more: str) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(kind)] + list(more)
    unknown = [key for key in content if key not in known]
    if unknown:
        raise SystemConfigError("; ".join(f"key {expected(key, known)}" for key in unknown))
    return dict(content)
