"""The published recipe in PyTorch: transformers' encoders with all hidden states, CREPE clip by clip, interpolate.

torchcrepe's network is written out here, so that nothing but torch and transformers is needed.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gura_jax import ENCODERS, System
from gura_jax.convert.references import find_reference
from gura_jax.models.crepe import (
    BATCH_NORM_EPS,
    CAPACITY_MULTIPLIER,
    HOP,
    LAYERS,
    MIN_STD,
    PITCH_BINS,
    WINDOW,
    CrepeConfig,
)
from gura_jax.models.families import find_family

MODES = ("eager", "compile", "bfloat16")


class Crepe(torch.nn.Module):
    """torchcrepe's network and its names."""

    def __init__(self, config: CrepeConfig) -> None:
        super().__init__()
        sizes = [1, *(layer.channels * CAPACITY_MULTIPLIER[config.capacity] for layer in LAYERS)]
        for i, layer in enumerate(LAYERS):
            conv = torch.nn.Conv2d(sizes[i], sizes[i + 1], (layer.kernel, 1), (layer.stride, 1))
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"conv{i + 1}_BN", torch.nn.BatchNorm2d(sizes[i + 1], eps=BATCH_NORM_EPS))
        self.classifier = torch.nn.Linear(
            4 * sizes[-1], PITCH_BINS
        )  # a checkpoint has it, an embedding does not use it

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalised frames [F, 1024] -> the fifth pool [F, D]."""
        x = frames[:, None, :, None]
        for i, layer in enumerate(LAYERS[:5]):
            x = torch.nn.functional.pad(x, (0, 0, *layer.padding))
            x = getattr(self, f"conv{i + 1}_BN")(torch.nn.functional.relu(getattr(self, f"conv{i + 1}")(x)))
            x = torch.nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return x.reshape(len(x), -1)


class Recipe:
    """A system in PyTorch.

    Args:
        system: the system; its members are all averaged over their hidden states, or CREPE.
        folders: by encoder, a Hugging Face folder or CREPE's state dict.
        mode: one of :data:`MODES`.
    """

    def __init__(self, system: System, folders: Mapping[str, Path], mode: str) -> None:
        self.system = system
        self.dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        self.networks: list[tuple[bool, Any]] = []
        for member in system.members:
            config, path = ENCODERS[str(member.encoder)].config, folders[str(member.encoder)]
            if isinstance(config, CrepeConfig):
                model: Any = Crepe(config)
                model.load_state_dict(torch.load(path, weights_only=True))
            else:
                kind = {"hubert": transformers.HubertModel, "wav2vec2": transformers.Wav2Vec2Model}[config.model_type]
                model: Any = kind.from_pretrained(path)
            model = model.eval().to(self.dtype)
            if mode == "compile":
                model = torch.compile(model, dynamic=False)
            self.networks.append((isinstance(config, CrepeConfig), model))

    @torch.inference_mode()
    def timestamp_embeddings(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Frames [T, D] of each clip: clips of one length in one batch, others one by one, as HEAR's tools do."""
        batches = [clips] if len({len(clip) for clip in clips}) == 1 else [[clip] for clip in clips]
        return [frames for batch in batches for frames in self._batch(np.stack(batch))]

    def _batch(self, audio: np.ndarray) -> list[np.ndarray]:
        batch = torch.from_numpy(audio).to(self.dtype)
        members = [
            torch.stack([self._crepe(model, clip) for clip in batch]) if is_crepe else self._speech(model, batch)
            for is_crepe, model in self.networks
        ]
        if len(members) == 1:
            return list(members[0].float().numpy())
        interpolate = torch.nn.functional.interpolate
        size = self.system.feature_size
        members = [interpolate(x, size, mode="linear", align_corners=False) for x in members]
        num_frames = members[0].shape[1]
        members = [interpolate(x.mT, num_frames, mode="linear", align_corners=False).mT for x in members]
        return list(torch.stack(members, dim=-1).flatten(2).float().numpy())

    def _speech(self, model: Any, audio: torch.Tensor) -> torch.Tensor:
        out = model(audio, output_hidden_states=True)
        # transformers 5 leaves the final layer norm out of the last hidden state
        return torch.stack([*out.hidden_states[:-1], out.last_hidden_state]).mean(dim=0)

    def _crepe(self, model: Any, clip: torch.Tensor) -> torch.Tensor:
        frames = torch.nn.functional.pad(clip, (WINDOW // 2, WINDOW // 2)).unfold(0, WINDOW, HOP)
        frames = frames - frames.mean(dim=1, keepdim=True)
        return model(frames / frames.std(dim=1, keepdim=True).clamp_min(MIN_STD))


def random_weights(encoder: str, path: Path) -> None:
    """Write random weights of a registered encoder, as PyTorch has them."""
    config = ENCODERS[encoder].config
    if not isinstance(config, CrepeConfig):
        find_reference(find_family(config.model_type).reference).random(config, seed=0).save(path)
        return
    torch.manual_seed(0)
    model = copy.deepcopy(Crepe(config)).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
