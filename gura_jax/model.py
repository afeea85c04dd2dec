"""``load_model`` and the model that a user holds."""

import dataclasses
import functools
import json
import operator
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from gura_jax import checkpoint, parallel
from gura_jax.audio import MIN_SAMPLES, SAMPLE_RATE, check_audio
from gura_jax.errors import AudioError, CheckpointError, SystemConfigError
from gura_jax.fusion import PAPER_FRAMES, Embeddings, FusedMember, Fusion, Wanted, fuse, fused_size
from gura_jax.models.crepe import CrepeFrames
from gura_jax.models.encoder import DTypeName, Encoder
from gura_jax.models.speech import SpeechConfig, SpeechFrames
from gura_jax.systems import (
    ENCODERS,
    Architecture,
    Member,
    System,
    encoders,
    expected,
    find_system,
    is_folder,
    tiny,
)

BATCH_SIZE = 16  # clips
PITCH_HOP = 160  # samples: 10 ms, CREPE's own

Audio = np.ndarray | jax.Array | Sequence[np.ndarray]
"""[n, samples] at 16 kHz in [-1, 1], or a list of 1-D clips of any lengths."""


Weights = Literal["pretrained", "random"] | Mapping[str, str | Path]
"""Of a system's members: see :func:`load_model`."""


class Model:
    """An embedding system with its weights, on the devices; made by :func:`load_model`.

    Attributes:
        system: its description.
        fusion: its encoders and how they are combined.
        params: the weights on the devices, by member and dotted path.
        weights: where each member's weights came from, by member.
        compilation: the devices, and how functions are compiled for them.
        dtype: of convolutions and matrix products.
        sample_rate: 16000, Hz.
        timestamp_embedding_size: D, the size of a frame.
        scene_embedding_size: S, the size of a scene embedding.
        min_samples: the shortest clip that has a frame, in samples.
        min_scene_samples: the shortest clip that has a scene embedding, in samples.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self,
        system: System,
        fusion: Fusion,
        params: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Any]],
        compilation: parallel.Compilation,
        dtype: DTypeName = "float32",
    ) -> None:
        self.system, self.fusion, self.params, self.weights = system, fusion, params, weights
        self.compilation = compilation
        self.dtype: DTypeName = dtype
        self._functions: dict[Any, parallel.BatchFunction] = {}
        first = fusion.members[0].scene_encoder
        self.min_samples = max(
            MIN_SAMPLES,
            *(e.min_samples for m in fusion.members for e in (m.encoder, m.scene_encoder)),
        )
        # Interleaved in time, every clip has the same number of frames, and so enough for the groups.
        enough = 0 if fusion.combination == "interleave_time" else (fusion.scene_groups - 1) * first.hop
        self.min_scene_samples = max(self.min_samples, first.min_samples + enough)
        sizes = [m.encoder.feature_size for m in fusion.members]
        self.timestamp_embedding_size = fused_size(sizes, fusion.combination, fusion.feature_size)
        self.scene_embedding_size = fusion.scene_groups * self.timestamp_embedding_size

    @property
    def random_members(self) -> list[str]:
        """The members whose weights are random: what they compute means nothing."""
        return [name for name, weights in self.weights.items() if weights["source"] == "random"]

    def __repr__(self) -> str:
        random = f", random weights: {', '.join(self.random_members)}" if self.random_members else ""
        return (
            f"<gura_jax.Model {self.system.name}: frames of {self.timestamp_embedding_size}, "
            f"scenes of {self.scene_embedding_size}{random}>"
        )

    def __call__(self, audio: Any, lengths: Any, *, scenes: bool = True, frames: bool = True) -> Embeddings:
        """The compiled function: one padded batch, on the devices, unchecked.

        Args:
            audio: [B, N] float32 at 16 kHz.
            lengths: [B] int32, samples in each clip.
            scenes, frames: what to compute.

        Returns:
            :class:`gura_jax.fusion.Embeddings`: frames [B, T, D], counts [B] and scenes [B, S], as asked for.
        """
        wanted: set[Wanted] = set()
        if frames:
            wanted.add("frames")
        if scenes:
            wanted.add("scenes")
        key = frozenset(wanted)
        return self._compiled(key, functools.partial(fuse, self.fusion, key))(self.params, audio, lengths)

    def _compiled(self, key: Any, function: parallel.BatchFunction) -> parallel.BatchFunction:
        """Compile a function once."""
        if key not in self._functions:
            self._functions[key] = parallel.compile_batch(function, self.compilation)
        return self._functions[key]

    def fuse(self, params: Mapping[str, Any], audio: jax.Array, lengths: jax.Array) -> Embeddings:
        """The same as a pure function of the weights, not compiled: for gradients, ``jax.vmap`` and the like."""
        return fuse(self.fusion, frozenset({"frames", "scenes"}), params, audio, lengths)

    def embed(
        self, audio: Audio, *, frames: bool = True, scenes: bool = True, batch_size: int = BATCH_SIZE
    ) -> list["ClipEmbedding"]:
        """Embed clips, each with its frames, times and scene; in the order given.

        Raises:
            AudioError: see :func:`gura_jax.audio.check_audio`; or a clip shorter than
                ``min_samples``, or than ``min_scene_samples`` where scenes are wanted.
        """

        def compute(batch: np.ndarray, lengths: np.ndarray) -> list[ClipEmbedding]:
            out = jax.device_get(self(batch, lengths, frames=frames, scenes=scenes))
            return [
                ClipEmbedding(
                    *((out.frames[b, : out.counts[b]], self.timestamps(int(lengths[b]))) if frames else (None, None)),
                    out.scenes[b] if scenes else None,
                )
                for b in range(len(batch))
            ]

        return self._batches(audio, compute, batch_size, self.min_scene_samples if scenes else self.min_samples)

    def timestamp_embeddings(self, audio: Audio, *, batch_size: int = BATCH_SIZE) -> tuple[Any, Any]:
        """Frames and their times.

        Args:
            audio: [n, samples] at 16 kHz in [-1, 1], or a list of 1-D clips of any lengths.
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
        """Hidden states of a speech encoder.

        Args:
            audio: as in :meth:`timestamp_embeddings`.
            member: its name; by default the system's first speech encoder.
            states: which, 0 being the transformer's input and L the last block's output; by default all.
            batch_size: clips computed at once.

        Returns:
            [n, K, T, D] float32, or for a list of clips a list of [K, T, D].
        """
        name, encoder = self._member(SpeechFrames, member)
        num_states = encoder.config.num_hidden_layers + 1
        try:
            chosen = tuple(range(num_states) if states is None else map(operator.index, states))
        except TypeError:
            chosen = ()
        if not chosen or not all(-num_states <= s < num_states for s in chosen):
            raise SystemConfigError(
                f"states: expected integers from 0 to {num_states - 1} (or negative, from the end), found {states!r}"
            )
        out = self._member_outputs(
            audio, name, encoder, "hidden_states", batch_size, states=tuple(s % num_states for s in chosen)
        )
        return _like(audio, out)

    def pitch_activation(self, audio: Audio, *, hop: int = PITCH_HOP, batch_size: int = BATCH_SIZE) -> Any:
        """Activation of CREPE's 360 pitch bins every ``hop`` samples; :func:`gura_jax.models.crepe.pitch` decodes.

        Returns:
            [n, T, 360] float32 in (0, 1), or for a list of clips a list of [T, 360].
        """
        name, encoder = self._member(CrepeFrames, None)
        encoder = dataclasses.replace(encoder, hop=hop)
        return _like(audio, self._member_outputs(audio, name, encoder, "activation", batch_size))

    def timestamps(self, samples: int) -> np.ndarray:
        """Times [T] of a clip's frames, in milliseconds: the centre of what each frame's convolutions see."""
        if self.fusion.combination == "interleave_time":  # the frames of all members in turn, spread evenly
            total = self.num_frames(samples)
            return (np.arange(total) + 0.5) * (samples / total) * (1000 / SAMPLE_RATE)
        first = self.fusion.members[0].encoder
        return (first.offset + first.hop * np.arange(self.num_frames(samples))) * (1000 / SAMPLE_RATE)

    def num_frames(self, samples: int) -> int:
        """T, the number of a clip's frames."""
        if self.fusion.combination == "interleave_time":
            return PAPER_FRAMES * len(self.fusion.members)
        first = self.fusion.members[0].encoder
        return 1 + (samples - first.min_samples) // first.hop

    def check(self, audio: Audio, min_samples: int) -> list[np.ndarray]:
        """The clips, each [samples] float32.

        Raises:
            AudioError: see :func:`gura_jax.audio.check_audio`; or a clip shorter than ``min_samples``.
        """
        clips = check_audio(audio)
        for i, clip in enumerate(clips):
            if len(clip) < min_samples:
                raise AudioError(
                    f"audio[{i}]: expected at least {min_samples} samples "
                    f"({1000 * min_samples / SAMPLE_RATE:g} ms) for {self.system.name}, found {len(clip)}"
                )
        return clips

    def _member(self, kind: type[Any], name: str | None) -> tuple[str, Any]:
        members = {m.name: m.encoder for m in self.fusion.members if isinstance(m.encoder, kind)}
        if not members:
            label = {SpeechFrames: "speech encoder", CrepeFrames: "CREPE"}[kind]
            raise SystemConfigError(f"system {self.system.name!r} has no {label} among its members")
        name = name or next(iter(members))
        if name not in members:
            raise SystemConfigError(f"member {expected(name, members)}")
        return name, members[name]

    def _member_outputs(
        self, audio: Audio, name: str, encoder: Any, method: str, batch_size: int, **static: Any
    ) -> list[np.ndarray]:
        """Outputs of one member's method, whose next to last axis is time, without the padding."""

        def function(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
            return getattr(encoder, method)(params[name], audio, lengths, **static)

        call = self._compiled((name, encoder, method, *static.items()), function)

        def compute(batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
            out, counts = jax.device_get(call(self.params, batch, lengths))
            return [out[b, ..., : counts[b], :] for b in range(len(batch))]

        return self._batches(audio, compute, batch_size, encoder.min_samples)

    def _batches(
        self,
        audio: Audio,
        compute: Callable[[np.ndarray, np.ndarray], list[Any]],
        batch_size: int,
        min_samples: int,
    ) -> list[Any]:
        """Check the clips, compute them in batches of like length, and put the results back in order."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SystemConfigError(f"batch_size: expected a positive number of clips, found {batch_size!r}")
        clips = self.check(audio, min_samples)
        results: list[Any] = [None] * len(clips)
        for packed in parallel.pack([len(clip) for clip in clips], batch_size, self.compilation.mesh.size):
            # Rows that no clip fills hold silence.
            batch = np.zeros((packed.rows, packed.samples), np.float32)
            lengths = np.full(packed.rows, packed.samples, np.int32)
            for row, i in enumerate(packed.clips):
                batch[row, : len(clips[i])] = clips[i]
                lengths[row] = len(clips[i])
            for i, result in zip(packed.clips, compute(batch, lengths), strict=False):
                results[i] = result
        return results


class ClipEmbedding(NamedTuple):
    """One clip's embeddings; None for what was not asked for."""

    frames: np.ndarray | None  # [T, D]
    times: np.ndarray | None  # [T], milliseconds
    scene: np.ndarray | None  # [S]


def _like(audio: Audio, results: list[Any]) -> Any:
    return results if isinstance(audio, (list, tuple)) else np.stack(results)


def load_model(
    system: str | Path | System,
    *,
    weights: Weights = "pretrained",
    size: Literal["tiny"] | None = None,
    seed: int = 0,
    parallel_by: parallel.Parallel = "jit",
    devices: Sequence[Any] | None = None,
    dtype: DTypeName = "float32",
    precision: parallel.Precision = "highest",
) -> Model:
    """Load a system.

    Args:
        system: a name (see ``gura-jax systems``), the path of a TOML or YAML file, or a :class:`System`.
        weights: ``"pretrained"``, from the checkpoint folder; ``"random"``, for trying out; or for some members,
            by name, either of these or the path of a checkpoint or of PyTorch weights that
            :func:`gura_jax.convert.convert` takes.
        size: ``"tiny"`` puts a small speech encoder of the same kind in the place of each, with random weights.
        seed: of random weights; of each member also by its name.
        parallel_by: ``"jit"`` or ``"pmap"``, over ``devices``.
        devices: by default all local ones.
        dtype: of convolutions and matrix products; norms, softmax and sums, and what comes out, are float32. On a
            CPU CREPE stays in float32.
        precision: of float32 products: ``"highest"``, or ``"default"``, which is TF32 on a GPU and bfloat16 on a TPU.

    Raises:
        SystemConfigError: an unknown system, member or encoder.
        CheckpointError: weights that are missing, damaged, or of another architecture.
    """
    described = find_system(system)
    if parallel_by not in get_args(parallel.Parallel):
        raise SystemConfigError(f"parallel_by: {expected(parallel_by, get_args(parallel.Parallel))}")
    if devices is not None and not devices:
        raise SystemConfigError("devices: expected at least one, found none")
    for option, value, choices in (
        ("dtype", dtype, get_args(DTypeName)),
        ("precision", precision, get_args(parallel.Precision)),
    ):
        if value not in choices:
            raise SystemConfigError(f"{option}: {expected(value, choices)}")
    if size not in (None, "tiny"):
        raise SystemConfigError(f"size: expected 'tiny' or None, found {size!r}")
    chosen = member_weights(described, weights)
    mesh = parallel.make_mesh(devices)
    sharding = parallel.replicated(mesh)
    members, params, sources = [], {}, {}
    for member in described.members:
        loaded = _load_member(member, chosen[member.name], size, seed, sharding, dtype)
        members.append(FusedMember(member.name, *loaded.encoders))
        params[member.name], sources[member.name] = loaded.params, loaded.source
    fusion = Fusion(tuple(members), described.combination, described.feature_size, described.scene_groups)
    return Model(described, fusion, params, sources, parallel.Compilation(mesh, parallel_by, precision), dtype)


def member_weights(system: System, weights: Weights) -> dict[str, str]:
    """Where the weights of each member are to come from: ``"pretrained"``, ``"random"``, or a path.

    Raises:
        SystemConfigError: weights of members that there are not, or no weights.
    """
    names = [m.name for m in system.members]
    if isinstance(weights, Mapping):
        chosen = dict(weights)
        for name in chosen:
            if name not in names:
                raise SystemConfigError(f"weights: member {expected(name, names)}")
    elif weights in ("pretrained", "random"):
        chosen = {m.name: weights for m in system.members if m.weights is None}
    else:
        raise SystemConfigError(
            f"weights: expected 'pretrained', 'random' or a mapping from member to path, found {weights!r}"
        )
    return {m.name: str(chosen.get(m.name, m.weights or "pretrained")) for m in system.members}


def outline(system: str | Path | System, *, size: Literal["tiny"] | None = None) -> Model:
    """A model without weights, for its sizes alone: nothing is loaded, and it embeds nothing.

    Raises:
        SystemConfigError: an unknown system, member or encoder.
    """
    described = find_system(system)
    members = []
    for member in described.members:
        if isinstance(member.encoder, str):
            architecture = find_encoder(member.encoder)[1]
            both = encoders(tiny(architecture) if size == "tiny" else architecture, member.layers, "float32")
        else:
            both = member.encoder, member.encoder
        members.append(FusedMember(member.name, *both))
    fusion = Fusion(tuple(members), described.combination, described.feature_size, described.scene_groups)
    return Model(described, fusion, {}, {}, parallel.Compilation(parallel.make_mesh()))


PROTOCOL = ("feature_size", "hop", "offset", "min_samples", "__call__")


class _Loaded(NamedTuple):
    encoders: tuple[Encoder, Encoder]
    params: Any
    source: Mapping[str, Any]


def _load_member(
    member: Member, weights: str, size: str | None, seed: int, sharding: jax.sharding.Sharding, dtype: DTypeName
) -> _Loaded:
    if not isinstance(member.encoder, str):
        missing = [name for name in PROTOCOL if not hasattr(member.encoder, name)]
        if missing or isinstance(member.encoder, type):
            raise SystemConfigError(
                f"member {member.name!r}: expected an encoder, by name, path, or as an object that has "
                f"{', '.join(PROTOCOL)} (see gura_jax.Encoder), found {member.encoder!r}"
            )
        if weights not in ("pretrained", "random"):
            raise SystemConfigError(f"member {member.name!r} brings its own weights: {weights} is of no use to it")
        return _Loaded(
            (member.encoder, member.encoder),
            jax.device_put(getattr(member.encoder, "params", {}), sharding),
            {"source": f"given as {type(member.encoder).__qualname__}"},
        )
    _, full = find_encoder(member.encoder)
    architecture = tiny(full) if size == "tiny" else full
    if architecture != full and weights != "random":
        raise SystemConfigError(
            f"member {member.name!r}: size='tiny' has random weights only: pass weights='random' "
            "(--weights random on the command line)"
        )
    both = encoders(architecture, member.layers, dtype)
    if weights == "random":
        # By name, so that a member has the same weights in every system.
        own_seed = (seed + zlib.crc32(member.name.encode())) % 2**32
        params = jax.device_put(both[0].random_params(own_seed), sharding)
        return _Loaded(both, both[0].prepare(params), {"source": "random", "seed": seed})
    folder = find_weights(member, weights)
    if folder.is_file() or is_hugging_face(folder):
        from gura_jax.convert import convert  # pyright: ignore[reportMissingImports] - convert/ stands elsewhere

        arrays, manifest = convert(folder)
        checkpoint.check_architecture(member.name, architecture, manifest.architecture, str(folder))
        # One by one, so that there are never two copies of all of them.
        params = {name: jax.device_put(arrays.pop(name), sharding) for name in list(arrays)}
    else:
        manifest = checkpoint.read_manifest(folder)
        checkpoint.check_architecture(member.name, architecture, manifest.architecture, str(folder))
        params = checkpoint.load(folder, both[0].abstract_params, sharding)
    return _Loaded(both, both[0].prepare(params), {"source": manifest.source, "fingerprint": manifest.fingerprint})


def find_weights(member: Member, weights: str) -> Path:
    """The checkpoint, or the folder or file of PyTorch weights, of a registered encoder or of one in a folder.

    Args:
        member: its encoder is a name or path.
        weights: ``"pretrained"`` or a path.

    Raises:
        CheckpointError: there is none.
    """
    home, _ = find_encoder(str(member.encoder))
    if weights != "pretrained" and os.path.isfile(weights):
        return Path(weights)
    folder = home if weights == "pretrained" else find_folder(weights)
    if is_folder(folder):
        return folder
    if weights == "pretrained":
        raise CheckpointError(_how_to_get(str(member.encoder), folder))
    raise CheckpointError(
        f"member {member.name!r}: expected a checkpoint, or a folder or file of PyTorch weights, at {weights}"
    )


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's, and not a checkpoint."""
    return (folder / "config.json").is_file() and not (folder / checkpoint.MANIFEST).is_file()


def find_folder(name: str) -> Path:
    """The folder of this path; else that of the converted checkpoint of this name."""
    return Path(name) if is_folder(Path(name)) else checkpoint.checkpoint_folder() / name


def find_encoder(encoder: str) -> tuple[Path, Architecture]:
    """Where the weights of a registered encoder are, or of one in a folder, and its architecture."""
    if encoder in ENCODERS:
        return checkpoint.checkpoint_folder() / encoder, ENCODERS[encoder].architecture
    folder = find_folder(encoder)
    if not is_folder(folder):
        raise SystemConfigError(
            f"encoder {expected(encoder, ENCODERS)} (or the path of a folder, or a checkpoint's name in "
            f"{checkpoint.checkpoint_folder()})"
        )
    if not is_hugging_face(folder):
        return folder, checkpoint.read_manifest(folder).architecture
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return folder, SpeechConfig.from_transformers(config)
    except (OSError, ValueError, AttributeError) as error:
        raise SystemConfigError(f"{folder / 'config.json'}: {error}") from None


def _how_to_get(encoder: str, folder: Path) -> str:
    if encoder in ENCODERS and ENCODERS[encoder].source is None:
        return f"nobody published weights of {encoder} for PyTorch: pass weights='random' or a path"
    return (
        f"no pretrained weights of {encoder} at {folder}. Run\n    gura-jax convert {encoder}\n"
        "or pass weights='random' (--weights random) to try things out without them"
    )
