"""The published recipe in PyTorch: transformers' encoders with all hidden states, CREPE clip by clip, interpolate.

torchcrepe's network is written out here, so that nothing but torch and transformers is needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import transformers

from gura_jax import Member, System
from gura_jax.convert.references import Reference, find_reference
from gura_jax.loading import find_encoder
from gura_jax.models.crepe import (
    BATCH_NORM_EPS,
    CAPACITY_MULTIPLIER,
    EMBEDDING_LAYERS,
    HOP,
    LAYERS,
    MIN_STD,
    PITCH_BINS,
    WINDOW,
    CrepeConfig,
)
from gura_jax.models.families import find_family


class Mode(NamedTuple):
    """A way to run PyTorch's networks."""

    dtype: torch.dtype = torch.float32
    compiled: bool = False


MODES: Mapping[str, Mode] = {
    "eager": Mode(),
    "compile": Mode(compiled=True),
    "bfloat16": Mode(torch.bfloat16),
    "bfloat16-compile": Mode(torch.bfloat16, compiled=True),
}

Network = Callable[[torch.Tensor], torch.Tensor]
"""Audio [B, N] -> frames [B, T, D]; of CREPE, normalised frames [F, 1024] -> embeddings [F, D]."""


class Speech(torch.nn.Module):
    """An encoder of transformers', and the mean of all its hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """[B, N] -> [B, T, D]."""
        out = self.model(audio, output_hidden_states=True)
        # transformers 5 leaves the final layer norm out of the last hidden state
        return torch.stack([*out.hidden_states[:-1], out.last_hidden_state]).mean(dim=0)


class Crepe(torch.nn.Module):
    """torchcrepe's network and its names."""

    def __init__(self, config: CrepeConfig) -> None:
        super().__init__()
        sizes = [1, *(layer.channels * CAPACITY_MULTIPLIER[config.capacity] for layer in LAYERS)]
        for i, layer in enumerate(LAYERS):
            conv = torch.nn.Conv2d(sizes[i], sizes[i + 1], (layer.kernel, 1), (layer.stride, 1))
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"conv{i + 1}_BN", torch.nn.BatchNorm2d(sizes[i + 1], eps=BATCH_NORM_EPS))
        self.classifier = torch.nn.Linear(4 * sizes[-1], PITCH_BINS)

    def pool(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Layer ``i`` from 0: [F, C, P, 1] -> [F, C', P', 1]."""
        x = torch.nn.functional.pad(x, (0, 0, *LAYERS[i].padding))
        x = getattr(self, f"conv{i + 1}_BN")(torch.nn.functional.relu(getattr(self, f"conv{i + 1}")(x)))
        return torch.nn.functional.max_pool2d(x, (2, 1), (2, 1))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalised frames [F, 1024] -> the fifth pool [F, D]."""
        x = frames[:, None, :, None]
        for i in range(EMBEDDING_LAYERS):
            x = self.pool(x, i)
        return x.flatten(1)


class CrepeReference(Reference):
    """CREPE for parity, where the package torchcrepe is not installed."""

    def __init__(self, config: CrepeConfig) -> None:
        super().__init__(config)
        self.model = Crepe(config)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The pools [F, P, C], the embedding [F, D] and the pitch activation [F, 360] of a clip."""
        x = crepe_frames(audio[0], hop)[:, None, :, None]
        for i in range(EMBEDDING_LAYERS):
            x = self.model.pool(x, i)
            yield f"pool {i + 1}", x[..., 0].mT
        yield "frames", x.flatten(1)
        x = self.model.pool(x, EMBEDDING_LAYERS)[..., 0].mT
        yield "pitch activation", torch.sigmoid(self.model.classifier(x.flatten(1)))

    @classmethod
    def check(cls, source: str) -> None:
        """A file of a state dict, whichever."""

    @classmethod
    def load(cls, config: CrepeConfig, source: str) -> Self:
        """From a file that :func:`random_weights` wrote."""
        reference = cls(config)
        reference.model.load_state_dict(torch.load(source, weights_only=True))
        return reference.eval()


def crepe_frames(clip: torch.Tensor, hop: int) -> torch.Tensor:
    """CREPE's input: the frames of a clip [N], each with mean 0 and deviation 1, as [F, 1024]."""
    frames = torch.nn.functional.pad(clip, (WINDOW // 2, WINDOW // 2)).unfold(0, WINDOW, hop)
    frames = frames - frames.mean(dim=1, keepdim=True)
    return frames / frames.std(dim=1, keepdim=True).clamp_min(MIN_STD)


def is_crepe(member: Member) -> bool:
    """Whether a member takes frames, and not audio."""
    return isinstance(find_encoder(str(member.encoder)).config, CrepeConfig)


def load_network(member: Member, path: Path) -> torch.nn.Module:
    """A member's network in float32.

    Args:
        member: its encoder by name or path; averaged over its hidden states, or CREPE.
        path: a Hugging Face folder, or CREPE's state dict.
    """
    config = find_encoder(str(member.encoder)).config
    if not isinstance(config, CrepeConfig):
        return Speech(transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa")).eval()
    model = Crepe(config)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


class Recipe:
    """A system in PyTorch.

    Args:
        system: its members are all averaged over their hidden states, or CREPE.
        networks: of each member, by name, on ``device``.
        dtype: that the networks take.
        device: where PyTorch computes.
    """

    def __init__(
        self,
        system: System,
        networks: Mapping[str, Network],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.system, self.dtype, self.device = system, dtype, device
        self.networks = [(is_crepe(member), networks[member.name]) for member in system.members]

    @classmethod
    def load(cls, system: System, weights: Mapping[str, Path], mode: str, device: str = "cpu") -> Self:
        """With PyTorch's own networks; ``weights`` by member, ``mode`` of :data:`MODES`."""
        dtype, compiled = MODES[mode]
        networks: dict[str, Network] = {}
        for member in system.members:
            network = load_network(member, weights[member.name]).to(device, dtype)
            networks[member.name] = torch.compile(network, dynamic=False) if compiled else network
        return cls(system, networks, dtype, device)

    def timestamp_embeddings(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Frames [T, D] of each clip: clips of one length in one batch, others one by one, as HEAR's tools do."""
        batches = [clips] if len({len(clip) for clip in clips}) == 1 else [[clip] for clip in clips]
        audio = [torch.from_numpy(np.stack(batch)).to(self.device) for batch in batches]
        return [frames for batch in audio for frames in self.frames(batch).cpu().numpy()]

    @torch.inference_mode()
    def frames(self, audio: torch.Tensor) -> torch.Tensor:
        """Audio [B, N] on ``device`` -> fused frames [B, T, D], float32."""
        audio = audio.to(self.dtype)
        members = [
            torch.stack([network(crepe_frames(clip, HOP)) for clip in audio]) if crepe else network(audio)
            for crepe, network in self.networks
        ]
        if len(members) == 1:
            return members[0].float()
        interpolate = torch.nn.functional.interpolate
        size = self.system.feature_size
        members = [interpolate(x, size, mode="linear", align_corners=False) for x in members]
        num_frames = members[0].shape[1]
        members = [interpolate(x.mT, num_frames, mode="linear", align_corners=False).mT for x in members]
        return torch.stack(members, dim=-1).flatten(2).float()


def random_weights(config: Any, path: Path) -> None:
    """Write random weights of an encoder, as PyTorch has them."""
    if not isinstance(config, CrepeConfig):
        find_reference(find_family(config.model_type).reference).random(config, seed=0).save(path)
        return
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(Crepe(config).state_dict(), path)
