"""Key table of Wav2CLIP's file."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import Contents, KeyTable, Row, conv2d_batch_norm, dense

STAGES, BLOCKS = 4, 2  # of ResNet-18


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """From the shapes: the file has no settings."""
    kernels = [contents.shapes.get(f"audio_encoder.layer{i + 1}.{BLOCKS - 1}.conv2.weight", ()) for i in range(STAGES)]
    layers = [contents.shapes.get(f"audio_transform.sequential.{i}.weight", ()) for i in (0, 3)]
    if not all(len(kernel) == 4 for kernel in kernels) or not all(len(layer) == 2 for layer in layers):
        faults.append("audio_encoder, audio_transform: expected ResNet-18 and two layers, found others")
        return {}
    return {
        "model_type": "wav2clip",
        "channels": [kernel[0] for kernel in kernels],
        "hidden_size": layers[0][0],
        "embedding_size": layers[1][0],
    }


def _rows() -> list[Row]:
    encoder, layers = r"audio_encoder\.", r"audio_transform\.sequential\."
    rows = [*conv2d_batch_norm(f"{encoder}conv1", f"{encoder}bn1", "conv1")]
    rows += [*dense(f"{layers}0", "fc1"), *dense(f"{layers}3", "fc2")]
    for i in range(STAGES):
        for k in range(BLOCKS):
            theirs, ours = rf"{encoder}layer{i + 1}\.{k}\.", f"blocks.{BLOCKS * i + k}."
            for n in (1, 2):
                rows += conv2d_batch_norm(f"{theirs}conv{n}", f"{theirs}bn{n}", f"{ours}conv{n}")
            rows += conv2d_batch_norm(rf"{theirs}downsample\.0", rf"{theirs}downsample\.1", f"{ours}downsample")
    return rows


KEYS: Mapping[str, KeyTable] = {
    "wav2clip": KeyTable(
        rows=tuple(_rows()),
        # The spectrogram's window; and what was trained beside it.
        ignored=r"audio_encoder\.spectrogram\..+|(image|text)_\w+\..+|loss\w*\..+|.+\.num_batches_tracked",
        recognise=r"^audio_encoder\.layer4\.1\.conv2\.weight$",
        config=_read_config,
    )
}
