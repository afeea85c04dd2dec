"""The tables of encoder families and of named encoders; families from outside the package are registered here."""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

import jax

from gura_jax.errors import SystemConfigError, expected
from gura_jax.models.ast import AST_FAMILY
from gura_jax.models.beats import BEATS
from gura_jax.models.byols import BYOLS
from gura_jax.models.checks import check_family, check_row, config_of
from gura_jax.models.crepe import CREPE
from gura_jax.models.dasheng import DASHENG
from gura_jax.models.data2vec import DATA2VEC
from gura_jax.models.efficientnet import EFFICIENTNET
from gura_jax.models.encoder import Encoder, Family, Options, Preset
from gura_jax.models.mert import MERT
from gura_jax.models.mms import MMS_FAMILY
from gura_jax.models.panns import PANNS
from gura_jax.models.passt import PASST
from gura_jax.models.tera import TERA
from gura_jax.models.vq_wav2vec import VQ_WAV2VEC
from gura_jax.models.w2v_bert import W2V_BERT
from gura_jax.models.wav2clip import WAV2CLIP
from gura_jax.models.wav2vec2 import HUBERT, UNISPEECH, UNISPEECH_SAT, WAV2VEC2
from gura_jax.models.wav2vec2_conformer import WAV2VEC2_CONFORMER
from gura_jax.models.wavlm import WAVLM
from gura_jax.models.whisper import WHISPER

_WAVES = (HUBERT, WAV2VEC2, UNISPEECH, UNISPEECH_SAT, MMS_FAMILY, WAVLM, DATA2VEC, MERT, WAV2VEC2_CONFORMER, VQ_WAV2VEC)
_SPECTROGRAMS = (W2V_BERT, WHISPER, AST_FAMILY, BEATS, DASHENG, PASST, PANNS, BYOLS, EFFICIENTNET, WAV2CLIP, TERA)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_WAVES, *_SPECTROGRAMS, CREPE)}
ENCODERS: dict[str, Preset] = {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}


PREPROCESSOR = "preprocessor_config.json"  # beside a config.json


def find_family(model_type: object) -> Family:
    """The family of this name.

    Raises:
        SystemConfigError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SystemConfigError(
            f"model_type {model_type!r} is not known; expected one of {', '.join(FAMILIES)} (gura_jax.register adds a "
            "family of your own)"
        )
    return FAMILIES[model_type]


def find_preset(name: str) -> Preset:
    """The named encoder of this name.

    Raises:
        SystemConfigError: there is none, or it is no :class:`Preset`.
    """
    if name not in ENCODERS:
        raise SystemConfigError(f"encoder {expected(name, ENCODERS)}")
    preset = ENCODERS[name]
    if not isinstance(preset, Preset):
        raise SystemConfigError(f"ENCODERS[{name!r}]: expected a gura_jax.Preset(config, source), found {preset!r}")
    return preset


def config_from_source(content: Mapping[str, Any]) -> Any:
    """The config that a ``config.json`` describes, of the family that its ``model_type`` names.

    Args:
        content: of the file; the content of a ``preprocessor_config.json`` may be under that name.

    Raises:
        SystemConfigError: a family that is not known, or a config that it does not support.
    """
    model_type = content.get("model_type")
    kind = find_family(model_type).config
    for (own, attribute), relative in getattr(kind, "relatives", {}).items():
        if own == model_type and content.get(attribute) is not None:
            kind = find_family(relative).config
    preprocessor = content.get(PREPROCESSOR, {})
    more = {name: preprocessor[name] for name in getattr(kind, "preprocessor", ()) if name in preprocessor}
    try:
        return kind.from_source({k: v for k, v in content.items() if k != PREPROCESSOR} | more)
    except (TypeError, LookupError, AttributeError) as error:
        raise SystemConfigError(
            f"its config makes no {kind.__name__} of the family {model_type!r}: {type(error).__name__}: {error}"
        ) from None


def normalises(preprocessor: Mapping[str, Any]) -> bool:
    """Whether the input is normalised, by a ``preprocessor_config.json``, in which this is the default.

    Raises:
        SystemConfigError: it says neither true nor false.
    """
    if preprocessor.get("feature_extractor_type", "Wav2Vec2FeatureExtractor") != "Wav2Vec2FeatureExtractor":
        return False
    found = preprocessor.get("do_normalize", True)
    if not isinstance(found, bool):
        raise SystemConfigError(f"do_normalize: expected true or false, found {found!r}")
    return found


def build_encoder(config: Any, options: Options) -> Encoder:
    """The encoder of a config.

    Raises:
        SystemConfigError: a config of no known family, or options that its family does not have.
    """
    return find_family(getattr(config, "model_type", None)).build(config, options)


def build_encoders(config: Any, options: Options, scene: str) -> tuple[Encoder, Encoder]:
    """A member's encoder, and the one whose frames are averaged into scenes; the same where those are its frames.

    Args:
        config: of a known family.
        options: of the first one.
        scene: what the member's scenes are made of, ``"frames"`` or ``"pooled"``.

    Raises:
        SystemConfigError: see :func:`build_encoder`.
    """
    encoder = build_encoder(config, options)
    hop = find_family(config.model_type).scene_hop
    if hop is None or scene != "frames":
        return encoder, encoder
    return encoder, build_encoder(config, dataclasses.replace(options, hop=hop))


def config_from_dict(fields: Mapping[str, Any]) -> Any:
    """The inverse of ``dataclasses.asdict`` on a config.

    Raises:
        SystemConfigError: a family that is not known, unknown or missing fields, or values that no config has.
    """
    return config_of(find_family(fields.get("model_type")), fields)


def abstract_params(config: Any) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every weight in a checkpoint of this config, by dotted path."""
    return build_encoder(config, Options()).abstract_params()


def register(family: Family) -> None:
    """Add a family: systems, ``convert``, ``embed``, ``parity``, ``evaluate`` and the HEAR modules then know it.

    A tiny encoder of it, with random weights, is built and run first: alone and padded, its results must agree.

    Raises:
        SystemConfigError: the name or a preset's name is taken, or the encoder does not keep what
            :class:`gura_jax.Encoder` promises; says what was expected and found.
    """
    check_row(family)
    if family.name in FAMILIES:
        raise SystemConfigError(f"family {family.name!r}: expected a name that is free, found it registered")
    taken = sorted(set(family.presets) & set(ENCODERS))
    if taken:
        raise SystemConfigError(
            f"family {family.name!r}: expected names of encoders that are free, found {', '.join(taken)}"
        )
    check_family(family)
    FAMILIES[family.name] = family
    ENCODERS.update(family.presets)


MODULES_VARIABLE = "GURA_JAX_FAMILIES"  # names of modules that register families, separated by commas


def import_families() -> None:
    """Import the modules that ``GURA_JAX_FAMILIES`` names, which register families of their own.

    For the command line, the HEAR modules and workers on other hosts; in Python, import them yourself.

    Raises:
        SystemConfigError: one cannot be imported.
    """
    for name in filter(None, os.environ.get(MODULES_VARIABLE, "").replace(" ", "").split(",")):
        try:
            importlib.import_module(name)
        except SystemConfigError:
            raise
        except Exception as error:  # its own code runs
            raise SystemConfigError(
                f"{MODULES_VARIABLE}: expected modules to import, found that {name} raises {type(error).__name__}: "
                f"{error} (PYTHONPATH says where modules are)"
            ) from error
