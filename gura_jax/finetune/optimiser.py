"""AdamW with a rate for each weight: which weights are trained, and how fast."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from gura_jax.errors import SystemConfigError
from gura_jax.finetune.settings import Part, Settings
from gura_jax.fusion import FusedMember

STATISTICS = (".mean", ".var")  # ends of the names of batch norm's running statistics, which no gradient is for


def member_scales(member: FusedMember, params: Mapping[str, Any], part: Part, decay: float) -> dict[str, np.ndarray]:
    """Return the factor of the learning rate of each weight of an encoder; 0 if it is not trained.

    Args:
        member: the encoder.
        params: its weights.
        part: what is trained.
        decay: from each block to the one before it.

    Returns:
        By name, float32 arrays that broadcast to the weights.

    Raises:
        SystemConfigError: it has fewer blocks.
    """
    depths = member.encoder.depths(params)
    blocks = max((int(depth.max()) for depth in depths.values()), default=0)
    if part.kind == "last" and 0 < blocks < part.blocks:
        raise SystemConfigError(
            f"train: expected at most last:{blocks}, as {member.name} has {blocks} blocks, found last:{part.blocks}"
        )
    first = {"all": 0, "last": max(1, blocks - part.blocks + 1), "layer-weights": blocks + 1}[part.kind]
    scales = {}
    for name, depth in depths.items():
        trained = (depth >= first) & (not name.endswith(STATISTICS))
        scales[name] = np.where(trained, float(decay) ** (blocks + 1 - depth), 0.0).astype(np.float32)
    return scales


def schedule(settings: Settings, steps: int) -> optax.Schedule:
    """Return the learning rate by step: rising to the highest, then by a cosine to zero at the end."""
    highest, warmup = settings.learning_rate, round(settings.warmup * steps)
    return optax.warmup_cosine_decay_schedule(highest / (warmup + 1), highest, warmup, max(steps, warmup + 1))


def adamw(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Return AdamW after clipping by the global norm; kernels decay, biases, norms and layer weights do not."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(schedule(settings, steps), weight_decay=settings.weight_decay, mask=_kernels),
    )


def _kernels(params: Any) -> Any:
    def is_kernel(path: Any, _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True).endswith("kernel")

    return jax.tree.map_with_path(is_kernel, params)
