"""Parity with PyTorch: every member part by part, then the published recipe end to end.

The reference is each family's network in PyTorch, run on each clip by itself and fused by the recipe of the authors'
code; the oracle is the same in float64, resampled at exact positions. gura_jax gets the clips in one padded batch, so
that parity shows exactness under padding too.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from gura_jax import checkpoint, parallel
from gura_jax.audio import resample
from gura_jax.convert import convert
from gura_jax.convert.references import Reference, find_reference
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.fusion import FusedMember
from gura_jax.loading import find_encoder, find_weights, is_hugging_face, load_model, member_weights, outline
from gura_jax.model import Model
from gura_jax.models.encoder import NORMALISE_EPS
from gura_jax.models.families import find_family
from gura_jax.models.layers import layer_weights
from gura_jax.systems import Member, System, find_system

# Relative distances are of Euclidean norms, over all frames of a clip; the worst clip counts.
LAYER_BOUND = 1e-5  # to PyTorch: float32 rounding through the deepest encoder stays ten times below
ORACLE_FACTOR = 2  # no further from the oracle than this many times PyTorch's own distance
ORACLE_FLOOR = 1e-6  # below this, two float32 computations differ from the oracle by chance alone

FRAMES, POOLED = "frames", "pooled"  # parts that the recipe uses


class Row(NamedTuple):
    """One line of the table."""

    member: str
    layer: str
    to_pytorch: float  # distance of gura_jax to PyTorch
    absolute: float  # the largest difference of any value to PyTorch
    to_oracle: float  # distance of gura_jax to the float64 oracle
    pytorch_to_oracle: float
    bound: float  # of to_pytorch

    @property
    def passed(self) -> bool:
        """Within the bound, and about as close to the truth as PyTorch is."""
        close = self.to_oracle <= max(ORACLE_FACTOR * self.pytorch_to_oracle, ORACLE_FLOOR)
        return close and self.to_pytorch <= self.bound


class _Output(NamedTuple):
    """What a reference computes for one clip: each part, by name, and what the recipe uses."""

    parts: dict[str, np.ndarray]
    frames: np.ndarray  # [T, D], for timestamp embeddings
    scene: np.ndarray  # [T, D], or [P] where scenes are pooled


_Pair = tuple[_Output, _Output]  # PyTorch's float32, and the oracle


def compare(
    system: str | Path | System,
    audio: Sequence[np.ndarray],
    *,
    weights: Mapping[str, str | Path] | str = "pretrained",
    size: Any = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Compare a system with PyTorch.

    Args:
        system: as for :func:`gura_jax.load_model`.
        audio: 1-D clips at the model's sample rate (:func:`gura_jax.loading.outline` tells it).
        weights: ``"pretrained"``, from what the checkpoints were converted from; ``"random"``, made by PyTorch and
            converted (CREPE's weights are real all the same, where there are any); or by member, one of these or the
            path of a checkpoint or of a Hugging Face folder.
        size: ``"tiny"`` for small encoders, where weights are random.
        seed: of random weights.

    Yields:
        A row a part of each member, then the fused frames and the scene embedding, as they are computed.

    Raises:
        AudioError: a clip without a frame, or another that the system does not embed.
    """
    described = find_system(system)
    sources = member_weights(described, weights)  # pyright: ignore[reportArgumentType] - checked there
    whole = outline(described, size=size)
    sample_rate = whole.sample_rate
    clips = whole.check(list(audio), whole.shortest(frames=True, scenes=True))
    with tempfile.TemporaryDirectory(prefix="gura-jax-parity-") as folder:
        networks = [_find_network(member, sources[member.name], size) for member in described.members]
        members, outputs = [], []
        for index, network in enumerate(networks):
            member, reference = _reference(network, seed + index, Path(folder) / str(index))
            alone = System(member.name, (member,))
            built = outline(alone).fusion.members[0]
            own_clips = [resample(clip, sample_rate, built.encoder.sample_rate) for clip in clips]
            single = [_run(reference, clip, torch.float32, built) for clip in own_clips]
            reference.double()
            double = [_run(reference, clip, torch.float64, built) for clip in own_clips]
            del reference
            members.append(member)
            outputs.append(list(zip(single, double, strict=True)))
            yield from _member_rows(alone, own_clips, outputs[-1])
        yield from _fused_rows(dataclasses.replace(described, members=tuple(members)), clips, outputs)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    b = b.astype(np.float64)
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def _row(member: str, layer: str, triples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Row:
    """From (gura_jax's, PyTorch's, the oracle's) of each clip."""
    for ours, single, double in triples:
        if not ours.shape == single.shape == double.shape:
            raise ConversionError(f"{member} {layer}: shapes differ: {ours.shape}, {single.shape}, {double.shape}")
    return Row(
        member,
        layer,
        max(_distance(ours, single) for ours, single, _ in triples),
        max(float(np.abs(ours - single).max()) for ours, single, _ in triples),
        max(_distance(ours, double) for ours, _, double in triples),
        max(_distance(single, double) for _, single, double in triples),
        LAYER_BOUND,
    )


def _member_rows(alone: System, clips: Sequence[np.ndarray], references: Sequence[_Pair]) -> Iterator[Row]:
    ours = _our_parts(load_model(alone), clips)
    theirs = references[0][0].parts
    if ours[0].keys() != theirs.keys():
        raise ConversionError(
            f"{alone.name}: expected a reference with the parts of states(), {', '.join(ours[0])}; "
            f"found {', '.join(theirs)}"
        )
    for name in list(ours[0]):
        triples = [
            (own.pop(name), single.parts.pop(name), double.parts.pop(name))  # large, and needed no more
            for own, (single, double) in zip(ours, references, strict=True)
        ]
        yield _row(alone.name, name, triples)


def _our_parts(model: Model, clips: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every part for each clip, from one padded batch."""
    (member,) = model.fusion.members
    encoder = member.encoder
    rate = encoder.sample_rate

    def function(params: Any, audio: Any, lengths: Any) -> Any:
        found = {name: (value, counts) for name, value, counts in encoder.states(params, audio[rate], lengths[rate])}
        return found, encoder(params, audio[rate], lengths[rate]).pooled if encoder.pooled_size else None

    params = model.params[member.name]
    batch = model.pad(clips, len(clips), max(map(len, clips)))
    call = parallel.compile_batch(function, model.compilation)
    found, pooled = jax.device_get(call({**params, **encoder.derive(params)}, *batch))
    parts = []
    for b in range(len(clips)):
        parts.append({name: found[name][0][b, : found[name][1][b]] for name in encoder.parts})
        if pooled is not None:
            parts[b][POOLED] = pooled[b]
    return parts


def _fused_rows(system: System, clips: Sequence[np.ndarray], outputs: Sequence[Sequence[_Pair]]) -> Iterator[Row]:
    embedded = load_model(system).embed(clips)
    fused = [
        [_recipe(system, [member[clip][which] for member in outputs], interpolate) for clip in range(len(clips))]
        for which, interpolate in ((0, _pytorch_interpolate), (1, _exact_interpolate))
    ]
    for index, (name, ours) in enumerate(
        (("frames", [e.frames for e in embedded]), ("scene", [e.scene for e in embedded]))
    ):
        triples = [(np.asarray(o), s[index], d[index]) for o, s, d in zip(ours, *fused, strict=True)]
        yield _row(system.name, name, triples)


# The references


class _Network(NamedTuple):
    """The PyTorch network of a member, before it is loaded."""

    member: Member  # with the encoder that has the same weights; random ones are converted later
    kind: type[Reference]
    config: Any
    source: str | None  # of its weights; None: random


def _find_network(member: Member, weights: str, size: str | None) -> _Network:
    """Check that a member can be compared, and find the weights of both sides."""
    if not isinstance(member.encoder, str):
        raise SystemConfigError(f"member {member.name!r} is a Python object: nothing in PyTorch to compare it with")
    _, config, published = find_encoder(member.encoder)
    if member.normalise is None:  # else it would be lost where the encoder's name is
        member = dataclasses.replace(member, normalise=published)
    family = find_family(config.model_type)
    if not family.reference:
        raise SystemConfigError(
            f"member {member.name!r}: the family {family.name!r} has no reference: there is nothing in PyTorch to "
            "compare it with"
        )
    kind = find_reference(family.reference)
    if weights == "random":
        return _Network(member, kind, config.tiny() if size == "tiny" else config, None)
    where = find_weights(member, weights)
    source = str(where)
    if isinstance(where, Path) and where.is_file():
        member = dataclasses.replace(member, weights=source)
    else:  # a checkpoint, a Hugging Face folder or a hub id
        member = dataclasses.replace(member, encoder=source, weights=None)
        if isinstance(where, Path) and not is_hugging_face(where):
            source = checkpoint.read_manifest(where).source
    with _named(member):
        kind.check(source)
    return _Network(member, kind, config, source)


def _reference(network: _Network, seed: int, folder: Path) -> tuple[Member, Reference]:
    """Load a member's PyTorch network, and return the member with what was converted from the same weights."""
    member, kind, config, source = network
    if source is None:
        reference = kind.random(config, seed)
        converted = convert(reference.save(folder))
        shutil.rmtree(folder)
        checkpoint.save(folder, converted.params, converted.manifest)
        return dataclasses.replace(member, encoder=str(folder), weights=None), reference
    with _named(member):
        return member, kind.load(config, source)


@contextlib.contextmanager
def _named(member: Member) -> Iterator[None]:
    """Say in errors which member it is, and where its weights are."""
    try:
        yield
    except ConversionError as error:
        where = member.weights or member.encoder
        raise ConversionError(f"member {member.name!r} cannot be compared: {where}: {error}") from None


def _run(reference: Reference, clip: np.ndarray, dtype: torch.dtype, built: FusedMember) -> _Output:
    """A member's reference on one clip."""
    audio = torch.from_numpy(clip).to(dtype)[None]
    if built.options.normalise:  # as transformers' Wav2Vec2FeatureExtractor
        audio = (audio - audio.mean()) / (audio.var(correction=0) + NORMALISE_EPS).sqrt()
    encoder, scenes = built.encoder, built.scene_encoder
    with torch.inference_mode():
        parts = dict(reference.parts(audio, encoder.grid.hop))
        if not encoder.pooled_size:  # of other layers than the reference's
            parts.pop(POOLED, None)
        frames = _frames(parts, built)
        if built.scene == POOLED:
            scene = parts[POOLED]
        elif scenes is encoder:
            scene = frames
        else:
            scene = next(value for name, value in reference.parts(audio, scenes.grid.hop) if name == FRAMES)
    return _Output({name: value.numpy() for name, value in parts.items()}, frames.numpy(), scene.numpy())


def _frames(parts: Mapping[str, torch.Tensor], built: FusedMember) -> torch.Tensor:
    """The frames of a reference: those that it yields, or the weighted sum of its hidden states."""
    if FRAMES in parts:
        return parts[FRAMES]
    states = [parts[f"state {i}"] for i in range(built.encoder.num_states)]
    weights = torch.from_numpy(layer_weights(built.options.layers, len(states) - 1)).to(states[0].dtype)
    return torch.stack([w * state for w, state in zip(weights, states, strict=True) if w]).sum(dim=0)


# The recipe of the authors' code

_Combine = Callable[[Sequence[np.ndarray]], np.ndarray]

_COMBINE: Mapping[str, _Combine] = {
    "average": lambda frames: np.stack(frames).mean(axis=0),
    "concatenate": lambda frames: np.concatenate(frames, axis=1),
    "interleave": lambda frames: np.stack(frames, axis=2).reshape(len(frames[0]), -1),
    "interleave_time": lambda frames: np.stack(frames, axis=1).reshape(len(frames[0]) * len(frames), -1),
}
_FIXED_FRAMES = {"interleave_time": 1024}


def _recipe(
    system: System, members: Sequence[_Output], interpolate: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Fused frames [T, D] and scene [S], from the members' outputs for one clip."""
    combine = _COMBINE[system.combination]

    def of_one_size(frames: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        size = system.feature_size
        return frames if size is None else [interpolate(x.T, size).T for x in frames]

    def of_one_length(frames: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        length = _FIXED_FRAMES.get(system.combination, len(frames[0]))
        return [x if len(x) == length else interpolate(x, length) for x in frames]

    frames = combine(of_one_length(of_one_size([m.frames for m in members])))
    timed = [m.scene for m in members if m.scene.ndim == 2]
    if len(timed) == len(members):
        fused = combine(of_one_length(of_one_size(timed)))
        size = len(fused) // system.scene_groups
        groups = [fused[g * size : (g + 1) * size].mean(axis=0) for g in range(system.scene_groups)]
        return frames, np.concatenate(groups)
    means = iter([x.mean(axis=0) for x in of_one_length(timed)] if timed else [])
    vectors = [next(means) if m.scene.ndim == 2 else m.scene for m in members]
    return frames, combine(of_one_size([vector[None] for vector in vectors]))[0]


def _pytorch_interpolate(x: np.ndarray, size: int) -> np.ndarray:
    """Along the first axis."""
    tensor = torch.from_numpy(np.ascontiguousarray(x.T))[None]
    return torch.nn.functional.interpolate(tensor, size, mode="linear", align_corners=False)[0].numpy().T


def _exact_interpolate(x: np.ndarray, size: int) -> np.ndarray:
    """The same at exact positions: PyTorch's, even in float64, drift with the length."""
    numerator = np.maximum((2 * np.arange(size) + 1) * len(x) - size, 0)
    low, weight = numerator // (2 * size), (numerator % (2 * size) / (2 * size))[:, None]
    return x[low] * (1 - weight) + x[np.minimum(low + 1, len(x) - 1)] * weight
