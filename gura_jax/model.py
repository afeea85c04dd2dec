"""The model: a system with its weights, on the devices; a pytree whose leaves are the weights."""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gura_jax import batching, checkpoint, files, parallel
from gura_jax.audio import check_audio, min_samples, resampled_length, samples_before
from gura_jax.backend import Platform
from gura_jax.errors import AudioError, CheckpointError, StoreError, SystemConfigError, expected
from gura_jax.fusion import COMBINATIONS, Embeddings, FusedMember, Fusion, Keep, Wanted, fuse, fused_size
from gura_jax.models.encoder import DTypeName, Encoder, Noise
from gura_jax.models.families import build_encoder
from gura_jax.systems import System

BATCH_SIZE = 16  # clips
PITCH = "pitch activation"  # the part of CREPE's that pitch_activation gives
PITCH_HOP = 160  # samples: 10 ms, CREPE's own

Audio = np.ndarray | jax.Array | Sequence[np.ndarray]
"""[n, samples] at the model's rate in [-1, 1], or a list of 1-D clips of any lengths."""


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything of a model but its weights; models that share it share compiled functions."""

    system: System
    fusion: Fusion
    weights: Mapping[str, Mapping[str, Any]]
    compilation: parallel.Compilation
    dtype: DTypeName
    platform: Platform
    functions: dict[Any, parallel.BatchFunction] = dataclasses.field(default_factory=dict, compare=False)

    def __hash__(self) -> int:
        return hash((self.system.name, self.compilation, self.dtype))


@jax.tree_util.register_pytree_node_class
class Model:
    """An embedding system with its weights, on the devices; made by :func:`gura_jax.load_model`.

    A pytree: its leaves are the weights, so it passes through ``jax.jit``, ``jax.grad`` and optax as it is.

    Attributes:
        system: its description.
        fusion: its encoders and how they are combined.
        compilation: the devices, and how functions are compiled for them.
        dtype: of convolutions and matrix products.
        platform: the row of :mod:`gura_jax.backend` that it computes by.
        sample_rate: of the audio that it takes, in Hz.
        rates: those that its members take, in Hz.
        timestamp_embedding_size: D, the size of a frame.
        scene_embedding_size: S, the size of a scene embedding.
        min_samples: the shortest clip that has a frame, in samples.
        min_scene_samples: the shortest clip that has a scene embedding, in samples.
        least: a clip of fewer samples costs as much as one of so many, where a member fills clips up.
    """

    def __init__(
        self,
        system: System,
        fusion: Fusion,
        params: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Any]],
        compilation: parallel.Compilation,
        dtype: DTypeName,
        platform: Platform,
    ) -> None:
        self._begin(_Static(system, fusion, weights, compilation, dtype, platform), params, loaded=True)

    def _begin(self, static: _Static, params: Any, *, loaded: bool) -> None:
        self._static, self._params, self._loaded = static, params, loaded
        self._derived: dict[str, Any] | None = None
        self.system, self.fusion, self.compilation = static.system, static.fusion, static.compilation
        self.platform = static.platform
        self.dtype: DTypeName = static.dtype
        fusion = static.fusion
        self.rates = fusion.rates
        self.sample_rate = static.system.sample_rate or self.rates[0]
        self.min_samples = max(self._shortest(m, pooled=False) for m in fusion.members)
        first = fusion.members[0].scene_encoder
        self._fixed_frames = COMBINATIONS[fusion.combination].fixed_frames(len(fusion.members))
        # With a fixed number of frames, every clip has enough for the groups.
        groups = 0 if self._fixed_frames is not None else fusion.scene_groups - 1
        enough = samples_before(first.grid.window + groups * first.grid.hop, self.sample_rate, first.sample_rate)
        needed = [self._shortest(m, pooled=m.scene == "pooled") for m in fusion.members]
        self.min_scene_samples = max(*needed, enough if groups else 0)
        encoders = [e for m in fusion.members for e in (m.encoder, m.scene_encoder)]
        self.least = max(samples_before(e.least, self.sample_rate, e.sample_rate) for e in encoders)
        frame_sizes = [m.encoder.feature_size for m in fusion.members]
        scene_sizes = [m.encoder.pooled_size if m.scene == "pooled" else m.encoder.feature_size for m in fusion.members]
        self.timestamp_embedding_size = fused_size(frame_sizes, fusion.combination, fusion.feature_size)
        scene_size = fused_size(scene_sizes, fusion.combination, fusion.feature_size)
        self.scene_embedding_size = fusion.scene_groups * scene_size

    def _shortest(self, member: FusedMember, *, pooled: bool) -> int:
        """Samples that a member needs for a frame, or for its embedding of the clip."""
        needed = [min_samples(self.sample_rate)]
        for encoder in (member.encoder, member.scene_encoder):
            own = encoder.shortest_pooled if pooled else None
            own = max(encoder.grid.window, encoder.shortest) if own is None else own
            needed.append(samples_before(own, self.sample_rate, encoder.sample_rate))
        return max(needed)

    def shortest(self, *, frames: bool, scenes: bool) -> int:
        """Samples that a clip needs for what is asked for."""
        return max(self.min_samples if frames else 0, self.min_scene_samples if scenes else 0)

    def tree_flatten(self) -> tuple[tuple[Any], _Static]:
        """The weights, and the rest."""
        return (self.params,), self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, children: tuple[Any]) -> "Model":
        """A model with other weights."""
        model = object.__new__(cls)
        model._begin(static, children[0], loaded=False)
        return model

    @property
    def params(self) -> Mapping[str, Any]:
        """The weights on the devices, by member and dotted path; :meth:`with_params` changes them."""
        return self._params

    def with_params(self, params: Mapping[str, Any]) -> "Model":
        """The model with other weights of the same shapes, as after a step of optax.

        Weights that are not on the model's devices yet, such as NumPy arrays, are put there.
        """
        if jax.tree.structure(params) != jax.tree.structure(self.params):
            raise SystemConfigError(
                f"params: expected the weights of {', '.join(self.params)} by the same names as model.params has, "
                "found others"
            )
        for (path, own), new in zip(jax.tree.leaves_with_path(self.params), jax.tree.leaves(params), strict=True):
            if np.shape(new) != own.shape:
                name = jax.tree_util.keystr(path, simple=True, separator=": ")
                raise SystemConfigError(f"params: {name}: expected {list(own.shape)}, found {list(np.shape(new))}")
        mesh = self.compilation.mesh

        def placed(leaf: Any, own: Any) -> Any:
            there = isinstance(leaf, jax.Array) and (
                isinstance(leaf, Tracer) or leaf.sharding.device_set == set(mesh.devices.flat)
            )
            if there:
                return leaf
            return jax.device_put(leaf, parallel.replicated(mesh) if isinstance(own, Tracer) else own.sharding)

        return self.tree_unflatten(self._static, (jax.tree.map(placed, params, self.params),))

    @property
    def weights(self) -> Mapping[str, Mapping[str, Any]]:
        """Where each member's weights came from, by member."""
        if self._loaded:
            return self._static.weights
        return {name: {"source": _changed(w["source"])} for name, w in self._static.weights.items()}

    @property
    def random_members(self) -> list[str]:
        """The members whose weights are random, and whose embeddings are therefore meaningless."""
        return [name for name, weights in self.weights.items() if weights["source"] == "random"]

    def __repr__(self) -> str:
        random = f", random weights: {', '.join(self.random_members)}" if self.random_members else ""
        return (
            f"<gura_jax.Model {self.system.name}: frames of {self.timestamp_embedding_size}, "
            f"scenes of {self.scene_embedding_size}{random}>"
        )

    def __call__(
        self, audio: Any, lengths: Any, *, scenes: bool = True, frames: bool = True, keep: Keep | None = None
    ) -> Embeddings:
        """The compiled function: one padded batch, on the devices, unchecked.

        Args:
            audio: [B, N] float32; of a model with several rates a mapping from each of them, as :meth:`pad` makes it.
            lengths: [B] int32, samples in each clip; likewise.
            scenes, frames: what to compute.
            keep: hidden states to return as well, beside scenes.

        Returns:
            :class:`gura_jax.fusion.Embeddings`: frames [B, T, D], counts [B], scenes [B, S] and states, as asked for.
        """
        wanted: set[Wanted] = set()
        if frames:
            wanted.add("frames")
        if scenes:
            wanted.add("scenes")
        key = frozenset(wanted)
        call = self._compiled((key, keep), functools.partial(fuse, self.fusion, key, keep=keep))
        return call(self._inputs(), *self._by_rate(audio, lengths))

    def fuse(self, params: Mapping[str, Any], audio: Any, lengths: Any, noise: Noise | None = None) -> Embeddings:
        """The same as a pure function of the weights, not compiled: for gradients, ``jax.vmap`` and the like.

        Args:
            params: as ``params`` of the model.
            audio, lengths: as in a call.
            noise: dropout and masks, in training.
        """
        return fuse(self.fusion, frozenset({"frames", "scenes"}), params, *self._by_rate(audio, lengths), noise)

    def pad(self, clips: Sequence[np.ndarray | None], rows: int, samples: int) -> batching.Padded:
        """Clips at ``sample_rate`` in one batch for :meth:`__call__`: see :func:`gura_jax.batching.pad`."""
        return batching.pad(clips, rows, samples, sample_rate=self.sample_rate, rates=self.rates)

    def _by_rate(self, audio: Any, lengths: Any) -> tuple[Mapping[int, Any], Mapping[int, Any]]:
        if not isinstance(audio, Mapping):
            audio, lengths = {self.sample_rate: audio}, {self.sample_rate: lengths}
        if set(audio) != set(self.rates) or set(lengths) != set(self.rates):
            raise SystemConfigError(
                f"audio and lengths: expected those at {', '.join(map(str, self.rates))} Hz, by rate, found those at "
                f"{', '.join(map(str, audio))} Hz: model.pad makes them"
            )
        return audio, lengths

    def _inputs(self) -> Mapping[str, Any]:
        """The weights with what is derived from them once; without it where they are traced."""
        if self._derived is None:
            if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self.params)):
                return self.params
            with jax.ensure_compile_time_eval():  # arrays, also where this call is traced
                self._derived = {m.name: m.encoder.derive(self.params[m.name]) for m in self.fusion.members}
        derived = self._derived
        return {name: {**own, **derived[name]} if derived[name] else own for name, own in self.params.items()}

    def _compiled(self, key: Any, function: parallel.BatchFunction) -> parallel.BatchFunction:
        """Compile a function once."""
        functions = self._static.functions
        if key not in functions:
            functions[key] = parallel.compile_batch(function, self.compilation)
        return functions[key]

    def embed(
        self, audio: Audio, *, frames: bool = True, scenes: bool = True, batch_size: int = BATCH_SIZE
    ) -> list["ClipEmbedding"]:
        """Embed clips, each with its frames, times and scene; in the order given.

        Raises:
            AudioError: see :func:`gura_jax.audio.check_audio`; or a clip shorter than
                ``min_samples``, or than ``min_scene_samples`` where scenes are wanted.
        """

        def compute(batch: batching.Padded, samples: Sequence[int]) -> list[ClipEmbedding]:
            out = jax.device_get(self(*batch, frames=frames, scenes=scenes))
            return [
                ClipEmbedding(
                    *((out.frames[b, : out.counts[b]], self.timestamps(n)) if frames else (None, None)),
                    out.scenes[b] if scenes else None,
                )
                for b, n in enumerate(samples)
            ]

        shortest = self.shortest(frames=frames, scenes=scenes)
        return self._batches(audio, compute, batch_size, shortest, self.rates)

    def timestamp_embeddings(self, audio: Audio, *, batch_size: int = BATCH_SIZE) -> tuple[Any, Any]:
        """Frames and their times.

        Args:
            audio: [n, samples] at ``sample_rate`` in [-1, 1], or a list of 1-D clips of any lengths.
            batch_size: clips computed at once.

        Returns:
            frames [n, T, D] float32 and times [n, T] in milliseconds, or for a list of clips two lists of
            [T, D] and [T].

        Raises:
            AudioError: audio of another rank, type or range, with NaN, or shorter than ``min_samples``.
        """
        clips = self.embed(audio, scenes=False, batch_size=batch_size)
        return _like(audio, [c.frames for c in clips]), _like(audio, [c.times for c in clips])

    def scene_embeddings(self, audio: Audio, *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """One embedding a clip: [n, S] float32. Arguments and errors as :meth:`timestamp_embeddings`."""
        return np.stack([np.asarray(c.scene) for c in self.embed(audio, frames=False, batch_size=batch_size)])

    def hidden_states(
        self,
        audio: Audio,
        *,
        member: str | None = None,
        states: Iterable[int] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Any:
        """Hidden states of an encoder that has them.

        Args:
            audio: as in :meth:`timestamp_embeddings`.
            member: its name; by default the system's first that has hidden states.
            states: which, 0 being the transformer's input and L the last block's output; by default all.
            batch_size: clips computed at once.

        Returns:
            [n, K, T, D] float32, or for a list of clips a list of [K, T, D].
        """
        chosen_member = self._member(lambda encoder: encoder.num_states > 0, member, "hidden states")
        num_states = chosen_member.encoder.num_states
        try:
            chosen = tuple(range(num_states) if states is None else map(operator.index, states))
        except TypeError:
            chosen = ()
        if not chosen or not all(-num_states <= s < num_states for s in chosen):
            raise SystemConfigError(
                f"states: expected integers from 0 to {num_states - 1} (or negative, from the end), found {states!r}"
            )
        names = tuple(f"state {s % num_states}" for s in chosen)
        out = self._parts(audio, chosen_member.name, chosen_member.encoder, names, batch_size)
        return _like(audio, [np.stack(parts) for parts in out])

    def pitch_activation(self, audio: Audio, *, hop: int = PITCH_HOP, batch_size: int = BATCH_SIZE) -> Any:
        """Activation of CREPE's 360 pitch bins every ``hop`` samples; :func:`gura_jax.models.crepe.pitch` decodes.

        Returns:
            [n, T, 360] float32 in (0, 1), or for a list of clips a list of [T, 360].
        """
        if not isinstance(hop, int) or isinstance(hop, bool) or hop < 1:
            raise SystemConfigError(f"hop: expected a positive number of samples, found {hop!r}")
        member = self._member(lambda encoder: PITCH in encoder.parts, None, "a pitch activation (CREPE)")
        encoder = member.encoder
        if member.config is not None:
            encoder = build_encoder(member.config, dataclasses.replace(member.options, hop=hop))
        return _like(audio, [pitch for (pitch,) in self._parts(audio, member.name, encoder, (PITCH,), batch_size)])

    def timestamps(self, samples: int) -> np.ndarray:
        """Times [T] of a clip's frames, in milliseconds: the centre of what each frame's convolutions see."""
        fixed = self._fixed_frames
        if fixed is not None:  # spread evenly
            return (np.arange(fixed) + 0.5) * (samples / fixed) * (1000 / self.sample_rate)
        first = self.fusion.members[0].encoder
        return first.grid.times(resampled_length(samples, self.sample_rate, first.sample_rate), first.sample_rate)

    def num_frames(self, samples: int) -> int:
        """T, the number of a clip's frames."""
        if self._fixed_frames is not None:
            return self._fixed_frames
        first = self.fusion.members[0].encoder
        return first.grid.count(resampled_length(samples, self.sample_rate, first.sample_rate))

    def check(self, audio: Audio, min_samples: int) -> list[np.ndarray]:
        """The clips, each [samples] float32.

        Raises:
            AudioError: see :func:`gura_jax.audio.check_audio`; or a clip shorter than ``min_samples``.
        """
        clips = check_audio(audio, sample_rate=self.sample_rate)
        for i, clip in enumerate(clips):
            if len(clip) < min_samples:
                raise AudioError(
                    f"audio[{i}]: expected at least {min_samples} samples "
                    f"({1000 * min_samples / self.sample_rate:g} ms) for {self.system.name}, found {len(clip)}"
                )
        return clips

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model with the weights that it has now, whole or not at all; :func:`load_model` reads it.

        The folder holds the system's description and a checkpoint for each member, whose manifest says what its
        weights were changed from. Weights that are held in bfloat16 are written as they are, in float32.

        Args:
            path: of the folder.
            overwrite: replace what is there.

        Raises:
            CheckpointError: ``path`` exists and is not to be replaced, or cannot be written.
            SystemConfigError: a member that is an object, of no registered family, or whose name no folder can have.
        """
        objects = [m.name for m in self.fusion.members if m.config is None]
        if objects:
            raise SystemConfigError(
                f"member {objects[0]!r} is a Python object: expected an encoder of a registered family, whose "
                "config can be written (gura_jax.register)"
            )
        for name in (m.name for m in self.fusion.members):
            if name == checkpoint.SAVED_SYSTEM or not files.is_plain_name(name):
                raise SystemConfigError(f"member {name!r}: expected the name of a folder to save it in, found another")
        if parallel.is_several_processes(self.compilation.mesh):
            raise SystemConfigError("a model on the devices of several processes: expected one process to save it from")
        folder = Path(path)
        files.recover_folder(folder)
        if folder.exists() and not overwrite:
            raise CheckpointError(f"{folder} exists already: remove it, or pass overwrite=True")
        if folder.exists() and not (folder / checkpoint.SAVED_SYSTEM).is_file():
            raise CheckpointError(
                f"{folder}: expected a saved model to overwrite ({checkpoint.SAVED_SYSTEM}), found something else: "
                "choose another folder"
            )
        restored = {m.name: m.encoder.restore(self.params[m.name]) for m in self.fusion.members}
        for member in self.fusion.members:
            _check_weights(member, restored[member.name])
        try:
            with files.new_folder(folder) as temporary:
                for member in self.fusion.members:
                    params = restored.pop(member.name)
                    checkpoint.save(temporary / member.name, params, self._manifest(member, params))
                files.write_json(temporary, checkpoint.SAVED_SYSTEM, self._description())
        except (OSError, StoreError) as error:
            raise CheckpointError(f"cannot write the model {folder}: {error}") from None

    def _manifest(self, member: FusedMember, params: Mapping[str, jax.Array]) -> checkpoint.Manifest:
        given = self._static.weights[member.name]
        return checkpoint.Manifest(
            architecture=member.config,
            source=self.weights[member.name]["source"],
            source_sha256={"checkpoint": given["fingerprint"]} if "fingerprint" in given else {},
            converter_version=version("gura-jax"),
            arrays_sha256=checkpoint.arrays_sha256(params),
            normalise=member.options.normalise,
        )

    def _description(self) -> dict[str, Any]:
        """The system with each member's checkpoint beside it, as :func:`gura_jax.systems.read_system` reads it."""
        content = {f.name: getattr(self.system, f.name) for f in dataclasses.fields(self.system)}
        members = [
            {"encoder": f"./{m.name}", "name": m.name, "layers": m.layers, "scene": m.scene}
            for m in self.system.members
        ]
        return {k: v for k, v in content.items() if v is not None} | {"members": members}

    def _member(self, has: Callable[[Encoder], bool], name: str | None, what: str) -> FusedMember:
        members = {m.name: m for m in self.fusion.members if has(m.encoder)}
        if not members:
            raise SystemConfigError(f"system {self.system.name!r} has no member with {what}")
        if name is not None and name not in members:
            raise SystemConfigError(f"member {expected(name, members)}")
        return members[name] if name is not None else next(iter(members.values()))

    def _parts(
        self, audio: Audio, name: str, encoder: Encoder, parts: tuple[str, ...], batch_size: int
    ) -> list[list[np.ndarray]]:
        """Named parts of one member's computation for each clip, [T, ...] each, without the padding."""
        rate = encoder.sample_rate

        def function(params: Any, audio: Mapping[int, Any], lengths: Mapping[int, Any]) -> Any:
            found: dict[str, Any] = {}
            for part, value, counts in encoder.states(params[name], audio[rate], lengths[rate]):
                if part in parts:
                    found[part] = value, counts
                if len(found) == len(set(parts)):  # later parts are not even traced
                    break
            return [found[part] for part in parts]

        call = self._compiled((name, encoder, parts), function)

        def compute(batch: batching.Padded, samples: Sequence[int]) -> list[list[np.ndarray]]:
            out = jax.device_get(call(self._inputs(), *batch))
            return [[value[b, : counts[b]] for value, counts in out] for b in range(len(samples))]

        shortest = samples_before(max(encoder.grid.window, encoder.shortest), self.sample_rate, rate)
        return self._batches(audio, compute, batch_size, shortest, (rate,))

    def _batches(
        self,
        audio: Audio,
        compute: Callable[[batching.Padded, Sequence[int]], list[Any]],
        batch_size: int,
        min_samples: int,
        rates: Sequence[int],
    ) -> list[Any]:
        """Check the clips, compute them in batches of like length at these rates, and put the results in order."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SystemConfigError(f"batch_size: expected a positive number of clips, found {batch_size!r}")
        clips = self.check(audio, min_samples)
        results: list[Any] = [None] * len(clips)
        for packed in batching.pack(
            [len(clip) for clip in clips],
            batch_size,
            self.compilation.batch_devices,
            platform=self.platform,
            sample_rate=self.sample_rate,
            least=self.least,
        ):
            chosen = [clips[i] for i in packed.clips]
            batch = batching.pad(chosen, packed.rows, packed.samples, sample_rate=self.sample_rate, rates=rates)
            for i, result in zip(packed.clips, compute(batch, [len(clip) for clip in chosen]), strict=True):
                results[i] = result
        return results


class ClipEmbedding(NamedTuple):
    """Embeddings of one clip; None for those not asked for."""

    frames: np.ndarray | None  # [T, D]
    times: np.ndarray | None  # [T], milliseconds
    scene: np.ndarray | None  # [S]


def _changed(source: str) -> str:
    """The source of weights that were changed since they came from ``source``."""
    return source if source.startswith(checkpoint.CHANGED) else checkpoint.CHANGED + source


def _check_weights(member: FusedMember, params: Mapping[str, Any]) -> None:
    """Refuse to save what could not be loaded again: other arrays than the encoder's, or values that are not finite."""
    for name, wanted in member.encoder.abstract_params().items():
        array = params.get(name)
        if array is None or tuple(array.shape) != tuple(wanted.shape):
            found = "none" if array is None else str(tuple(array.shape))
            raise CheckpointError(
                f"member {member.name!r}: {name}: expected an array of shape {tuple(wanted.shape)}, found {found}"
            )
        if not bool(jnp.isfinite(array).all()):
            raise CheckpointError(
                f"member {member.name!r}: {name}: expected finite weights, found NaN or infinite values: save a model "
                "from before they came up"
            )


def _like(audio: Audio, results: list[Any]) -> Any:
    return results if isinstance(audio, (list, tuple)) else np.stack(results)
