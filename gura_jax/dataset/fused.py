"""Systems fused from the hidden states in a store, without their encoders.

Means of states give scene embeddings: averaging over time, weighing layers, resampling features and combining members
are all linear, so their order does not matter. Frames of states go through :func:`gura_jax.fusion.fuse` itself, with
encoders that return what is stored.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax import checkpoint, parallel
from gura_jax.audio import resampled_length
from gura_jax.backend import platform_of
from gura_jax.batching import bucket_length
from gura_jax.dataset.columns import SAMPLES, is_written
from gura_jax.dataset.commit import Location
from gura_jax.dataset.export.copy import copy_shards
from gura_jax.dataset.identity import as_json, fingerprint, with_members
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.sinks import Shard
from gura_jax.dataset.states import MemberStates, States
from gura_jax.dataset.table import frame_columns
from gura_jax.errors import StoreError
from gura_jax.files import is_folder
from gura_jax.fusion import COMBINATIONS, FusedMember, Fusion, combine, fuse, resample_features
from gura_jax.loading import find_encoder
from gura_jax.model import Model
from gura_jax.models.encoder import Encoder, Output, Params
from gura_jax.models.families import ENCODERS
from gura_jax.models.layers import layer_weights
from gura_jax.systems import Member, System, find_system

CLIPS_AT_ONCE = 256

OfClip = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""A clip's hidden states by member, as :meth:`gura_jax.dataset.states.States.unpack` gives them."""


@dataclasses.dataclass(frozen=True)
class StoredEncoder(Encoder):
    """Stands in for an encoder: its weights are the frames and the embedding of the clips at hand."""

    sample_rate: int
    feature_size: int
    grid: Any
    pooled_size: int

    def init(self, key: jax.Array) -> Params:
        """Return no weights: there are none before there are clips."""
        return {}

    def __call__(self, params: Params, audio: jax.Array, lengths: jax.Array) -> Output:
        """Return what is stored."""
        return Output(params["frames"], self.grid.count(lengths), params["pooled"] if self.pooled_size else None)


class Part(NamedTuple):
    """A member of the fused system.

    Attributes:
        described: its entry in the ``run.json`` to write.
        states: what the store has of it.
        weights: [K] float64, of its kept states.
        base: index of the frame rate at which means are taken.
    """

    described: Mapping[str, Any]
    states: MemberStates
    weights: np.ndarray
    base: int


class Fuser:
    """A system fused from hidden states.

    It may have other layers, other weights of them, fewer members, and another combination than the system whose states
    are stored.

    Args:
        store: with hidden states.
        system: see :func:`gura_jax.systems.find_system`; its encoders are not loaded.

    Raises:
        StoreError: the store has no hidden states, or not those that the system is made of.
        SystemConfigError: an unknown system, or layers that there are not.

    Attributes:
        states: what the store has.
        parts: of the system, by member.
        model: the system with the sizes of its embeddings; it embeds nothing.
    """

    def __init__(self, store: EmbeddingStore, system: str | Path | System) -> None:
        described = find_system(system)
        self.states, self._where = store.kept_states, store.folder
        try:
            rate = store.run["sample_rate"]
            stored = {each["name"]: dict(each) for each in store.run["system"]["members"]}
            if missing := {member.name for member in self.states.members} ^ set(stored):
                raise KeyError(*missing)
        except (KeyError, TypeError, ValueError):
            raise StoreError(
                f"{self._where}: run.json: expected the description of a system that gura-jax embed writes, found a "
                "damaged one"
            ) from None
        self.parts = _parts(str(self._where), stored, self.states, described)
        self.model = _model(described, self.parts)
        if self.model.sample_rate != rate:
            raise StoreError(
                f"{self._where}: expected clips at {self.model.sample_rate} Hz, as {described.name} takes them, found "
                f"{rate} Hz: set sample_rate = {rate} in the system"
            )
        if self.states.of == "mean":
            self._check_linear(described)
        else:
            self._check_strides()
        self._fuse: Any = jax.jit(functools.partial(fuse, self.model.fusion, frozenset({"frames", "scenes"})))

    def fuse(
        self, rows: Iterable[Mapping[str, Any]], clips: Iterable[OfClip]
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Fuse clips.

        Args:
            rows: their metadata.
            clips: their hidden states.

        Yields:
            Of each clip its scene [S] and, where frames of states are stored, its frames [T, D]; float32.
        """
        if self.states.of == "frames":
            for row, clip in zip(rows, clips, strict=True):
                yield self._frames(row, clip)
            return
        iterator = iter(clips)
        while batch := list(itertools.islice(iterator, CLIPS_AT_ONCE)):
            for scene in self._scenes(batch):
                yield scene, None

    @property
    def token_names(self) -> list[tuple[str, int | None]]:
        """Member and hidden state of each of :meth:`tokens`; no state of a member without, or of one that is pooled."""
        return [(member.name, state) for member, states in self._tokens() for state in states]

    def tokens(self, clips: Sequence[OfClip]) -> np.ndarray:
        """Return every hidden state of every member, of which scenes are made: [n, N, F] float32.

        Args:
            clips: their hidden states; means.

        Raises:
            StoreError: scenes are groups of frames, or the members differ in size and the system has no feature_size.
        """
        system, found = self.model.system, []
        if self.states.of != "mean" or self.states.groups != 1:
            raise StoreError(f"{self._where}: expected means of hidden states with scene_groups = 1, found others")
        for (member, states), part in zip(self._tokens(), self.parts, strict=True):
            name = part.states.name
            if member.scene == "pooled":
                x = np.stack([clip[name][1] for clip in clips])[:, None]
            else:
                x = np.stack([clip[name][0][:, part.base] for clip in clips])  # [n, K, D]
            assert x.shape[1] == len(states)
            x = np.asarray(x, np.float32)
            size = system.feature_size
            found.append(x if size is None else np.asarray(resample_features(jnp.asarray(x), size)))
        if len({x.shape[2] for x in found}) > 1:
            sizes = ", ".join(f"{member.name} {x.shape[2]}" for member, x in zip(system.members, found, strict=True))
            raise StoreError(f"{self._where}: expected members of one size, found {sizes}: set feature_size")
        return np.concatenate(found, axis=1)

    def _tokens(self) -> Iterator[tuple[Member, Sequence[int | None]]]:
        for member, part in zip(self.model.system.members, self.parts, strict=True):
            yield member, part.states.states if part.states.states and member.scene == "frames" else (None,)

    def _scenes(self, clips: Sequence[OfClip]) -> np.ndarray:
        """Scenes [n, S] of means."""
        members, n = [], len(clips)
        for part, member in zip(self.parts, self.model.fusion.members, strict=True):
            name = part.states.name
            if member.scene == "pooled":
                x = np.stack([clip[name][1] for clip in clips])[:, None]
            else:
                means = np.stack([clip[name][0][:, part.base] for clip in clips])  # [n, K, groups * D]
                x = np.einsum("nkd,k->nd", means, part.weights).reshape(n, self.states.groups, -1)
            x = np.pad(np.asarray(x, np.float32), ((0, CLIPS_AT_ONCE - n), (0, 0), (0, 0)))  # one compiled shape
            members.append((x, np.full(len(x), x.shape[1], np.int32)))
        fusion = self.model.fusion
        fused, _ = combine_stored(members, fusion.combination, fusion.feature_size)
        return np.asarray(fused)[:n].reshape(n, -1)

    def _frames(self, row: Mapping[str, Any], clip: OfClip) -> tuple[np.ndarray, np.ndarray]:
        """Scene [S] and frames [T, D] of one clip, of frames."""
        params = {}
        for part, member in zip(self.parts, self.model.fusion.members, strict=True):
            values, pooled = clip[part.states.name]  # [T, K, D], [P]
            x = np.einsum("tkd,k->td", values, part.weights)
            padded = np.zeros((1, bucket_length(len(x)), x.shape[1]), np.float32)
            padded[0, : len(x)] = x
            params[member.name] = {"frames": padded, "pooled": np.asarray(pooled, np.float32)[None]}
        samples = int(row["num_samples"])
        by_rate = {rate: resampled_length(samples, self.model.sample_rate, rate) for rate in self.model.rates}
        audio = {rate: np.zeros((1, bucket_length(n)), np.float32) for rate, n in by_rate.items()}  # for its shape
        lengths = {rate: np.array([n], np.int32) for rate, n in by_rate.items()}
        out = jax.device_get(self._fuse(params, audio, lengths))
        return out.scenes[0], out.frames[0, : out.counts[0]]

    def _check_linear(self, system: System) -> None:
        if not COMBINATIONS[system.combination].linear_scenes:
            raise StoreError(
                f"{self._where}: expected a combination of members' frames, of which means of hidden states make "
                f"scenes, found {system.combination!r}: store --states frames"
            )
        if system.scene_groups != self.states.groups:
            raise StoreError(
                f"{self._where}: expected a system with scene_groups = {self.states.groups}, by which its means of "
                f"hidden states are taken, found {system.scene_groups}"
            )

    def _check_strides(self) -> None:
        for member in self.model.fusion.members:
            if member.scene == "frames" and member.scene_stride is None:
                raise StoreError(
                    f"{self._where}: member {member.name!r}: its scenes average frames that are not stored: store "
                    "--states mean"
                )


def fuse_scenes(store: EmbeddingStore, system: str | Path | System) -> np.ndarray:
    """Return the scene embeddings of another system, of all clips in order: [n, S] float32.

    Args:
        store: with hidden states.
        system: see :class:`Fuser`.

    Raises:
        StoreError, SystemConfigError: see :class:`Fuser`.
    """
    fuser = Fuser(store, system)
    out = np.empty((len(store), fuser.model.scene_embedding_size), np.float32)
    for i, (scene, _) in enumerate(fuser.fuse(store.iterate_meta(), store.iterate_states())):
        out[i] = scene
    return out


class Fused(NamedTuple):
    """What :func:`fuse_store` wrote.

    Attributes:
        clips: in the store.
        failed: clips of the source that have no embedding.
        missing: shards that the source's run has not finished.
    """

    clips: int
    failed: int
    missing: int


def fuse_store(store: EmbeddingStore, system: str | Path | System, out: Location, *, timestamps: bool = False) -> Fused:
    """Write the store of another system, shard by shard; a killed one is resumed.

    Args:
        store: the whole store, with hidden states.
        system: see :class:`Fuser`.
        out: folder, or the URL of a bucket's prefix.
        timestamps: write frames too.

    Raises:
        StoreError: see :class:`Fuser`; or ``store`` is a part of one, or the output cannot be written or holds
            something else.
    """
    fuser = Fuser(store, system)
    if timestamps and fuser.states.of != "frames":
        raise StoreError(
            f"{store.folder}: expected frames of hidden states to make frames of, found means: embed with --states "
            "frames"
        )
    failed = copy_shards(
        store,
        out,
        _run(fuser, store.run, timestamps),
        lambda shard: _fused_shard(fuser, shard, store.run["storage"], timestamps),
    )
    planned = range(store.run.get("shards", 0))
    return Fused(len(store), len(failed), sum(number not in store.records for number in planned))


def _fused_shard(fuser: Fuser, shard: Shard, storage: Any, timestamps: bool) -> Shard:
    rows, model = shard.meta.to_pylist(), fuser.model
    clips = map(fuser.states.unpack, shard.states or [], rows)
    scenes = np.zeros((len(rows), model.scene_embedding_size), storage)
    frames = []
    for i, (scene, own) in enumerate(fuser.fuse(rows, clips)):
        scenes[i] = scene
        if timestamps and own is not None:
            frames.append(own.astype(storage))
    samples = [row["num_samples"] for row in rows]
    columns = frame_columns(model, samples, [len(own) for own in frames]) if timestamps else {}
    meta = shard.meta.select([name for name in shard.meta.column_names if name == SAMPLES or not is_written(name)])
    for i, (name, values) in enumerate(columns.items(), meta.column_names.index(SAMPLES) + 1):
        meta = meta.add_column(i, name, values)
    if timestamps and not frames:
        frames = [np.zeros((0, model.timestamp_embedding_size), storage)]
    return Shard(meta, scenes, frames if timestamps else None)


def _run(fuser: Fuser, run: Mapping[str, Any], timestamps: bool) -> dict[str, Any]:
    """Describe the fused store, as ``run.json`` has it."""
    random = [part.described["name"] for part in fuser.parts if part.states.name in run["random_weights"]]
    fused = {key: value for key, value in run.items() if key not in ("states", "fingerprint", "inputs_signature")}
    fused |= {
        "system": with_members(fuser.model.system, [part.described for part in fuser.parts]),
        "random_weights": random,
        "scene_embedding_size": fuser.model.scene_embedding_size,
        "timestamp_embedding_size": fuser.model.timestamp_embedding_size if timestamps else None,
        "code_version": version("gura-jax"),
        "fused_from": run["fingerprint"],
    }
    return fused | {"fingerprint": fingerprint(fused)}


def _parts(store: str, described: Mapping[str, Mapping[str, Any]], states: States, system: System) -> tuple[Part, ...]:
    """Find the members of a system among those of a store, by their descriptions in ``run.json``."""
    found = [(member, *_find(store, described, states, member)) for member in system.members]
    first = next((own.scene_grid for member, _, own in found if member.scene == "frames"), None)
    parts = []
    for member, described, own in found:
        where = f"{store}: member {member.name!r}"
        if member.scene == "pooled" and not own.pooled_size:
            raise StoreError(f"{where}: expected scene = 'frames', as the store has no embedding of whole clips of it")
        base = 0
        if states.of == "mean" and member.scene == "frames" and first is not None:
            if first not in own.bases:
                raise StoreError(
                    f"{where}: expected a member before it of its own frame rate, or of one before it in the store "
                    f"({', '.join(m.name for m in states.members)}), found another: give the members in that order"
                )
            base = own.bases.index(first)
        layers = {"name": member.name, "layers": as_json(member.layers)}
        scene = {"scene": member.scene} if member.scene != "frames" else {}
        kept = {key: value for key, value in described.items() if key != "scene"}
        parts.append(Part(kept | layers | scene, own, _weights(where, member, own), base))
    return tuple(parts)


def _find(
    store: str, described: Mapping[str, Mapping[str, Any]], states: States, member: Member
) -> tuple[Mapping[str, Any], MemberStates]:
    """Find a member's description in ``run.json``, and its states: by its encoder, and its name where that matters."""
    where = f"{store}: member {member.name!r}"
    same = [name for name, each in described.items() if _is_encoder(member.encoder, each.get("encoder"))]
    if not same:
        raise StoreError(
            f"{where}: expected an encoder whose hidden states are stored "
            f"({', '.join(str(each.get('encoder')) for each in described.values())}), found {member.encoder}"
        )
    # Random weights differ by the members' names.
    by_name = len(same) > 1 or described[same[0]]["weights"].get("source") == "random"
    if member.name not in same and by_name:
        raise StoreError(f"{where}: expected the name of a member with that encoder in the store, {' or '.join(same)}")
    name = member.name if member.name in same else same[0]
    if member.weights is not None and not _are_weights(member.weights, described[name]["weights"]):
        raise StoreError(
            f"{where}: expected the weights of the hidden states, "
            f"{described[name]['weights'].get('source', 'those of the store')}, found {member.weights}: leave weights "
            "out of the system, or give the checkpoint that the store was made with"
        )
    normalised = described[name].get("normalise", False)
    if (_normalises(member, normalised) if member.normalise is None else member.normalise) != normalised:
        raise StoreError(f"{where}: expected normalise = {str(normalised).lower()}, as the hidden states were computed")
    return described[name], states.find(name)


def _is_encoder(encoder: Any, described: Any) -> bool:
    """Whether a member's encoder is the one that ``run.json`` names: the same text, or path of the same folder."""
    if not isinstance(encoder, str) or not isinstance(described, str):
        return False
    both = Path(encoder), Path(described)
    return encoder == described or (all(map(is_folder, both)) and both[0].samefile(both[1]))


def _normalises(member: Member, default: bool) -> bool:
    """Whether a member that does not say so is normalised; the default of one that is not on this machine."""
    encoder = str(member.encoder)
    if encoder not in ENCODERS and not is_folder(checkpoint.find_folder(encoder)):
        return default
    return find_encoder(encoder).normalise


def _are_weights(weights: str, described: Mapping[str, Any]) -> bool:
    """Whether a member's weights are those that ``run.json`` describes: random ones, or a checkpoint."""
    if weights == "random":
        return described.get("source") == "random"
    folder = checkpoint.find_folder(weights)
    there = (folder / checkpoint.MANIFEST).is_file()
    return there and checkpoint.read_manifest(folder).fingerprint == described.get("fingerprint")


def _weights(where: str, member: Member, own: MemberStates) -> np.ndarray:
    """Weights [K] of the kept states, in float64."""
    if not own.num_states:
        return np.ones(1)
    weights = layer_weights(member.layers, own.num_states - 1)
    missing = [i for i in np.flatnonzero(weights).tolist() if i not in own.states]
    if missing:
        raise StoreError(
            f"{where}: expected layers among the hidden states that are stored ({', '.join(map(str, own.states))}), "
            f"found {', '.join(map(str, missing))}"
        )
    return weights[list(own.states)].astype(np.float64)


def _model(system: System, parts: Sequence[Part]) -> Model:
    """The system with encoders that return what is stored."""
    members = []
    for member, part in zip(system.members, parts, strict=True):
        own = part.states
        encoder, scenes = (
            StoredEncoder(grid.sample_rate, own.size, grid.frames, own.pooled_size)
            for grid in (own.grid, own.scene_grid)
        )
        same = own.grid == own.scene_grid or member.scene == "pooled"
        members.append(FusedMember(member.name, encoder, encoder if same else scenes, member.scene))
    fusion = Fusion(tuple(members), system.combination, system.feature_size, system.scene_groups)
    mesh = parallel.make_mesh(jax.local_devices()[:1])
    return Model(system, fusion, {}, {}, parallel.Compilation(mesh), "float32", platform_of(mesh.devices.flat))


@functools.partial(jax.jit, static_argnums=(1, 2))
def combine_stored(members: Any, combination: str, feature_size: int | None) -> tuple[jax.Array, jax.Array]:
    """Combine arrays that are stored, compiled once for each shape: see :func:`gura_jax.fusion.combine`."""
    return combine(members, combination, feature_size)
