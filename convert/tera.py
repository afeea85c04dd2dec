"""Key table of TERA, for s3prl's files."""

from collections.abc import Mapping
from typing import Any

from gura_jax.convert.keys import Contents, KeyTable, Wrapping, dense, norm

_LAYER, _OURS = r"encoder\.layer\.(\d+)", r"encoder.layers.\1"


def _read_config(contents: Contents, faults: list[str]) -> Mapping[str, Any]:
    """The settings of the transformer, of the pieces and of the spectrogram, which are by themselves in the file."""
    found = next((c for c in contents.settings.values() if isinstance(c, dict) and "transformer" in c), {})
    parts = {name: found.get(name) for name in ("transformer", "task", "audio")}
    faults += [
        f"Config: {name}: expected settings of s3prl's TERA, found {part!r}"
        for name, part in parts.items()
        if not isinstance(part, dict)
    ]
    if faults:
        return {}
    audio: dict[str, Any] = dict(parts["audio"] or {})
    if "kaldi" in audio:
        faults.append("Config: audio: kaldi: expected a mel spectrogram of s3prl's own, as TERA's default models have")
    audio |= audio["input"] if isinstance(audio.get("input"), dict) else {}
    transformer = {k: v for k, v in (parts["transformer"] or {}).items() if k not in _UNREAD}
    kept = {k: v for k, v in audio.items() if k not in ("input", "target", "channel", "n_mfcc", "kaldi")}
    length = (parts["task"] or {}).get("sequence_length")
    return {"model_type": "tera", **transformer, **kept, "sequence_length": length}


# Replaced by what the spectrogram has; and whether blocks share weights, which the file has for each.
_UNREAD = ("input_dim", "share_layer")

KEYS: Mapping[str, KeyTable] = {
    "s3prl": KeyTable(
        rows=(
            *dense(r"input_representations\.spec_transform", "projection"),
            *norm(r"input_representations\.LayerNorm", "encoder.layer_norm"),
            *dense(rf"{_LAYER}\.attention\.self\.query", f"{_OURS}.attention.q_proj"),
            *dense(rf"{_LAYER}\.attention\.self\.key", f"{_OURS}.attention.k_proj"),
            *dense(rf"{_LAYER}\.attention\.self\.value", f"{_OURS}.attention.v_proj"),
            *dense(rf"{_LAYER}\.attention\.output\.dense", f"{_OURS}.attention.out_proj"),
            *norm(rf"{_LAYER}\.attention\.output\.LayerNorm", f"{_OURS}.layer_norm"),
            *dense(rf"{_LAYER}\.intermediate\.dense", f"{_OURS}.feed_forward.intermediate_dense"),
            *dense(rf"{_LAYER}\.output\.dense", f"{_OURS}.feed_forward.output_dense"),
            *norm(rf"{_LAYER}\.output\.LayerNorm", f"{_OURS}.final_layer_norm"),
        ),
        recognise=r"input_representations\.spec_transform\.",
        config=_read_config,
        wrapping=Wrapping(state=("Transformer",), settings=("Config", "Upstream_Config")),
    ),
}
