"""models/families.py: the table of families, what a registered one can do, pooled scenes, members of other rates."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import precise_jit, relative, speech
from refusals import refuses

from gura_jax import (
    ENCODERS,
    FAMILIES,
    Encoder,
    Family,
    FrameGrid,
    Member,
    Model,
    Options,
    Output,
    Preset,
    System,
    SystemConfigError,
    checkpoint,
    load_model,
    register,
)
from gura_jax.audio import resample
from gura_jax.loading import find_encoder, outline
from gura_jax.models.encoder import frame_mask, masked_mean
from gura_jax.models.families import (
    build_encoder,
    check_family,
    config_from_dict,
    config_from_source,
    find_family,
)
from gura_jax.models.wav2vec2 import Wav2Vec2Encoder

SAME_BOUND = 1e-5  # relative: a clip alone or in any batch
RATE = 16_000
HOP = 320


def load(system: Any, **options: Any) -> Model:
    return load_model(system, devices=jax.local_devices()[:1], **{"weights": "random", **options})


def clips(*lengths: int) -> list[np.ndarray]:
    return [speech(n, seed=n) for n in lengths]


# The table


# Almost HuBERT's network; and those that take long, which are beside their references in a padded batch elsewhere.
SAME_NETWORK = (
    *("wav2vec2", "mms", "unispeech", "unispeech-sat", "mert_model", "data2vec-audio"),
    *("wavlm", "passt", "panns_cnn14", "efficientnet_b2", "wav2clip"),
    *("audio-spectrogram-transformer", "beats", "dasheng"),
    *("wav2vec2-conformer", "wav2vec2-bert", "vq-wav2vec", "tera"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SAME_NETWORK else name for name in FAMILIES]
)
def test_families_keep_what_an_encoder_promises(name: str) -> None:
    """As one that is registered from outside must."""
    check_family(FAMILIES[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_configs_survive_a_manifest(name: str) -> None:
    config = ENCODERS[name].config
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_unknown_families() -> None:
    for model_type in ("bert", None, ["hubert"], ""):
        with refuses(SystemConfigError, f"model_type {model_type!r} is not known", "gura_jax.register"):
            find_family(model_type)
        with refuses(SystemConfigError, f"{model_type!r}", "hubert, wav2vec2, unispeech", "gura_jax.register"):
            config_from_source({"model_type": model_type})
    with refuses(SystemConfigError, "model_type", "None", "gura_jax.register"):
        build_encoder(object(), Options())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "crepe"}, "capacity"),
        ({"model_type": "crepe", "capacity": "tiny", "depth": 3}, "depth"),
        ({"model_type": "crepe", "capacity": "huge"}, "found 'huge'"),
        ({"model_type": "hubert", "hidden_size": "768"}, "hidden_size: expected a positive integer"),
    ],
)
def test_fields_that_make_no_config(fields: Mapping[str, Any], words: str) -> None:
    with refuses(SystemConfigError, words):
        config_from_dict(fields)


# A family from outside


@dataclasses.dataclass(frozen=True)
class LoudnessConfig:
    model_type: str = "loudness"
    size: int = 4
    pooled: int = 3

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> "LoudnessConfig":
        return cls(**config)

    def tiny(self) -> "LoudnessConfig":
        return dataclasses.replace(self, size=2)


class Loudness(Encoder):
    """Root mean square of every 20 ms, scaled; pooled: powers of its mean, scaled."""

    sample_rate = RATE

    def __init__(self, config: LoudnessConfig, options: Options) -> None:
        self.config, self.feature_size, self.pooled_size = config, config.size, config.pooled
        self.grid = FrameGrid(HOP, HOP / 2, HOP)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        return {"scale": 1 + jax.random.uniform(key, (self.config.size,)), "pooled.scale": jnp.full((), 2.0)}

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        T, counts = self.grid.count(audio.shape[1]), self.grid.count(lengths)
        rms = jnp.sqrt(jnp.square(audio[:, : T * HOP].reshape(-1, T, HOP)).mean(axis=-1, keepdims=True) + 1e-6)
        if not self.pooled_size:
            return Output(rms * params["scale"][None, None, :], counts)
        mean = masked_mean(rms, frame_mask(counts, T))
        pooled = params["pooled.scale"] * mean ** np.arange(1, self.pooled_size + 1, dtype=np.float32)[None, :]
        return Output(rms * params["scale"][None, None, :], counts, pooled)


LOUDNESS = Family("loudness", LoudnessConfig, Loudness, presets={"loud": Preset(LoudnessConfig())})


@pytest.fixture
def loudness() -> Iterator[None]:
    before = dict(FAMILIES), dict(ENCODERS)
    register(LOUDNESS)
    yield
    for table, rows in zip((FAMILIES, ENCODERS), before, strict=True):
        table.clear()
        table.update(rows)  # pyright: ignore[reportCallIssue, reportArgumentType] - each its own rows


def rms(clip: np.ndarray) -> np.ndarray:
    """[T, 1] float64."""
    blocks = clip[: len(clip) // HOP * HOP].reshape(-1, HOP).astype(np.float64)
    return np.sqrt(np.square(blocks).mean(axis=1, keepdims=True) + 1e-6)


def by_hand(model: Model, member: str, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its frames and its pooled output."""
    params = model.params[member]
    pooled = float(params["pooled.scale"]) * rms(clip).mean() ** np.arange(1.0, 4.0)
    return rms(clip) * np.asarray(params["scale"], np.float64), pooled


@pytest.mark.usefixtures("loudness")
def test_a_registered_family_is_an_encoder_like_any_other(tmp_path: Path) -> None:
    """By its preset's name, in a system, tiny, without weights, and by the path of what was saved."""
    assert find_encoder("loud").config == LoudnessConfig()
    assert outline("loud").timestamp_embedding_size == 4
    assert load("loud", size="tiny").timestamp_embedding_size == 2
    alone = load("loud")
    fused = load(System("mine", (Member("crepe-tiny"), Member("loud")), "interleave", 4))
    (clip,) = clips(3300)
    frames, times = alone.timestamp_embeddings([clip])
    assert relative(frames[0], by_hand(alone, "loud", clip)[0]) < SAME_BOUND
    np.testing.assert_allclose(times[0], 10 + 20 * np.arange(10))
    assert fused.timestamp_embeddings([clip])[0][0].shape == (5, 8)
    fused.save(tmp_path / "fused")
    again = load(tmp_path / "fused", weights="pretrained")
    jax.tree.map(np.testing.assert_array_equal, again.params, fused.params)
    assert again.fusion.members[1].config == LoudnessConfig()
    assert load(tmp_path / "fused" / "loud", weights="pretrained").system.name == "loud"


def test_a_family_that_is_not_registered(tmp_path: Path) -> None:
    """A checkpoint of it is refused in words."""
    params = {"scale": np.ones(4, np.float32)}
    manifest = checkpoint.Manifest(LoudnessConfig(), "mine", {}, "0", checkpoint.arrays_sha256(params))
    checkpoint.save(tmp_path / "loud", params, manifest)
    with pytest.raises(Exception, match=r"'loudness'.*gura_jax\.register"):
        load(tmp_path / "loud", weights="pretrained")


class Unhashable(Loudness):
    __hash__ = None  # pyright: ignore[reportAssignmentType]


def raises(*_: object) -> Any:
    raise KeyError("size")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"build": Unhashable}, "expected an encoder that can be hashed"),
        ({"build": raises}, "build: expected an encoder of a tiny config, found KeyError: 'size'"),
        ({"config": type("Mine", (LoudnessConfig,), {"tiny": raises}), "presets": {}}, "found KeyError: 'size'"),
    ],
)
def test_families_that_are_wrong(changes: Mapping[str, Any], words: str) -> None:
    """Beside those of test_own_family.py."""
    with refuses(SystemConfigError, "family 'loudness'", words):
        register(dataclasses.replace(LOUDNESS, **changes))


# Scenes of pooled outputs


@pytest.mark.usefixtures("loudness")
@pytest.mark.parametrize("combination", ["concatenate", pytest.param("average", marks=pytest.mark.slow)])
def test_pooled_scenes(combination: Any) -> None:
    """Of one member alone, and beside the mean of another's frames; the frames are the same as ever."""
    pooled, plain = Member("loud", scene="pooled"), Member("crepe-tiny", name="pitch")
    alone = load(System("alone", (pooled,)))
    size = None if combination == "concatenate" else 3
    mixed = load(System("mixed", (plain, pooled), combination, size))
    means = load(System("means", (plain,), feature_size=size))
    assert (alone.timestamp_embedding_size, alone.scene_embedding_size) == (4, 3)
    assert (mixed.timestamp_embedding_size, mixed.scene_embedding_size) == ((260, 259) if size is None else (3, 3))
    batch = clips(3300, 1700, 8000)
    for model in (alone, mixed):
        for own, clip, mean in zip(model.embed(batch), batch, means.scene_embeddings(batch), strict=True):
            frames, vector = by_hand(model, "loud", clip)
            if model is alone:
                assert relative(own.frames, frames) < SAME_BOUND
                assert relative(own.scene, vector) < SAME_BOUND
            else:
                expected = np.concatenate([mean, vector]) if size is None else (mean + vector) / 2
                assert relative(own.scene, expected) < SAME_BOUND


@pytest.mark.usefixtures("loudness")
def test_pooled_scenes_that_cannot_be() -> None:
    with refuses(SystemConfigError, "member 'hubert-base'", "no embedding of the whole clip", "'pooled'"):
        outline(System("none", (Member("hubert-base", scene="pooled"),)))
    pooled = Member("loud", scene="pooled")
    with refuses(SystemConfigError, "scene_groups = 1", "pooled (loud)", "found scene_groups = 5"):
        System("groups", (pooled,), scene_groups=5)
    with refuses(SystemConfigError, "pooled (loud)", "'interleave_time'"):
        System("time", (pooled, Member("crepe-tiny")), "interleave_time", 4)
    with refuses(SystemConfigError, "combination 'average' needs members of one size", "3, 4"):  # of scenes alone
        outline(System("sizes", (pooled, Member("loud", name="plain")), "average"))
    with refuses(SystemConfigError, "scene:", "'mean' is not known", "frames, pooled"):
        Member("loud", scene="mean")  # pyright: ignore[reportArgumentType]


# Members of other rates


class Hubert24k(Wav2Vec2Encoder):
    """A HuBERT that was trained on audio of 24 kHz: the config has no word for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sample_rate = 24_000


def two_rates() -> Model:
    config = dataclasses.replace(ENCODERS["hubert-base"].config.tiny(), num_hidden_layers=1)
    kinds = {"fast": Hubert24k, "slow": Wav2Vec2Encoder}
    members = (Member(kind(config, Options("mean")), name=name) for name, kind in kinds.items())
    return load(System("both", tuple(members)))


def test_a_hubert_of_24_khz_beside_one_of_16() -> None:
    """As each apart, on the clip at its own rate; alone or in a batch."""
    both = two_rates()
    assert (both.sample_rate, both.rates) == (24_000, (24_000, RATE))
    assert (both.min_samples, both.min_scene_samples) == (600, 600)
    batch = clips(4807, 4200)
    embedded = both.embed(batch)
    (clip, _), (own, _) = batch, embedded
    (alone,) = both.embed([clip])
    assert relative(own.frames, alone.frames) < SAME_BOUND
    assert relative(own.scene, alone.scene) < SAME_BOUND
    assert own.frames is not None
    assert own.times is not None
    count = 1 + (len(clip) - 400) // HOP
    assert len(own.frames) == both.num_frames(len(clip)) == count
    np.testing.assert_allclose(own.times, (200 + HOP * np.arange(count)) / 24, rtol=1e-12)
    fast, slow = (member.encoder for member in both.fusion.members)
    members = []
    for name, network, x in (("fast", fast, clip), ("slow", slow, resample(clip, 24_000, RATE))):
        audio, lengths = jnp.asarray(x)[None], jnp.array([len(x)], jnp.int32)
        members.append(np.asarray(precise_jit(network.__call__)(both.params[name], audio, lengths).frames[0]))
    assert relative(own.frames[:, :32], members[0]) < SAME_BOUND
    position = np.maximum((np.arange(count) + 0.5) * len(members[1]) / count - 0.5, 0)
    aligned = [np.interp(position, np.arange(len(members[1])), column) for column in members[1].T]
    assert relative(own.frames[:, 32:], np.stack(aligned, axis=1)) < SAME_BOUND


def test_a_batch_of_two_rates_is_given_by_rate() -> None:
    with refuses(SystemConfigError, "audio and lengths: expected those at 24000, 16000 Hz", "found those at 24000 Hz"):
        two_rates()(np.zeros((1, 2400), np.float32), np.full(1, 2400, np.int32))
