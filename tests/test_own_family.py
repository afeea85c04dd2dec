"""Families from outside the package: the example does everything, and what is wrong with one is said at once."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hub_server import COMMIT, HubServer, serve
from reference import relative, speech
from safetensors.torch import load_file, save_file

from gura_jax import (
    ENCODERS,
    FAMILIES,
    SYSTEMS,
    ConversionError,
    EmbeddingStore,
    Encoder,
    Family,
    FrameGrid,
    GuraError,
    Member,
    Options,
    Output,
    Preset,
    System,
    SystemConfigError,
    checkpoint,
    load_model,
    parallel,
    register,
)
from gura_jax.audio import load_audio, resample
from gura_jax.convert import convert, parity
from gura_jax.convert.keys import LINEAR, VECTOR, KeyTable, Transform
from gura_jax.convert.parity import Row, compare
from gura_jax.convert.references import Reference
from gura_jax.evaluate.report import read_table
from gura_jax.models.encoder import frame_mask, masked_mean
from gura_jax.models.families import MODULES_VARIABLE, import_families

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    """What a test registers is known to that test alone."""
    tables: Any = (FAMILIES, ENCODERS, SYSTEMS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else small batches are padded to eight, one for each device."""
    one = parallel.make_mesh(jax.local_devices()[:1])
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None: one)


# The example


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example, imported as the command line imports families."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv(MODULES_VARIABLE, "own_family")
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", "")  # main() sets it
    import_families()
    yield sys.modules["own_family"]
    del sys.modules["own_family"]


@pytest.mark.slow
def test_the_example(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(tmp_path)
    out = capsys.readouterr().out
    for part in ("log-mel", "state 3", "pooled", "pool 5", "15 of 15 rows"):
        assert part in out

    store = EmbeddingStore(tmp_path / "embeddings")
    model = load_model("logmel_crepe")
    assert (model.sample_rate, model.rates) == (24_000, (24_000, 16_000))
    clip = load_audio(EXAMPLES / "audio" / "speech.wav", sample_rate=24_000)
    (embedded,) = model.embed([clip])
    stored = store["speech.wav"]
    assert embedded.scene is not None
    assert embedded.frames is not None
    assert relative(stored.scene, embedded.scene) < 1e-5
    assert relative(stored.frames, embedded.frames) < 1e-5
    states = model.hidden_states([clip])[0]
    assert relative(embedded.frames[:, ::2], states.mean(axis=0)) < 1e-5  # interleaved with CREPE

    scores = {(row.system, row.metric): row.score for row in read_table(tmp_path / "evaluation")}
    assert scores["logmel_crepe", "top1_acc"] == 1.0
    assert ("logmel", "top1_acc") in scores


# A small family, and everything that can be wrong with one


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    model_type: str = "level"
    size: int = 3
    rate: int = 16_000

    @classmethod
    def from_source(cls, config: Mapping[str, Any]) -> "LevelConfig":
        return cls(config["model_type"], config["size"], **{k: v for k, v in config.items() if k == "rate"})

    def tiny(self) -> "LevelConfig":
        return self


class Level(Encoder):
    """The level of each 20 ms at 16 kHz, through one linear layer; and the mean of its frames by another."""

    def __init__(self, config: LevelConfig, options: Options) -> None:
        self.config = config
        self.sample_rate, self.feature_size, self.pooled_size = config.rate, config.size, 2
        self.grid = FrameGrid(320, 160.0, 320)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        size = self.config.size
        return {"out.kernel": jnp.ones((1, size)), "out.bias": jnp.zeros(size), "pool.kernel": jnp.ones((size, 2))}

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        x = audio[:, : audio.shape[1] // 320 * 320].reshape(len(audio), -1, 320)
        x = jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-3)
        frames = x @ params["out.kernel"] + params["out.bias"][None, None, :]
        counts = lengths // 320
        pooled = masked_mean(frames, frame_mask(counts, frames.shape[1])) @ params["pool.kernel"]
        return Output(frames, counts, pooled)


class LevelTwin(Reference):
    def __init__(self, config: LevelConfig) -> None:
        super().__init__(config)
        self.out = torch.nn.Linear(1, config.size)
        self.pool = torch.nn.Linear(config.size, 2, bias=False)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        frames = self.out((audio[0].unfold(0, 320, 320).square().mean(dim=1, keepdim=True) + 1e-3).sqrt())
        yield "frames", frames
        yield "pooled", self.pool(frames.mean(dim=0))


ROWS = ((r"(\w+)\.weight", r"\1.kernel", LINEAR), (r"(\w+)\.bias", r"\1.bias", VECTOR))
LEVEL = Family(
    "level",
    LevelConfig,
    Level,
    {"torch": KeyTable(rows=ROWS)},
    f"{__name__}.LevelTwin",
    {"level": Preset(LevelConfig())},
)


def changed(**changes: Any) -> Family:
    """The family with another encoder: the small one with other attributes or methods."""
    encoder = type("Changed", (Level,), changes)
    return dataclasses.replace(LEVEL, build=encoder)


def with_output(change: Callable[[Output], Any]) -> Family:
    return changed(__call__=lambda self, *args: change(Level.__call__(self, *args)))


def with_init(**attributes: Any) -> Family:
    """The family with attributes that differ after construction."""

    def build(config: LevelConfig, options: Options) -> Level:
        encoder = Level(config, options)
        for name, value in attributes.items():
            setattr(encoder, name, value)
        return encoder

    return dataclasses.replace(LEVEL, build=build)


def with_config(kind: type, **changes: Any) -> Family:
    return dataclasses.replace(LEVEL, config=kind, presets={}, **changes)


class NotEncoder:
    sample_rate, feature_size, grid = 16_000, 3, FrameGrid(320, 160.0, 320)

    def __init__(self, *_: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Neither from_source nor tiny."""

    model_type: str = "level"


@dataclasses.dataclass(frozen=True)
class Nameless(LevelConfig):
    model_type: str = "another"


@dataclasses.dataclass(frozen=True)
class NoDefaults(LevelConfig):
    depth: int = dataclasses.field(kw_only=True)


def normalised_by_the_batch(output: Output) -> Output:
    """Every frame over the largest of all: it depends on the other clips."""
    return output._replace(frames=output.frames / jnp.abs(output.frames).max())


# What is registered, and what the message then says.
FAULTS: Mapping[str, tuple[Callable[[], Family], list[str]]] = {
    "a name that is taken": (lambda: dataclasses.replace(LEVEL, name="crepe"), ["'crepe'", "registered"]),
    "a preset that is taken": (
        lambda: dataclasses.replace(LEVEL, presets={"hubert-base": Preset(LevelConfig())}),
        ["hubert-base", "free"],
    ),
    "a config that is no dataclass": (lambda: with_config(dict), ["config", "dataclass"]),
    "a config without methods": (lambda: with_config(Sizes), ["Sizes", "from_source"]),
    "a config without defaults": (lambda: with_config(NoDefaults), ["preset", "depth"]),
    "a config of another name": (lambda: with_config(Nameless), ["model_type", "'level'", "'another'"]),
    "no subclass of Encoder": (
        lambda: dataclasses.replace(LEVEL, build=NotEncoder),
        ["gura_jax.Encoder", "init"],
    ),
    "no rate": (lambda: with_init(sample_rate=None), ["sample_rate", "None"]),
    "a rate that is no integer": (lambda: with_init(sample_rate=16_000.0), ["sample_rate", "16000.0"]),
    "a rate that soxr cannot make": (lambda: with_init(sample_rate=10), ["sample_rate", "1000", "10"]),
    "a rate beyond all": (lambda: with_init(sample_rate=10_000_000), ["sample_rate", "768000"]),
    "no size": (lambda: with_init(feature_size=0), ["feature_size", "0"]),
    "no grid": (lambda: with_init(grid=None), ["grid", "FrameGrid", "None"]),
    "a grid that stands still": (lambda: with_init(grid=FrameGrid(0, 0.0, 320)), ["grid", "hop"]),
    "states that there are not": (lambda: with_init(num_states=2), ["state 0"]),
    "parts that there are not": (lambda: with_init(parts=("frames", "more")), ["parts", "more"]),
    "no Output": (lambda: with_output(lambda out: (out.frames, out.counts)), ["Output", "tuple"]),
    "frames of another size": (
        lambda: with_output(lambda out: out._replace(frames=out.frames[:, :, :2])),
        ["frames", "3] float32", "2] float32"],
    ),
    "frames of another count": (
        lambda: with_output(lambda out: out._replace(frames=out.frames[:, 1:])),
        ["frames", "float32"],
    ),
    "frames of another type": (
        lambda: with_output(lambda out: out._replace(frames=out.frames.astype(jnp.bfloat16))),
        ["frames", "float32", "bfloat16"],
    ),
    "counts of another type": (
        lambda: with_output(lambda out: out._replace(counts=out.counts.astype(jnp.float32))),
        ["counts", "int32", "float32"],
    ),
    "counts off the grid": (lambda: with_output(lambda out: out._replace(counts=out.counts + 1)), ["counts", "grid"]),
    "no pooled": (lambda: with_output(lambda out: out._replace(pooled=None)), ["pooled", "none"]),
    "pooled of another size": (
        lambda: with_output(lambda out: out._replace(pooled=out.frames[:, 0, :1])),
        ["pooled", "2] float32", "1] float32"],
    ),
    "frames that see the padding": (
        lambda: with_output(lambda out: out._replace(frames=out.frames - out.frames.mean(axis=1, keepdims=True))),
        ["frames", "padded", "mask"],
    ),
    "frames that see other clips": (lambda: with_output(normalised_by_the_batch), ["frames", "padded"]),
    "pooled that sees the padding": (
        lambda: with_output(lambda out: out._replace(pooled=out.frames.mean(axis=1)[:, :2])),
        ["pooled", "padded"],
    ),
    "frames that are not finite": (
        lambda: with_output(lambda out: out._replace(frames=jnp.log(out.frames * 0))),
        ["frames", "finite"],
    ),
    "no JAX": (lambda: with_output(lambda out: out._replace(frames=np.asarray(out.frames))), ["JAX", "trace"]),
    "no init": (lambda: changed(init=lambda self, key: 1 / 0), ["init", "ZeroDivisionError"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_family_that_is_wrong(name: str) -> None:
    make, words = FAULTS[name]
    before = dict(FAMILIES), dict(ENCODERS)
    with pytest.raises(SystemConfigError) as caught:
        register(make())
    for word in ["family", *words]:
        assert word in str(caught.value)
    assert before == (FAMILIES, ENCODERS)


def test_a_family_twice() -> None:
    register(LEVEL)
    with pytest.raises(SystemConfigError, match=r"'level'.*registered"):
        register(LEVEL)


def test_a_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_family.py").write_text("1 / 0")
    for name, words in (("no_such_family", "ModuleNotFoundError"), ("broken_family", "ZeroDivisionError")):
        monkeypatch.setenv(MODULES_VARIABLE, name)
        with pytest.raises(SystemConfigError, match=f"{name} raises {words}"):
            import_families()


# Its weights


def saved(folder: Path, **config: Any) -> Path:
    """The twin's folder, with another config."""
    LevelTwin.random(LevelConfig(), seed=0).save(folder)
    if config:
        content = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def test_its_folder_is_converted(tmp_path: Path) -> None:
    register(LEVEL)
    params, manifest = convert(saved(tmp_path / "twin"))
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    assert manifest.architecture == LevelConfig()
    np.testing.assert_array_equal(params["out.kernel"], tensors["out.weight"].numpy().T)
    model = load_model(tmp_path / "twin")
    assert model.timestamp_embedding_size == 3
    np.testing.assert_array_equal(model.params["twin"]["pool.kernel"], params["pool.kernel"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": None}, ["LevelConfig", "KeyError", "size"]),
        ({"size": 4}, ["out.weight", "[4, 1]", "[3, 1]"]),
        ({"model_type": "unheard"}, ["model_type", "level", "'unheard'", "gura_jax.register"]),
    ],
)
def test_a_config_that_is_wrong(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    register(LEVEL)
    with pytest.raises(ConversionError) as caught:
        convert(saved(tmp_path / "twin", **config))
    for word in ["twin cannot be converted", *words]:
        assert word in str(caught.value)
    with pytest.raises((SystemConfigError, ConversionError)):
        load_model(tmp_path / "twin")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["'level'", "none"]),
        ({"torch": KeyTable(rows=ROWS[:1])}, ["out.bias", "unexpected key", "nothing fills it"]),
        (
            {"torch": KeyTable(rows=((r"(\w+)\.weight", r"\1.kernel", VECTOR), ROWS[1]))},
            ["out.weight", "an array of 1 axes", "[1, 3]"],
        ),
        (
            {"torch": KeyTable(rows=((r"(\w+)\.weight", r"\1.kernel", Transform((0, 1))), ROWS[1]))},
            ["out.weight: expected shape [1, 3], found [3, 1]"],
        ),
    ],
)
def test_key_tables_that_are_wrong(tmp_path: Path, keys: dict[str, KeyTable], words: list[str]) -> None:
    register(dataclasses.replace(LEVEL, keys=keys))
    with pytest.raises(ConversionError) as caught:
        convert(saved(tmp_path / "twin"))
    for word in words:
        assert word in str(caught.value)


def test_bare_files(tmp_path: Path) -> None:
    """Recognised by a key, or not at all; and the config beside it says which family it is."""
    register(LEVEL)
    folder = saved(tmp_path / "twin")
    file = folder / "model.safetensors"
    with pytest.raises(ConversionError, match=r"not a known kind of weights.*give the folder"):
        convert(file)
    table = KeyTable(rows=ROWS, recognise=r"^pool\.weight$")
    FAMILIES["level"] = dataclasses.replace(LEVEL, keys={"torch": table})
    assert convert(file).params.keys() == {"out.kernel", "out.bias", "pool.kernel"}
    state = load_file(file)
    state["encoder.layers.0.attention.weight"] = torch.zeros(1)  # as transformers' too: config.json decides
    save_file(state, file)
    with pytest.raises(ConversionError, match=r"  - encoder\.layers\.0\.attention\.weight"):
        convert(file)


# Its parity


def rows(system: str | System, **options: Any) -> list[Row]:
    clips = options.pop("clips", (speech(4000, 1), speech(2503, 2)))
    return list(compare(system, clips, weights="random", **options))


def test_parity_of_a_family_without_hidden_states() -> None:
    register(LEVEL)
    found = rows("level")
    assert [(r.member, r.layer) for r in found] == [
        ("level", "frames"),
        ("level", "pooled"),
        ("level", "frames"),
        ("level", "scene"),
    ]
    assert all(r.passed for r in found)


@pytest.mark.parametrize(
    "combination", ["interleave", *(pytest.param(name, marks=pytest.mark.slow) for name in ("concatenate", "average"))]
)
def test_parity_of_pooled_members_at_two_rates(combination: Any) -> None:
    """Scenes of the means of frames and of pooled embeddings, at 16 and at 24 kHz."""
    register(LEVEL)
    ENCODERS["level-24k"] = Preset(LevelConfig(size=5, rate=24_000))
    for scenes in (("pooled", "pooled"), ("frames", "pooled", "frames"), ("pooled", "frames", "frames")):
        encoders = ("level", "level-24k", "level")
        members = [Member(e, name=f"m{i}", scene=s) for i, (e, s) in enumerate(zip(encoders, scenes, strict=False))]  # pyright: ignore[reportArgumentType]
        found = rows(
            System("mixed", tuple(members), combination, feature_size=4), clips=(speech(6000, 1), speech(3755))
        )
        assert [r.layer for r in found if not r.passed] == []
        assert all(r.to_pytorch > 0 for r in found if r.member == "mixed")


def test_a_member_gets_the_clip_at_its_own_rate() -> None:
    """From the model's rate, in one step."""
    register(LEVEL)
    ENCODERS["level-24k"] = Preset(LevelConfig(rate=24_000))
    clip = speech(6000)
    fused = load_model(System("mixed", (Member("level"), Member("level-24k"))), weights="random").embed([clip])[0]
    alone = load_model("level", weights="random").embed([resample(clip, 24_000, 16_000)])[0]
    assert fused.frames is not None
    assert relative(fused.frames[:, :3], alone.frames) == 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    saved(tmp_path / "repos" / "owner" / "name")
    yield from serve(tmp_path / "repos", tmp_path / "cache", monkeypatch)


def test_an_encoder_on_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its hub id; and once it is converted, by the revision that it was converted from."""
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path / "checkpoints"))
    register(LEVEL)
    assert all(r.passed for r in compare("owner/name", [speech(4000)]))
    assert "model.safetensors" in hub.downloads
    params, manifest = convert("owner/name")
    assert manifest.source == f"owner/name@{COMMIT}"
    checkpoint.save(tmp_path / "checkpoints" / "mine", params, manifest)
    assert all(r.passed for r in compare("mine", [speech(4000)]))


class WrongParts(LevelTwin):
    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().parts(audio, hop)
        yield "more", audio[0]


class WrongShape(LevelTwin):
    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in super().parts(audio, hop):
            yield name, value[:-1]


class WrongValues(LevelTwin):
    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in super().parts(audio, hop):
            yield name, value * 1.001


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("", "the family 'level' has no reference"),
        ("no_such_module.Twin", "no_such_module"),
        ("Twin", "dotted name"),
        (f"{__name__}.Nothing", "Nothing"),
        (f"{__name__}.Level", "subclass of gura_jax.convert.references.Reference"),
        (f"{__name__}.WrongParts", "frames, pooled; found frames, pooled, more"),
        (f"{__name__}.WrongShape", "shapes differ"),
    ],
)
def test_references_that_are_wrong(reference: str, words: str) -> None:
    register(dataclasses.replace(LEVEL, reference=reference))
    with pytest.raises((SystemConfigError, ConversionError), match=words):
        rows("level")


def test_a_reference_that_differs_fails() -> None:
    register(dataclasses.replace(LEVEL, reference=f"{__name__}.WrongValues"))
    assert [r.passed for r in rows("level")] == [False] * 4


def test_parity_needs_to_know_where_the_weights_came_from(tmp_path: Path) -> None:
    register(LEVEL)
    folder = saved(tmp_path / "twin")
    assert all(r.passed for r in compare(str(folder), [speech(4000)]))
    load_model(folder).save(tmp_path / "model")
    with pytest.raises(ConversionError, match=r"member 'twin' cannot be compared.*from twin.*not on the hub"):
        list(compare(tmp_path / "model", [speech(4000)]))
    assert all(r.passed for r in compare(tmp_path / "model", [speech(4000)], weights={"twin": str(folder)}))


def test_parity_of_weights_that_were_changed(tmp_path: Path) -> None:
    """However often they were saved since."""
    register(LEVEL)
    model = load_model(saved(tmp_path / "twin"))
    model = model.with_params(jax.tree.map(lambda x: 2 * x, model.params))
    for name in ("model", "again"):
        model.save(tmp_path / name)
        model = load_model(tmp_path / name)
        with pytest.raises(ConversionError, match=r"were changed and saved after conversion.*original is twin"):
            list(compare(tmp_path / name, [speech(4000)]))
    load_model("level", weights="random").save(tmp_path / "random")
    with pytest.raises(ConversionError, match=r"member 'level' cannot be compared.*its weights were random"):
        list(compare(tmp_path / "random", [speech(4000)]))


def test_every_member_is_checked_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.delattr(parity, "_reference")
    register(LEVEL)
    load_model("level", weights="random").save(tmp_path / "model")
    first = Member(str(saved(tmp_path / "twin")))
    others: dict[str, Any] = {
        "is a Python object": Level(LevelConfig(), Options()),
        "gura-jax convert crepe-tiny": "crepe-tiny",
        "its weights were random": str(tmp_path / "model" / "level"),
    }
    for words, encoder in others.items():
        with pytest.raises(GuraError, match=words):
            next(compare(System("two", (first, Member(encoder, name="other"))), [speech(4000)]))
