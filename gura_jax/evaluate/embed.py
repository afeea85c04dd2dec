"""Embeddings of a task by systems, through the dataset store: each member is embedded once for all its systems."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.audio import resampled_length
from gura_jax.batching import bucket_length
from gura_jax.dataset.fused import combine_stored
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.run import open_run
from gura_jax.dataset.table import Settings
from gura_jax.dataset.workers import Worker, work
from gura_jax.errors import InputError, SystemConfigError
from gura_jax.evaluate.probes import Mixer
from gura_jax.evaluate.protocol import Lookup
from gura_jax.evaluate.task import Task
from gura_jax.fusion import COMBINATIONS, FusedMember, Keep, fused_size, resample_time
from gura_jax.loading import Size, Weights, find_weights, load_model, member_weights, outline
from gura_jax.model import Model
from gura_jax.models.encoder import Encoder
from gura_jax.models.families import ENCODERS
from gura_jax.systems import SYSTEMS, Member, System

LEARNED = "_learned"  # suffix of a system's name if its layer weights are learned
COMBINED_AT_ONCE = 4096  # clips
FAILURES_NAMED = 5

View = Literal["embeddings", "scene frames", "states"]
"""What is stored of a system: what ``embed`` stores; the frames averaged into scenes, if they differ from the timestamp
frames (CREPE); or beside the embeddings the mean over time of each hidden state."""


class Part(NamedTuple):
    """What is embedded once, into a store of its own, for all systems that need it."""

    name: str  # name of the store's folder
    system: System
    view: View = "embeddings"


class Embedded(NamedTuple):
    """Embeddings of a task, and their fingerprint; scores of another fingerprint are out of date."""

    lookup: Lookup
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class SystemEmbeddings:
    """A system's embeddings, fused from those of its members where possible.

    A system of several members is fused from its members' stored frames. For scenes, the members' mean frames suffice,
    as long as all operations that combine members are linear and the members' frames keep time; means are small. The
    rest (groups of frames, members in turn along time) is embedded as a whole.

    Attributes:
        system, weights, size: arguments of :func:`gura_jax.load_model`.
        learned: the probe learns the weights of the hidden states, instead of averaging them.
    """

    system: System
    weights: Weights = "pretrained"
    size: Size | None = None
    learned: bool = False

    @property
    def name(self) -> str:
        """The system's name, marked if it is tiny, random or learned."""
        return self._marked(self.system) + LEARNED * self.learned

    @functools.cached_property
    def outline(self) -> Model:
        """The model without its weights."""
        return outline(self.system, size=self.size)

    def parts(self, task: Task) -> tuple[Part, ...]:
        """List what has to be embedded for a task; nothing if the system cannot be evaluated on it."""
        if self.learned:
            part = Part(f"{self._marked(self.system)}-states", self.system, "states")
            return (part,) if task.embedding == "scene" else ()
        linear = self.system.scene_groups == 1 and COMBINATIONS[self.system.combination].linear_scenes
        if len(self.system.members) == 1 or (task.embedding == "scene" and not linear):
            return (Part(self._marked(self.system), self.system),)
        first = _time_base(self.outline)
        parts = []
        for member, fused in zip(self.system.members, self.outline.fusion.members, strict=True):
            system = self._alone(member, fused)
            own = fused.scene_encoder
            keeps_time = first is None or (own.sample_rate, own.grid) == (first.sample_rate, first.grid)
            if task.embedding == "event" or fused.scene == "pooled" or keeps_time:
                parts.append(Part(self._marked(system), system))
            else:
                parts.append(Part(f"{self._marked(system)}-scene-frames", system, "scene frames"))
        return tuple(parts)

    def _alone(self, member: Member, fused: FusedMember) -> System:
        """Return a member as a system, at the sample rate of this one: its audio is resampled in the same steps."""
        system, rate = _single(self.system, member), self.outline.sample_rate
        if rate == fused.encoder.sample_rate:
            return system
        return dataclasses.replace(system, name=f"{system.name}-{rate}Hz", sample_rate=rate)

    @property
    def random_members(self) -> list[str]:
        """The members with random weights."""
        chosen = member_weights(self.system, self.weights)
        return [m.name for m in self._loaded_members if chosen[m.name] == "random"]

    @property
    def _loaded_members(self) -> list[FusedMember]:
        """The members whose weights are loaded; others are objects that bring their own."""
        return [member for member in self.outline.fusion.members if member.config is not None]

    @property
    def averages_layers(self) -> bool:
        """Whether the system averages the hidden states of a single encoder, so that their weights can be learned."""
        (member, *others), encoder = self.system.members, self.outline.fusion.members[0].encoder
        return not others and encoder.num_states > 0 and member.layers != "last"

    def _marked(self, system: System) -> str:
        """Name the folder of this system, or of one of its members alone."""
        random = [m.name for m in system.members if m.name in self.random_members]
        marks = [self.size] if self.size else []
        if random:
            some = len(random) < len(system.members)
            marks.append("random" + "".join(f"-{name}" for name in random if some))
        return "-".join([system.name, *marks])

    def check(self) -> None:
        """Check that all weights exist, before other systems take their time.

        Raises:
            CheckpointError: weights are missing.
        """
        chosen = member_weights(self.system, self.weights)
        loaded = {member.name for member in self._loaded_members}
        for member in self.system.members:
            if member.name in loaded and chosen[member.name] != "random":
                find_weights(member, chosen[member.name])

    def load(self, part: Part) -> Callable[[Task, Path], None]:
        """Load a part; returns a function that embeds a task into a folder, or resumes.

        Raises:
            GuraError: see :func:`gura_jax.load_model`, and :func:`embed_task`.
        """
        names = {member.name for member in part.system.members}
        chosen = {k: v for k, v in member_weights(self.system, self.weights).items() if k in names}
        model = _viewed(load_model(part.system, weights=chosen, size=self.size), part)
        keep = Keep("mean") if part.view == "states" else None
        return functools.partial(embed_task, model, frames=part.view == "scene frames", keep=keep)

    def open(self, task: Task, folders: Sequence[Path]) -> Embedded:
        """Open the system's embeddings, in the folders of :meth:`parts`."""
        stores = [EmbeddingStore(folder) for folder in folders]
        fingerprints = [str(store.run["fingerprint"]) for store in stores]
        if self.learned:
            states = stores[0].states()
            rows = {name: states[i].ravel() for i, name in enumerate(stores[0].ids)}  # [K D]
            return Embedded(lambda split, file: (rows[task.clip_id(split, file)], None), fingerprints[0])
        if len(stores) == 1:
            return Embedded(functools.partial(_stored, stores[0], task), fingerprints[0])
        fusion = self.outline.fusion
        how = [fusion.combination, fusion.feature_size, fusion.scene_groups]
        together = hashlib.sha256(json.dumps([fingerprints, how]).encode()).hexdigest()
        if task.embedding == "event":
            return Embedded(functools.partial(_fused_frames, self.outline, stores, task), together)
        scenes = _fused_scenes(self.outline, stores, self.parts(task))
        return Embedded(lambda split, file: (scenes[task.clip_id(split, file)], None), together)

    @property
    def mixer(self) -> Mixer | None:
        """How hidden states are mixed, if their weights are learned."""
        return Mixer((_single_encoder(self.outline).num_states,)) if self.learned else None


def _single(system: System, member: Member) -> System:
    """Return a member as a system, equal for all systems that share it: a registered one, if there is one."""
    for known in SYSTEMS.values():
        if known == System(known.name, (member,)):
            return known
    plain = Member(member.name, member.layers, scene=member.scene)
    if member.name in ENCODERS and member == plain and isinstance(member.layers, str):
        pooled = ".pooled" if member.scene == "pooled" else ""
        return System(f"{member.name}.{member.layers}{pooled}", (member,))
    return System(f"{system.name}.{member.name}", (member,))


def _time_base(model: Model) -> Encoder | None:
    """Return the encoder whose frames set the rate at which members are averaged into scenes; None if all are pooled.

    See :func:`gura_jax.fusion.fuse`.
    """
    return next((member.scene_encoder for member in model.fusion.members if member.scene == "frames"), None)


def _viewed(model: Model, part: Part) -> Model:
    """Return the model that computes a part's view of its system."""
    if part.view != "scene frames":
        return model
    (member,) = model.fusion.members
    fusion = model.fusion._replace(members=(member._replace(encoder=member.scene_encoder),))
    system = dataclasses.replace(model.system, name=part.name)
    return Model(system, fusion, model.params, model.weights, model.compilation, model.dtype, model.platform)


def _single_encoder(model: Model) -> Encoder:
    """Return the encoder of a system of one, if it has hidden states."""
    first, *others = model.fusion.members
    if others or not first.encoder.num_states:
        raise SystemConfigError(
            f"learned layer weights: expected a system of one encoder with hidden states, found {model.system.name}"
        )
    return first.encoder


def embed_task(model: Model, task: Task, folder: Path, *, frames: bool = False, keep: Keep | None = None) -> None:
    """Embed a task's clips, or resume: scenes, and for an event task or with ``frames`` also frames.

    Args:
        model: the system.
        task: the task.
        folder: folder of the store.
        frames: store frames of a scene task too.
        keep: hidden states to store as well.

    Raises:
        InputError: clips cannot be embedded; ``failed.csv`` in the folder lists all of them.
        StoreError: the folder cannot be written, or holds other embeddings.
    """
    clips = task.table(model.sample_rate)
    frames = frames or task.embedding == "event"
    # Clips that failed may have been fixed since.
    run = open_run(model, clips, folder, Settings(timestamps=frames, keep=keep), retry_failed=True)
    failed = work(run, Worker(0, 1, "the only process")).failed
    if failed:
        raise InputError(
            f"{task.name}: expected to embed {len(clips)} clips, found that {len(failed)} of them cannot be "
            f"({folder / 'failed.csv'}): "
            + "; ".join(f"{failure.id}: {failure.reason}" for failure in failed[:FAILURES_NAMED])
        )


def _stored(embeddings: EmbeddingStore, task: Task, split: str, file: str) -> tuple[np.ndarray, np.ndarray | None]:
    clip = embeddings[task.clip_id(split, file)]
    return (clip.scene, None) if clip.frames is None else (clip.frames, clip.times)


def _fused_frames(
    model: Model, stores: Sequence[EmbeddingStore], task: Task, split: str, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """Fuse the members' frames of one clip, as a model would; returns frames [T, D] and times [T]."""
    clips = [embeddings[task.clip_id(split, file)] for embeddings in stores]
    members = []
    for clip in clips:
        assert clip.frames is not None
        padded = np.zeros((1, bucket_length(len(clip.frames)), clip.frames.shape[1]), np.float32)
        padded[0, : len(clip.frames)] = clip.frames
        members.append((padded, np.array([len(clip.frames)], np.int32)))
    how = model.fusion.combination, model.fusion.feature_size
    frames, count = jax.device_get(combine_stored(members, *how))
    return frames[0, : count[0]], model.timestamps(int(clips[0].meta["num_samples"]))


def _fused_scenes(model: Model, stores: Sequence[EmbeddingStore], parts: Sequence[Part]) -> Mapping[str, np.ndarray]:
    """Fuse the members' scene embeddings; returns scenes by clip id."""
    names = stores[0].ids
    samples = stores[0].meta["num_samples"].to_pylist()
    fusion, first = model.fusion, _time_base(model)
    vectors = []
    for embeddings, part in zip(stores, parts, strict=True):
        if part.view == "embeddings":
            rows = {name: i for i, name in enumerate(embeddings.ids)}
            vectors.append(embeddings.scenes()[[rows[name] for name in names]])
            continue
        assert first is not None  # otherwise no part has frames
        own = np.zeros((len(names), int(embeddings.run["timestamp_embedding_size"])), np.float32)
        for i, (name, length) in enumerate(zip(names, samples, strict=True)):
            frames = embeddings[name].frames
            assert frames is not None
            count = first.grid.count(resampled_length(length, model.sample_rate, first.sample_rate))
            own[i] = _time_weights(len(frames), count) @ frames
        vectors.append(own)
    size = fused_size([x.shape[1] for x in vectors], fusion.combination, fusion.feature_size)
    fused = np.zeros((len(names), size), np.float32)
    for start in range(0, len(names), COMBINED_AT_ONCE):
        some = [x[start : start + COMBINED_AT_ONCE, None] for x in vectors]  # [n, 1, D]
        members = [(x, np.ones(len(x), np.int32)) for x in some]
        combined, _ = combine_stored(members, fusion.combination, fusion.feature_size)
        fused[start : start + COMBINED_AT_ONCE] = combined[:, 0]
    return dict(zip(names, fused, strict=True))


@functools.lru_cache(maxsize=4096)
def _time_weights(count: int, new_count: int) -> np.ndarray:
    """Weigh frames, [count], so that their weighted sum is the mean after resampling to ``new_count`` frames."""
    before, after = (jnp.array([n], jnp.int32) for n in (count, new_count))
    weights = resample_time(jnp.eye(count, dtype=jnp.float32)[None], before, after, new_count)[0]
    return np.asarray(weights).mean(0, dtype=np.float64).astype(np.float32)
