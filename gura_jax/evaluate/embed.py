"""Embeddings of a task by systems, through the dataset store: each encoder's once, for all systems that have it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.dataset.manifest import printable, read_inputs
from gura_jax.dataset.run import Settings, open_run
from gura_jax.dataset.store import EmbeddingStore
from gura_jax.dataset.workers import Worker, work
from gura_jax.errors import InputError, SystemConfigError
from gura_jax.evaluate.protocol import Lookup
from gura_jax.evaluate.tasks import Task
from gura_jax.fusion import FusedMember, Fusion, combine, fused_size, resample_time
from gura_jax.model import Model, Weights, find_weights, load_model, member_weights, outline
from gura_jax.models.encoder import Encoder
from gura_jax.models.speech import LayerMeans, SpeechFrames
from gura_jax.parallel import bucket_length
from gura_jax.systems import ENCODERS, SYSTEMS, Member, System

LEARNED = "_learned"  # what the name of a system ends in whose layer weights are learned
COMBINED_AT_ONCE = 4096  # clips
FAILURES_NAMED = 5

View = Literal["embeddings", "scene frames", "layer means"]
"""What of a system is stored: what ``embed`` stores; the frames that its scene embeddings are the means of, where they
are not the timestamp embeddings' (CREPE's); or the mean over time of each hidden state."""


class Part(NamedTuple):
    """What is embedded by itself, in a store of its own, once for all systems that are made of it."""

    name: str  # of its folder
    system: System
    view: View = "embeddings"


class Embedded(NamedTuple):
    """Embeddings of a task, and what they are: with others, scores are others."""

    lookup: Lookup
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class SystemEmbeddings:
    """A system's embeddings, put together from those of its members where they can be.

    A system of several members is fused from its members' stored frames. For scenes of speech encoders, whose frames
    keep time with the first member's, their mean is enough, as everything that combines members is linear; so what is
    stored of them is small. What cannot be taken from means, groups of frames and members in turn along time, is
    embedded as a whole.

    Attributes:
        system, weights, size: as :func:`gura_jax.load_model` takes them.
        learned: layers are not averaged, but weighted as the probe learns: for a system with one speech encoder.
    """

    system: System
    weights: Weights = "pretrained"
    size: Literal["tiny"] | None = None
    learned: bool = False

    @property
    def name(self) -> str:
        """The system's name, with what is tiny, random or learned."""
        return self._marked(self.system) + LEARNED * self.learned

    @functools.cached_property
    def outline(self) -> Model:
        """The model without its weights."""
        return outline(self.system, size=self.size)

    def parts(self, task: Task) -> tuple[Part, ...]:
        """What has to be embedded for a task; nothing where the task is none for it."""
        if self.learned:
            part = Part(f"{self._marked(self.system)}-layer-means", self.system, "layer means")
            return (part,) if task.embedding == "scene" else ()
        alone = [_alone(self.system, member) for member in self.system.members]
        if len(alone) == 1 or (task.embedding == "scene" and not self._scenes_are_linear):
            return (Part(self._marked(self.system), self.system),)
        if task.embedding == "event":
            return tuple(Part(self._marked(system), system) for system in alone)
        first, *others = [member.scene_encoder for member in self.outline.fusion.members]
        parts = [Part(self._marked(alone[0]), alone[0])]
        for system, encoder in zip(alone[1:], others, strict=True):
            if (encoder.hop, encoder.min_samples) == (first.hop, first.min_samples):
                parts.append(Part(self._marked(system), system))
            else:
                parts.append(Part(f"{self._marked(system)}-scene-frames", system, "scene frames"))
        return tuple(parts)

    @property
    def _scenes_are_linear(self) -> bool:
        return self.system.scene_groups == 1 and self.system.combination != "interleave_time"

    @property
    def random_members(self) -> list[str]:
        """The members whose weights are random."""
        chosen = member_weights(self.system, self.weights)
        return [m.name for m in self.system.members if isinstance(m.encoder, str) and chosen[m.name] == "random"]

    @property
    def averages_layers(self) -> bool:
        """Whether this is one speech encoder with several layers: weights of them can be learned."""
        encoders = [member.encoder for member in self.outline.fusion.members]
        return len(encoders) == 1 and isinstance(encoders[0], SpeechFrames) and encoders[0].layers != "last"

    def _marked(self, system: System) -> str:
        """A name for a folder: of what this system is, or a member by itself."""
        random = [m.name for m in system.members if m.name in self.random_members]
        marks = [self.size] if self.size else []
        if random:
            some = len(random) < len(system.members)
            marks.append("random" + "".join(f"-{name}" for name in random if some))
        return "-".join([system.name, *marks])

    def check(self) -> None:
        """See that weights are there: better now than after the other systems.

        Raises:
            CheckpointError: they are not.
        """
        chosen = member_weights(self.system, self.weights)
        for member in self.system.members:
            if isinstance(member.encoder, str) and chosen[member.name] != "random":
                find_weights(member, chosen[member.name])

    def load(self, part: Part) -> Callable[[Task, Path], None]:
        """Load a part: a function that embeds a task into a folder, or goes on with it.

        Raises:
            GuraError: see :func:`gura_jax.load_model`, and :func:`embed_task`.
        """
        names = {member.name for member in part.system.members}
        chosen = {k: v for k, v in member_weights(self.system, self.weights).items() if k in names}
        model = _viewed(load_model(part.system, weights=chosen, size=self.size), part)
        return functools.partial(embed_task, model, frames=part.view == "scene frames")

    def open(self, task: Task, folders: Sequence[Path]) -> Embedded:
        """The system's embeddings, from the folders of :meth:`parts`."""
        stores = [EmbeddingStore(folder) for folder in folders]
        fingerprints = [str(store.run["fingerprint"]) for store in stores]
        if len(stores) == 1:
            return Embedded(functools.partial(_stored, stores[0], task), fingerprints[0])
        fusion = self.outline.fusion
        how = [fusion.combination, fusion.feature_size, fusion.scene_groups]
        together = hashlib.sha256(json.dumps([fingerprints, how]).encode()).hexdigest()
        if task.embedding == "event":
            return Embedded(functools.partial(_fused_frames, self.outline, stores, task), together)
        scenes = _fused_scenes(fusion, stores, self.parts(task))
        return Embedded(lambda split, file: (scenes[_id(task, split, file)], None), together)

    @property
    def num_states(self) -> int:
        """Hidden states whose weights are learned; 0: none."""
        return _layer_means(self.outline, self.outline.fusion.members[0].encoder).num_states if self.learned else 0


def _alone(system: System, member: Member) -> System:
    """A member as a system, the same for all systems that have it: a registered one, where there is one."""
    for known in SYSTEMS.values():
        if known == System(known.name, (member,)):
            return known
    if member.name in ENCODERS and member == Member(member.name, member.layers) and isinstance(member.layers, str):
        return System(f"{member.name}.{member.layers}", (member,))
    return System(f"{system.name}.{member.name}", (member,))


def _viewed(model: Model, part: Part) -> Model:
    """The model that computes a part's view of its system."""
    if part.view == "embeddings":
        return model
    (member,) = model.fusion.members
    encoder = member.scene_encoder if part.view == "scene frames" else _layer_means(model, member.encoder)
    fusion = model.fusion._replace(members=(FusedMember(member.name, encoder, encoder),))
    system = dataclasses.replace(model.system, name=part.name)
    return Model(system, fusion, model.params, model.weights, model.compilation, model.dtype)


def _layer_means(model: Model, encoder: Encoder) -> LayerMeans:
    if len(model.fusion.members) != 1 or not isinstance(encoder, SpeechFrames):
        raise SystemConfigError(f"learned layer weights: expected one speech encoder, found {model.system.name}")
    return LayerMeans(encoder)


def embed_task(model: Model, task: Task, folder: Path, *, frames: bool = False) -> None:
    """Embed a task's clips, or go on with it: scenes, and frames for an event task or where they are asked for.

    Args:
        model: the system.
        task: as read.
        folder: of the store.
        frames: store frames of a scene task too.

    Raises:
        InputError: clips that cannot be embedded; ``failed.csv`` in the folder has all of them.
        StoreError: the folder cannot be written, or holds other embeddings.
    """
    clips = read_inputs([task.folder]).drop_columns(["labels"])  # embeddings stay where labels change
    frames = frames or task.embedding == "event"
    # What failed may have been mended meanwhile.
    run = open_run(model, clips, folder, Settings(timestamps=frames), retry_failed=True)
    failed = work(run, Worker(0, 1, "the only process")).failed
    if failed:
        raise InputError(
            f"{task.name}: expected to embed {len(clips)} clips, found that {len(failed)} of them cannot be "
            f"({folder / 'failed.csv'}): "
            + "; ".join(f"{failure.id}: {failure.reason}" for failure in failed[:FAILURES_NAMED])
        )


def _id(task: Task, split: str, file: str) -> str:
    return printable(f"{task.name}/{split}/{file}")


def _stored(embeddings: EmbeddingStore, task: Task, split: str, file: str) -> tuple[np.ndarray, np.ndarray | None]:
    clip = embeddings[_id(task, split, file)]
    return (clip.scene, None) if clip.frames is None else (clip.frames, clip.times)


def _fused_frames(
    model: Model, stores: Sequence[EmbeddingStore], task: Task, split: str, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, D] of one clip and their times: the members' frames, combined as when all are computed at once."""
    clips = [embeddings[_id(task, split, file)] for embeddings in stores]
    members, counts = [], []
    for clip in clips:
        assert clip.frames is not None
        padded = np.zeros((1, bucket_length(len(clip.frames)), clip.frames.shape[1]), np.float32)
        padded[0, : len(clip.frames)] = clip.frames
        members.append(padded)
        counts.append(np.array([len(clip.frames)], np.int32))
    how = model.fusion.combination, model.fusion.feature_size
    frames, count = jax.device_get(_combine(members, counts, *how))
    return frames[0, : count[0]], model.timestamps(int(clips[0].meta["num_samples"]))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _combine(members: Any, counts: Any, combination: str, feature_size: int | None) -> tuple[jax.Array, jax.Array]:
    return combine(list(zip(members, counts, strict=True)), combination, feature_size)


def _fused_scenes(fusion: Fusion, stores: Sequence[EmbeddingStore], parts: Sequence[Part]) -> Mapping[str, np.ndarray]:
    """Scene embeddings by id: the members' means over time, combined."""
    names = stores[0].ids
    samples = stores[0].meta["num_samples"].to_pylist()
    first = fusion.members[0].scene_encoder
    means = [stores[0].scenes()]
    for embeddings, part in zip(stores[1:], parts[1:], strict=True):
        if part.view == "embeddings":
            rows = {name: i for i, name in enumerate(embeddings.ids)}
            means.append(embeddings.scenes()[[rows[name] for name in names]])
            continue
        own = np.zeros((len(names), int(embeddings.run["timestamp_embedding_size"])), np.float32)
        for i, (name, length) in enumerate(zip(names, samples, strict=True)):
            frames = embeddings[name].frames
            assert frames is not None
            own[i] = _time_weights(len(frames), 1 + (length - first.min_samples) // first.hop) @ frames
        means.append(own)
    size = fused_size([x.shape[1] for x in means], fusion.combination, fusion.feature_size)
    fused = np.zeros((len(names), size), np.float32)
    for start in range(0, len(names), COMBINED_AT_ONCE):
        some = [x[start : start + COMBINED_AT_ONCE, None] for x in means]  # [n, 1, D]
        ones = [np.ones(len(x), np.int32) for x in some]
        fused[start : start + COMBINED_AT_ONCE] = _combine(some, ones, fusion.combination, fusion.feature_size)[0][:, 0]
    return dict(zip(names, fused, strict=True))


@functools.lru_cache(maxsize=4096)
def _time_weights(count: int, new_count: int) -> np.ndarray:
    """How much each of so many frames weighs in the mean of as many as they are resampled to, [count]."""
    before, after = (jnp.array([n], jnp.int32) for n in (count, new_count))
    weights = resample_time(jnp.eye(count, dtype=jnp.float32)[None], before, after, new_count)[0]
    return np.asarray(weights).mean(0, dtype=np.float64).astype(np.float32)
