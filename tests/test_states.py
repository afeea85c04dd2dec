"""Hidden states in a store, and systems fused from them without their encoders."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet
from reference import relative, speech
from toy import ALONE, Toy, contents, write_clips

from gura_jax import EmbeddingStore, Member, System, load_model
from gura_jax.dataset import fused
from gura_jax.dataset.export import export
from gura_jax.dataset.fused import fuse_scenes, fuse_store
from gura_jax.dataset.run import open_run
from gura_jax.dataset.sources import read_inputs
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import work
from gura_jax.errors import StoreError, SystemConfigError
from gura_jax.fusion import FusedMember, Fusion, Keep, fuse, kept_members

FUSED_BOUND = 1e-6  # float32 sums in another order
STATES_BOUND = 1e-5  # means of a clip in a padded batch, against the frames of it alone
CLIPS = [speech(9000, 1), speech(16_000, 2), speech(4321, 3)]

SPEECH, OTHER, PITCH = Member("hubert-base", "mean"), Member("wav2vec2-base", "mean"), Member("crepe-tiny")
ENSEMBLE = System("ensemble", (SPEECH, OTHER, PITCH), "interleave", 64)
# Other layers and weights, fewer members, another combination; and the same.
FROM_IT = [
    ENSEMBLE,
    System("weighted", (Member("hubert-base", (0.5, 0.0, -1.0, 2.0)), PITCH), "interleave", 48),
    System("pitch", (Member("crepe-tiny", weights="random"),)),
    System("mean", (Member("wav2vec2-base", (1, -1)), PITCH), "average", 64),
]


def embedded(system: System, clips: Path, out: Path, settings: Settings) -> EmbeddingStore:
    model = load_model(system, weights="random", size="tiny")
    work(open_run(model, read_inputs([clips], sample_rate=model.sample_rate), out, settings), ALONE)
    return EmbeddingStore(out)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "clips"
    write_clips(folder, [0.6, 1.0, 0.25, 0.8])
    return folder


@pytest.fixture(scope="module")
def means(clips: Path) -> EmbeddingStore:
    settings = Settings(shard_hours=1.5 / 3600, batch_seconds=1, keep=Keep("mean"))  # two shards
    return embedded(ENSEMBLE, clips, clips.parent / "means", settings)


@pytest.fixture(scope="module")
def frames(clips: Path) -> EmbeddingStore:
    settings = Settings(timestamps=True, format="parquet", keep=Keep("frames", (3, 0, 1, -2)))
    return embedded(ENSEMBLE, clips, clips.parent / "frames", settings)


# Unrolled, they are seen below.
@pytest.mark.parametrize("remat", ["layers", pytest.param(None, marks=pytest.mark.slow)], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    "encoder",
    [
        "hubert-base",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("wavlm-large", "ast", "beats", "tera", "vq-wav2vec", "w2v-bert-2", "whisper-base")
        ),
    ],
)
def test_states_are_the_hidden_states(encoder: str, remat: Any) -> None:
    """Their means and their frames, of padded clips; and what is embedded beside them is the same."""
    model = load_model(System("x", (Member(encoder, (1, -1)),)), weights="random", size="tiny", remat=remat)
    clips = [np.tile(clip, 3) for clip in CLIPS]
    batch = model.pad(clips, 3, 60_000)
    alone = [model.hidden_states([clip])[0] for clip in clips]  # [L + 1, T, D]
    plain = model(*batch)
    out = model(*batch, keep=Keep("mean"))
    assert out.states is not None
    assert out.states[encoder].values.shape[1:3] == (len(alone[0]), 1)
    for row, states in enumerate(alone):
        assert relative(out.states[encoder].values[row, :, 0], states.mean(1, dtype=np.float64)) < STATES_BOUND
    some = model(*batch, keep=Keep("frames", (-1, 1)))
    assert some.states is not None
    values, counts, _ = some.states[encoder]
    assert counts is not None
    for row, states in enumerate(alone):
        found = np.asarray(values)[row, : int(counts[row])]
        assert relative(found.swapaxes(0, 1), states[[1, len(states) - 1]]) < STATES_BOUND
    for other in (out, some):
        assert relative(other.scenes, plain.scenes) < FUSED_BOUND
        assert relative(other.frames, plain.frames) < FUSED_BOUND


class Layered(Toy):
    """An encoder of another family with three hidden states: its frames, and multiples of them."""

    num_states = 3
    parts = ("convolution", "state 0", "state 1", "state 2", "head")

    def states(self, params: Any, audio: Any, lengths: Any) -> Any:
        frames, counts, _ = self(params, audio, lengths)
        for i, part in enumerate(self.parts):
            yield part, i * frames, counts


def test_states_of_any_family() -> None:
    """Whatever other parts an encoder has; clips that are padded too; in groups of frames."""
    encoder = Layered()
    fusion = Fusion((FusedMember("x", encoder, encoder),), "concatenate", None, 2)
    audio = np.random.default_rng(0).uniform(-1, 1, (2, 3200)).astype(np.float32)
    lengths = np.array([3200, 1920], np.int32)
    by_rate = {encoder.sample_rate: jnp.asarray(audio)}, {encoder.sample_rate: jnp.asarray(lengths)}
    out = fuse(fusion, frozenset({"scenes"}), {"x": {}}, *by_rate, keep=Keep("mean"))
    assert out.states is not None
    for row, length in enumerate(lengths):
        frames = Toy()({}, audio[row : row + 1, :length], lengths[row : row + 1]).frames[0]
        half = len(frames) // 2
        wanted = np.concatenate([frames[:half].mean(0), frames[half : 2 * half].mean(0)])
        found = out.states["x"].values[row, :, 0]
        np.testing.assert_allclose(found, np.stack([i * wanted for i in (1, 2, 3)]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "system",
    [*FROM_IT[:2], *(pytest.param(system, marks=pytest.mark.slow) for system in FROM_IT[2:])],
    ids=lambda system: system.name,
)
def test_fused_it_is_a_direct_run(system: System, clips: Path, means: Any, frames: Any, tmp_path: Path) -> None:
    direct = embedded(system, clips, tmp_path / "direct", Settings(timestamps=True))
    for store in (means, frames):
        timestamps = store is frames
        out = tmp_path / Path(store.folder).name
        assert fuse_store(store, system, out, timestamps=timestamps) == (len(store), 0, 0)
        own = EmbeddingStore(out)
        wanted = {clip.meta["id"]: clip for clip in direct}
        assert own.run["system"]["name"] == system.name
        assert own.run["fused_from"] == store.run["fingerprint"]
        assert [m["layers"] for m in own.run["system"]["members"]] == [
            m["layers"] for m in direct.run["system"]["members"]
        ]
        assert sorted(own.ids) == sorted(wanted)
        np.testing.assert_array_equal(own.scenes(), fuse_scenes(store, system))
        for clip in own:
            assert relative(clip.scene, wanted[clip.meta["id"]].scene) < FUSED_BOUND
            if timestamps:
                other = wanted[clip.meta["id"]]
                assert clip.frames is not None
                assert clip.times is not None
                assert other.times is not None
                assert relative(clip.frames, other.frames) < FUSED_BOUND
                np.testing.assert_allclose(clip.times, other.times)


def test_states_are_read(means: EmbeddingStore, frames: EmbeddingStore) -> None:
    """By member, from each format; and a copy to another format has the same."""
    assert means.states().shape == (4, 4, 32)
    assert means.states("crepe-tiny").shape[:2] == (4, 1)
    for name in frames.ids:
        own = frames.state_frames(name, "wav2vec2-base")  # [K, T, D]
        assert own.shape[0] == 4
        (row,) = [i for i, other in enumerate(means.ids) if other == name]
        assert relative(own.mean(1), means.states("wav2vec2-base")[row]) < STATES_BOUND
    with pytest.raises(StoreError, match="expected frames of hidden states, found mean"):
        means.state_frames("x")
    with pytest.raises(StoreError, match="expected means of hidden states, found frames"):
        frames.states()
    with pytest.raises(StoreError, match="expected a member 'x', found hubert-base, wav2vec2-base, crepe-tiny"):
        means.states("x")
    with pytest.raises(KeyError, match="no clip 'x'"):
        frames.state_frames("x")


@pytest.mark.parametrize("kind", ["means", "frames"])
def test_a_copy_keeps_them(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store: EmbeddingStore = request.getfixturevalue(kind)
    other = "parquet" if store.run.get("format", "npy") == "npy" else "npy"
    export(store, tmp_path / "copy", other)
    copy = EmbeddingStore(tmp_path / "copy")
    assert (tmp_path / "copy" / f"states-00000.{other}").is_file()
    for own, theirs in zip(copy.iterate_states(), store.iterate_states(), strict=True):
        assert own.keys() == theirs.keys()
        for name in own:
            np.testing.assert_array_equal(own[name][0], theirs[name][0])


@pytest.mark.parametrize("kind", ["means", "frames"])
def test_data_sets_have_no_columns_of_them(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Their rows in the store's files mean nothing without these files."""
    store: EmbeddingStore = request.getfixturevalue(kind)
    assert {name for name in store.meta.column_names if "state" in name}
    export(store, tmp_path / "data", "datasets")
    names = parquet.read_schema(next((tmp_path / "data" / "data").iterdir())).names
    kept = ["id", "path", "offset", "duration", "num_samples"]
    if kind == "frames":
        kept += ["num_frames", "frame_offset_ms", "frame_hop_ms"]
    assert sorted(names) == sorted([*kept, "scene"])


def test_fusing_goes_on(means: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was killed after a shard ends with the bytes of one that was not."""
    fuse_store(means, FROM_IT[1], tmp_path / "whole")
    assert len(means.records) > 1
    whole, written = fused._fused_shard, []

    def dies(*arguments: Any) -> Any:
        if written:
            raise KeyboardInterrupt
        written.append(whole(*arguments))
        return written[-1]

    monkeypatch.setattr(fused, "_fused_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        fuse_store(means, FROM_IT[1], tmp_path / "out")
    monkeypatch.undo()
    assert len(EmbeddingStore(tmp_path / "out")) < len(means)
    fuse_store(means, FROM_IT[1], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(StoreError, match="expected the run that began here, found another"):
        fuse_store(means, FROM_IT[2], tmp_path / "out")


@pytest.mark.parametrize(
    ("system", "fault"),
    [
        (System("x", (Member("wavlm-base"),)), "encoder whose hidden states are stored .*, found wavlm-base"),
        (
            System("x", (Member("hubert-base", weights="/x"),)),
            "expected the weights of .* random, found /x",
        ),
        (System("x", (Member("hubert-base", normalise=True),)), "expected normalise = false"),
        (
            System("x", (Member("hubert-base", name="x"),)),
            "expected the name of a member with that encoder",
        ),
        (System("x", (SPEECH,), scene_groups=2), "expected a system with scene_groups = 1.*found 2"),
        (System("x", (SPEECH, OTHER), "interleave_time"), "found 'interleave_time': store --states frames"),
        (System("x", (PITCH, SPEECH), feature_size=8), "give the members in that order"),
        (System("x", (SPEECH,), sample_rate=8000), "expected clips at 8000 Hz.*set sample_rate = 16000"),
    ],
)
def test_what_the_states_do_not_make(system: System, fault: str, means: EmbeddingStore) -> None:
    with pytest.raises(StoreError, match=fault):
        fuse_scenes(means, system)


def test_states_that_are_not_stored(clips: Path, means: EmbeddingStore, tmp_path: Path) -> None:
    one = System("one", (SPEECH,))
    some = embedded(one, clips, tmp_path / "some", Settings(keep=Keep("mean", (1, 2))))
    assert some.states().shape == (4, 2, 32)
    scenes = fuse_scenes(some, System("x", (Member("hubert-base", (2,)),)))
    np.testing.assert_array_equal(scenes, some.states()[:, 1])
    with pytest.raises(StoreError, match=r"among the hidden states that are stored \(1, 2\), found 0, 3"):
        fuse_scenes(some, one)
    with pytest.raises(StoreError, match="expected a store with hidden states, found one without"):
        fuse_scenes(embedded(one, clips, tmp_path / "none", Settings()), one)
    with pytest.raises(StoreError, match="expected frames of hidden states to make frames of, found means"):
        fuse_store(means, ENSEMBLE, tmp_path / "out", timestamps=True)
    with pytest.raises(StoreError, match=r"states.*then, .* now"):
        embedded(one, clips, tmp_path / "some", Settings(keep=Keep("mean")))


def test_states_that_there_are_not() -> None:
    fusion = load_model(ENSEMBLE, weights="random", size="tiny").fusion
    for layers in ((4,), (1, 1), (0, -4)):
        with pytest.raises(
            SystemConfigError, match="layers: expected distinct hidden states of hubert-base, from -4 to 3"
        ):
            kept_members(fusion, Keep("mean", layers))
    with pytest.raises(SystemConfigError, match=r"found 'interleave_time'.*keep frames"):
        kept_members(fusion._replace(combination="interleave_time"), Keep("mean"))
