"""gura_jax/systems.py: the table of systems, and systems of a user's own."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gura_jax import ENCODERS, SYSTEMS, CheckpointError, Member, System, SystemConfigError, load_model
from gura_jax.fusion import COMBINATIONS
from gura_jax.loading import outline
from gura_jax.models.encoder import Encoder, FrameGrid, Output, frame_mask
from gura_jax.models.families import config_from_dict
from gura_jax.systems import FILE_SUFFIXES, find_system, read_system

# Sizes of a frame and of a scene embedding, as the paper and its authors' code have them.
PUBLISHED_SIZES: Mapping[str, tuple[int, int]] = {
    "hubert_xlarge": (1280, 1280),
    "wav2vec2_large": (1024, 1024),
    "fusion_hubert_xlarge": (1280, 1280),
    "fusion_wav2vec2": (1024, 1024),
    "avg_hubert_wav2vec2": (1024, 1024),
    "cat_hubert_wav2vec2": (2048, 2048),
    "avg_hubert_crepe": (1024, 1024),
    "avg_xwc": (1024, 1024),
    "cat_wc": (2048, 2048),
    "cat_xwc": (3072, 3072),
    "fusion_cat_xwc": (3072, 3072),
    "fusion_cat_xwc_time": (3072, 15360),
    "crepe": (2048, 2048),
}


def sizes(system: str | System, size: Any = None) -> tuple[int, int]:
    """Frame and scene size, from the encoders alone: no weights."""
    model = outline(system, size=size)
    return model.timestamp_embedding_size, model.scene_embedding_size


refusal = functools.partial(refusals.refusal, SystemConfigError, load_model)


# The table


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_sizes(name: str) -> None:
    assert sizes(name) == PUBLISHED_SIZES[name]
    # Resampled along features wherever CREPE has company, and only there.
    members = [member.encoder for member in SYSTEMS[name].members]
    assert (SYSTEMS[name].feature_size is not None) == ("crepe-full" in members and len(members) > 1)


def test_every_published_system_also_has_base_encoders() -> None:
    for name in set(PUBLISHED_SIZES) - {"crepe"}:
        base = SYSTEMS[name.removesuffix("_xlarge").removesuffix("_large") + "_base"]
        assert [str(m.encoder).split("-")[0] for m in base.members] == [
            str(m.encoder).split("-")[0] for m in SYSTEMS[name].members
        ]
        assert [m.layers for m in base.members] == [m.layers for m in SYSTEMS[name].members]
        for field in ("combination", "feature_size", "scene_groups"):
            assert getattr(base, field) == getattr(SYSTEMS[name], field)


def test_frames_of_crepe() -> None:
    """50 ms apart, and 250 ms where they are averaged into scenes."""
    (member,) = outline("crepe").fusion.members
    assert (member.encoder.grid.hop, member.scene_encoder.grid.hop) == (800, 4000)


@pytest.mark.parametrize("name", SYSTEMS)
def test_tiny_keeps_the_grids_and_the_kinds(name: str) -> None:
    for large, small in zip(outline(name).fusion.members, outline(name, size="tiny").fusion.members, strict=True):
        assert small.encoder.grid == large.encoder.grid
        assert small.config.model_type == large.config.model_type
        assert small.encoder.feature_size <= large.encoder.feature_size
    if SYSTEMS[name].feature_size is not None:
        assert sizes(name, "tiny") == sizes(name)


@pytest.mark.parametrize("name", ENCODERS)
def test_architectures_survive_json(name: str) -> None:
    config = ENCODERS[name].config
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# A user's own, in Python


def test_defaults_in_python() -> None:
    system = System("mine", (Member("hubert-base"), Member("wav2vec2-base", "mean")))
    assert (system.combination, system.feature_size, system.scene_groups) == ("concatenate", None, 1)
    assert [m.name for m in system.members] == ["hubert-base", "wav2vec2-base"]
    assert sizes(system) == (1536, 1536)
    assert find_system(system) is system


def test_lists_are_as_good_as_tuples() -> None:
    layers: Any = [0, 5, -1]
    members: Any = [Member("hubert-base", layers)]
    system = System("mine", members)
    assert system.members == (Member("hubert-base", (0, 5, -1)),)


def test_duplicate_names() -> None:
    pair = (Member("hubert-base"), Member("hubert-base", "mean"))
    with refusals.refuses(SystemConfigError, "'mine'", "'hubert-base'", "name"):
        System("mine", pair)
    named = System("mine", (pair[0], dataclasses.replace(pair[1], name="averaged")))
    assert sizes(named) == (1536, 1536)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"combination": "interleaved"}, ["combination", "'interleaved'", "interleave"]),
        ({"combination": "sum"}, ["combination", "'sum'", *COMBINATIONS]),
        ({"members": ()}, ["member", "none"]),
        ({"feature_size": 0}, ["feature_size", "positive integer", "0"]),
        ({"feature_size": -3}, ["feature_size", "-3"]),
        ({"feature_size": True}, ["feature_size", "True"]),
        ({"feature_size": "1024"}, ["feature_size", "'1024'"]),
        ({"scene_groups": 0}, ["scene_groups", "0"]),
        ({"scene_groups": 2.0}, ["scene_groups", "2.0"]),
        ({"scene_groups": None}, ["scene_groups", "None"]),
    ],
)
def test_wrong_fields(fields: dict[str, Any], words: list[str]) -> None:
    with refusals.refuses(SystemConfigError, "mine", *words):
        System(**({"name": "mine", "members": (Member("hubert-base"),)} | fields))


@pytest.mark.parametrize("members", [("hubert-base",), (None,), Member("hubert-base"), 5])
def test_members_that_are_none(members: Any) -> None:
    with refusals.refuses(SystemConfigError, "mine"):
        System("mine", members)


@pytest.mark.parametrize(
    "layers", ["lats", 5, None, True, 2.5, [], [0, 0], [13], [-14], [0.5] * 12, [float("nan")] * 13, {"a": 1}, [[1]]]
)
def test_wrong_layers(layers: Any) -> None:
    message = refusal(System("mine", (Member("hubert-base", layers),)), weights="random")
    assert "layers" in message
    assert repr(tuple(layers) if isinstance(layers, list) else layers) in message


@pytest.mark.parametrize("weight", [1e-60, 1e300])
def test_layer_weights_that_float32_does_not_hold(weight: float) -> None:
    message = refusal(System("mine", (Member("hubert-base", (weight,) * 13),)), weights="random")
    assert "layers" in message


@pytest.mark.parametrize("layers", ["lats", "mean", (0, 1)])
def test_layers_of_an_encoder_that_has_none(layers: Any) -> None:
    """Not silently left out."""
    assert "layers" in refusal(System("mine", (Member("crepe-tiny", layers),)), weights="random")


@pytest.mark.parametrize(("encoder", "close"), [("hubert-bas", "hubert-base"), ("crepe-ful", "crepe-full")])
def test_unknown_encoder(encoder: str, close: str) -> None:
    message = refusal(System("mine", (Member(encoder),)), weights="random")
    assert repr(encoder) in message
    assert close in message


@pytest.mark.parametrize("combination", ["average", "interleave", "interleave_time"])
def test_sizes_that_differ_need_one_to_be_resampled_to(combination: Any) -> None:
    system = System("mine", (Member("crepe-tiny"), Member("crepe-small")), combination)
    message = refusal(system, weights="random")
    assert "256, 512" in message
    assert "feature_size" in message


@pytest.mark.parametrize("system", ["fusion_cat_xcw", "fusion_cat_xwc.", Path("fusion_cat_xcw")])
def test_unknown_system(system: str | Path) -> None:
    message = refusal(system, weights="random")
    assert "fusion_cat_xcw" in message or "fusion_cat_xwc." in message
    assert "did you mean" in message
    assert "fusion_cat_xwc" in message
    assert all(suffix in message for suffix in FILE_SUFFIXES)


@pytest.mark.parametrize("system", [None, 5, ["crepe"]])
def test_a_system_that_is_none(system: Any) -> None:
    refusal(system, weights="random")


# Files


def write(folder: Path, content: Mapping[str, Any], suffix: str = ".yaml") -> Path:
    """JSON is YAML."""
    path = folder / f"mine{suffix}"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


TOML = """
combination = "interleave"
feature_size = 64
scene_groups = 2

[[members]]
encoder = "hubert-base"
layers = [0, 3, -1]

[[members]]
encoder = "wav2vec2-base"
layers = [0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75]

[[members]]
encoder = "crepe-tiny"
name = "pitch"
"""
YAML = """
combination: interleave
feature_size: 64
scene_groups: 2
members:
  - encoder: hubert-base
    layers: [0, 3, -1]
  - encoder: wav2vec2-base
    layers: [0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75]
  - {encoder: crepe-tiny, name: pitch}
"""


@pytest.mark.parametrize(("suffix", "text"), [(".toml", TOML), (".yaml", YAML), (".yml", YAML)])
def test_a_file_says_what_python_says(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"ours{suffix}"
    path.write_text(text)
    wanted = System(
        "ours",
        (
            Member("hubert-base", (0, 3, -1)),
            Member("wav2vec2-base", (0.25, *[0.0] * 11, 0.75)),
            Member("crepe-tiny", name="pitch"),
        ),
        "interleave",
        64,
        2,
    )
    assert find_system(path) == wanted
    assert find_system(str(path)) == wanted
    assert sizes(wanted) == (192, 384)


def test_extends(tmp_path: Path) -> None:
    assert read_system(write(tmp_path, {"extends": "cat_xwc"})) == dataclasses.replace(SYSTEMS["cat_xwc"], name="mine")
    changed = read_system(write(tmp_path, {"extends": "cat_xwc", "name": "time", "combination": "interleave_time"}))
    assert changed == dataclasses.replace(SYSTEMS["cat_xwc"], name="time", combination="interleave_time")
    members = read_system(write(tmp_path, {"extends": "cat_xwc", "members": [{"encoder": "crepe-tiny"}]}))
    assert members == System("mine", (Member("crepe-tiny"),), "interleave", 1024)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "my" / "hubert").mkdir(parents=True)
    (home / "tuned").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    members = [{"encoder": "my/hubert"}, {"encoder": "wav2vec2-base", "weights": "tuned"}, {"encoder": "crepe-tiny"}]
    system = read_system(write(home, {"members": members}))
    assert [m.encoder for m in system.members] == [str(home / "my" / "hubert"), "wav2vec2-base", "crepe-tiny"]
    assert [m.weights for m in system.members] == [None, str(home / "tuned"), None]
    assert [m.name for m in system.members] == ["hubert", "wav2vec2-base", "crepe-tiny"]


def test_names_are_not_taken_for_folders(tmp_path: Path) -> None:
    """A folder that happens to be called as an encoder, or as what load_model takes, changes nothing."""
    for name in ("crepe-tiny", "random"):
        (tmp_path / name).mkdir()
    system = read_system(write(tmp_path, {"members": [{"encoder": "crepe-tiny", "weights": "random"}]}))
    assert system.members == (Member("crepe-tiny", weights="random"),)


MEMBER: Mapping[str, Any] = {"encoder": "hubert-base"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], ["top level"]),
        (None, ["top level"]),
        ("crepe", ["top level"]),
        ({}, ["members", "extends"]),
        ({"member": [MEMBER]}, ["'member'", "members"]),
        ({"members": [MEMBER], "combinatoin": "average", "sizes": 1}, ["'combinatoin'", "combination", "'sizes'"]),
        ({"members": [MEMBER], "combination": "avrage"}, ["combination", "'avrage'", "average"]),
        ({"members": [MEMBER], "combination": []}, ["combination", "[]"]),
        ({"members": [MEMBER], "combination": None}, ["combination", "None"]),
        ({"members": [MEMBER], "feature_size": 1.5}, ["feature_size", "1.5"]),
        ({"members": [MEMBER], "scene_groups": "5"}, ["scene_groups", "'5'"]),
        ({"members": [MEMBER], "name": 5}, ["name", "5"]),
        ({"members": [MEMBER], "name": ["a"]}, ["name", "['a']"]),
        ({"members": []}, ["member"]),
        ({"members": MEMBER}, ["members", "list"]),
        ({"members": None}, ["members", "list"]),
        ({"members": ["hubert-base"]}, ["member", "encoder"]),
        ({"members": [{"layers": "mean"}]}, ["member", "encoder"]),
        ({"members": [{"encoder": 5}]}, ["member", "encoder"]),
        ({"members": [{"encoder": ""}]}, ["encoder"]),
        ({"members": [{"encoder": "e" * 5000}]}, ["encoder"]),
        ({"members": [{**MEMBER, "layer": "mean"}]}, ["'layer'", "layers"]),
        ({"members": [{**MEMBER, "layers": 3}]}, ["layers", "3"]),
        ({"members": [{**MEMBER, "layers": None}]}, ["layers", "None"]),
        ({"members": [{**MEMBER, "layers": [13]}]}, ["layers", "13"]),
        ({"members": [{**MEMBER, "name": 3}]}, ["name", "3"]),
        ({"members": [{**MEMBER, "name": []}]}, ["name", "[]"]),
        ({"members": [{**MEMBER, "weights": 3}]}, ["weights", "3"]),
        ({"members": [{**MEMBER, "weights": False}]}, ["weights", "False"]),
        ({"members": [{**MEMBER, "weights": ["a"]}]}, ["weights", "['a']"]),
        ({"members": [MEMBER, MEMBER]}, ["hubert-base", "name"]),
        ({"extends": "cat_xcw"}, ["extends", "'cat_xcw'", "cat_xwc"]),
        ({"extends": ["cat_xwc"]}, ["extends", "['cat_xwc']"]),
        ({"extends": 5}, ["extends", "5"]),
    ],
)
def test_wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: list[str]) -> None:
    monkeypatch.setenv("GURA_JAX_CHECKPOINTS", str(tmp_path / "none"))
    message = refusal(write(tmp_path, content))
    for word in words:
        assert word in message


def test_faults_of_a_member_say_which(tmp_path: Path) -> None:
    for second in ({"encoder": "crepe-tiny", "layer": 1}, {"layers": "mean"}):
        message = refusal(write(tmp_path, {"members": [MEMBER, second]}))
        assert "members[1]" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "members = ["),
        ("a.toml", "name = 'a'\nname = 'b'"),
        ("a.yaml", "members: ["),
        ("a.yaml", "!!python/object/apply:os.getcwd []"),
        ("a.yaml", "a: 1\n\tb: 2"),
        ("a.yaml", "[" * 100_000),
        ("a.toml", "a = " + "[" * 100_000),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    message = refusal(path)
    assert str(path) in message
    assert name.split(".")[1].upper() in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "none.toml" in refusal(tmp_path / "none.toml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refusal(tmp_path / "folder.yaml")
    (tmp_path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    assert "latin.toml" in refusal(tmp_path / "latin.toml")


def test_yaml_that_holds_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("members: &m [*m]")
    assert str(path) in refusal(path)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["mean", "last", "average", "interleave", "crepe-full", "hubert-base", "..", "cat_xwc"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _tables(required: dict[str, Any], *optional: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {key: value | _values for key, value in required.items()}, optional=dict.fromkeys(optional, _values)
    )


_members = _tables({"encoder": st.sampled_from(list(ENCODERS))}, "layers", "weights", "name", "layer")
_systems = _tables({"members": st.lists(_members | _values, max_size=3)}, "name", "scene_groups", "feature_size") | (
    _tables({"members": st.lists(_members, max_size=2)}, "extends", "combination", "feature_size", "extra")
)


@settings(max_examples=300, deadline=None)
@given(content=_systems)
@example(content={"extends": {}})
def test_no_file_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GURA_JAX_CHECKPOINTS", str(folder / "none"))
        # There are no checkpoints at all: a system that is described well ends with that error.
        with pytest.raises((SystemConfigError, CheckpointError)):
            load_model(write(folder, content))


# Members of a user's own kind


class Rms(Encoder):
    """Loudness in eight weighted copies, a frame every 20 ms: not an NNX module, nor registered."""

    sample_rate = 16_000
    feature_size = 8
    grid = FrameGrid(hop=320, offset=200.0, window=400)
    weight = np.arange(1.0, 9.0, dtype=np.float32)

    def init(self, key: jax.Array) -> dict[str, Any]:
        return {"weight": jnp.asarray(self.weight)}

    def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Output:
        counts, num_frames = self.grid.count(lengths), self.grid.count(audio.shape[1])
        index = np.arange(num_frames)[:, None] * self.grid.hop + np.arange(self.grid.window)[None, :]
        rms = jnp.sqrt(jnp.square(audio[:, index]).mean(axis=-1))  # [B, T]
        frames = rms[:, :, None] * params["weight"][None, None, :]
        return Output(jnp.where(frame_mask(counts, num_frames)[:, :, None], frames, 0.0), counts)


RMS_BOUND = 1e-6  # relative: a mean of 400 squares, summed in another order


def test_any_object_is_a_member() -> None:
    system = System("mine", (Member(Rms(), name="loudness"), Member("crepe-tiny", name="pitch")), "interleave", 16)
    model = load_model(system, weights="random")
    assert (model.timestamp_embedding_size, model.scene_embedding_size, model.min_samples) == (32, 32, 400)
    assert model.random_members == ["pitch"]
    assert "Rms" in str(model.weights["loudness"]["source"])
    rng = np.random.default_rng(0)
    clips = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (400, 2000, 3333)]
    frames, times = model.timestamp_embeddings(clips)
    alone = load_model(System("pitch", (Member("crepe-tiny", name="pitch"),)), weights="random")
    pitch, _ = alone.timestamp_embeddings(clips)
    for clip, got, t, crepe in zip(clips, frames, times, pitch, strict=True):
        count = 1 + (len(clip) - 400) // 320
        assert got.shape == (count, 32)
        np.testing.assert_allclose(t, 12.5 + 20 * np.arange(count))
        rms = np.array([np.sqrt(np.square(clip[320 * i : 320 * i + 400]).mean()) for i in range(count)])
        # 8 features to 16, half-pixel centres: what np.interp does at these places.
        wanted = rms[:, None] * np.interp((np.arange(16) + 0.5) / 2 - 0.5, np.arange(8), np.arange(1.0, 9.0))[None, :]
        assert np.linalg.norm(got[:, 0::2] - wanted) < RMS_BOUND * np.linalg.norm(wanted)
        places = (np.arange(16) + 0.5) * 16 - 0.5  # 256 features to 16
        low = places.astype(int)
        features = (crepe[:, low] + crepe[:, low + 1]) / 2
        position = (np.arange(count) + 0.5) * len(crepe) / count - 0.5
        expected = np.stack([np.interp(position, np.arange(len(crepe)), column) for column in features.T], axis=1)
        assert np.linalg.norm(got[:, 1::2] - expected) < RMS_BOUND * np.linalg.norm(expected)


def test_its_weights_are_arguments() -> None:
    """They reach the compiled function as the model's other weights do, and are no constants in it."""
    rms = Rms()
    model = load_model(System("mine", (Member(rms),)), weights="random")
    audio = np.full((1, 800), 0.5, np.float32)
    before = model.scene_embeddings(audio)
    np.testing.assert_allclose(before, 0.5 * rms.weight[None, :], rtol=RMS_BOUND)
    changed = model.with_params({"Rms": {"weight": 3.0 * model.params["Rms"]["weight"]}})
    np.testing.assert_allclose(changed.scene_embeddings(audio), 3 * before, rtol=RMS_BOUND)


@pytest.mark.parametrize("encoder", [5, object(), dict, Rms])
def test_an_object_that_is_no_encoder(encoder: Any) -> None:
    message = refusal(System("mine", (Member(encoder),)), weights="random")
    assert "Encoder" in message or "encoder" in message


def test_weights_for_an_object_are_refused(tmp_path: Path) -> None:
    """It brings its own: a path would be left out in silence."""
    system = System("mine", (Member(Rms()),))
    assert "Rms" in refusal(system, weights={"Rms": str(tmp_path)})


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda frames, counts: (frames, counts), "expected an Output"),
        (
            lambda frames, counts: Output(frames[:, :, :3], counts),
            "expected [2, 13, 8] float32, found [2, 13, 3]",
        ),
        (lambda frames, counts: Output(frames[:, 1:], counts), "expected [2, 13, 8] float32, found [2, 12, 8]"),
        (lambda frames, counts: Output(frames.astype("float16"), counts), "found [2, 13, 8] float16"),
        (lambda frames, counts: Output(frames, counts.astype("float32")), "counts: expected [2] int32"),
        (lambda frames, counts: Output(frames, counts + int(counts[0])), "that JAX can trace"),
    ],
)
def test_an_object_whose_results_are_not_as_it_says(result: Any, words: str) -> None:
    """Found when it is loaded, and not in a store."""

    class Wrong(Rms):
        def __call__(self, params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
            return result(*super().__call__(params, audio, lengths)[:2])

    assert words in refusal(System("mine", (Member(Wrong()),)), weights="random")
