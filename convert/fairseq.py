"""fairseq's settings in transformers' names, read from a checkpoint's ``args`` or ``cfg``."""

import argparse
import ast
from collections.abc import Iterable, Mapping
from typing import Any

from gura_jax.convert.keys import Contents, Wrapping

# s3prl's conversions of fairseq's checkpoints name the weights model_weight and the settings model_cfg.
WRAPPING = Wrapping(
    state=("model", "model_weight"),
    settings=("args", "cfg", "model_cfg", "task_cfg"),
    inert=("fairseq.data.dictionary.Dictionary",),
    languages=("adapter",),  # of MMS
)

# name -> name in transformers, default
_SIZES = {
    "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12),
    "conv_pos": ("num_conv_pos_embeddings", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
}
_FLAGS = {"layer_norm_first": "do_stable_layer_norm", "conv_bias": "conv_bias"}
# name -> name in transformers, default, value -> value in transformers
_CHOICES = {
    "extractor_mode": ("feat_extract_norm", "default", {"default": "group", "layer_norm": "layer"}),
    "activation_fn": (
        "hidden_act",
        "gelu",
        {"gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new", "relu": "relu", "swish": "silu"},
    ),
}
_CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"
# Settings that change the computation and have no counterpart in transformers: the one supported value.
FIXED: Mapping[str, Any] = {
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "quantize_input": False,
    "crop_seq_to_multiple": 1,
}
MODELS: Mapping[str, str] = {
    "hubert": "hubert",
    "hubert_ctc": "hubert",
    "wav2vec2": "wav2vec2",
    "wav2vec_ctc": "wav2vec2",
}
_MAX_CONVOLUTIONS = 64


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _settings(contents: Contents) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the checkpoint's model, and of the one within it that was fine-tuned."""
    extra = contents.settings
    outer = _plain(extra.get("model_cfg")) or _plain(_plain(extra.get("cfg")).get("model")) or _plain(extra.get("args"))
    if "w2v_args" not in outer:
        return outer, outer
    nested = _plain(outer["w2v_args"])
    return outer, _plain(nested.get("model")) or nested


def model_settings(contents: Contents) -> dict[str, Any]:
    """Those of the encoder, by fairseq's names; empty where there are none."""
    return _settings(contents)[1]


def layer_settings(contents: Contents) -> dict[str, Any]:
    """Kind and adapters of the layers, by fairseq's names: fine-tuning replaces those of the model within."""
    outer, model = _settings(contents)
    own = {name: value for name, value in outer.items() if value is not None}
    return {name: value for name, value in {**model, **own}.items() if name == "layer_type" or name[:4] == "adp_"}


def normalises(contents: Contents, faults: list[str]) -> bool:
    """Whether clips are normalised; the task says so, which s3prl's conversions have beside the model."""
    extra = contents.settings
    tasks = [_plain(extra.get("task_cfg")), _plain(_plain(extra.get("cfg")).get("task")), _plain(extra.get("args"))]
    found = next((task["normalize"] for task in tasks if "normalize" in task), False)
    if type(found) is not bool:
        faults.append(f"fairseq's normalize is {found!r}: expected true or false")
    return found is True


def read_config(
    contents: Contents,
    faults: list[str],
    *,
    models: Mapping[str, str] = MODELS,
    fixed: Mapping[str, Any] = FIXED,
) -> dict[str, Any]:
    """Translate a checkpoint's ``args`` or ``cfg``, or s3prl's ``model_cfg``; fine-tuning nests the model's own.

    Args:
        contents: of the checkpoint.
        faults: what is wrong is added to them.
        models: fairseq's names of models -> the ``model_type`` that they are.
        fixed: settings that change the computation -> the one supported value.
    """
    outer, model = _settings(contents)
    if not outer:
        faults.append("no settings beside the weights: expected fairseq's args or cfg")
        return {}
    if not model:
        faults.append("w2v_args, the settings of the model that was fine-tuned, are empty")
        return {}
    names = [str(settings.get("_name") or settings.get("arch") or "") for settings in (outer, model)]
    if not any(names):
        names = [_name(contents.shapes)]
    known = ", ".join(models)
    faults += [
        f"the model is fairseq's {name!r}: expected one of {known}"
        for name in dict.fromkeys(names)
        if name and name not in models
    ]
    model_type = models.get(names[-1] or names[0])
    config: dict[str, Any] = {
        "model_type": model_type,
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
    }

    config["do_normalize"] = normalises(contents, faults)
    for name, (target, default) in _SIZES.items():
        value = config[target] = model.get(name, default)
        if type(value) is not int or value < 1:
            faults.append(f"fairseq's {name} is {value!r}: expected a positive whole number")
    for name, target in _FLAGS.items():
        value = config[target] = model.get(name, False)
        if type(value) is not bool:
            faults.append(f"fairseq's {name} is {value!r}: expected true or false")
    for name, (target, default, values) in _CHOICES.items():
        value = model.get(name, default)
        config[target] = values.get(value) if isinstance(value, str) else None
        if config[target] is None:
            faults.append(f"fairseq's {name} is {value!r}: expected one of {', '.join(values)}")
    for name, known in fixed.items():
        for settings in (outer, model) if model is not outer else (model,):
            value = settings.get(name)
            if value is not None and value != known:
                faults.append(f"fairseq's {name} is {value!r}, which is not supported: expected {known!r}")
    if model_type == "hubert":
        config["feat_proj_layer_norm"] = True
        config["conv_pos_batch_norm"] = bool(model.get("conv_pos_batch_norm", False))
    elif model.get("conv_pos_batch_norm"):
        faults.append("fairseq's conv_pos_batch_norm is true, which is supported for HuBERT only")

    layers = convolutions("conv_feature_layers", model.get("conv_feature_layers", _CONVOLUTIONS), faults)
    config["conv_dim"], config["conv_kernel"], config["conv_stride"] = map(list, zip(*layers, strict=True))
    config["num_feat_extract_layers"] = len(layers)
    if config["conv_dim"][-1] == config["hidden_size"]:
        faults.append(
            "no post_extract_proj, which is not supported: fairseq leaves it out where the last convolution is "
            f"as wide as the encoder ({config['hidden_size']})"
        )
    return config


def _name(keys: Iterable[str]) -> str:
    """By what only one of the models has; s3prl's older conversions leave the name out."""
    ends = {key.rsplit("w2v_model.", 1)[-1] for key in keys}
    return "hubert" if "label_embs_concat" in ends else "wav2vec2" if "quantizer.vars" in ends else "unnamed"


def convolutions(name: str, text: object, faults: list[str]) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) a layer, from a setting such as "[(512, 10, 5)] + [(512, 3, 2)] * 4"."""
    try:
        if not isinstance(text, str) or len(text) > 1000:
            raise ValueError
        layers = _layers(ast.parse(text.strip(), mode="eval").body)
        if not layers:
            raise ValueError
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        faults.append(
            f"fairseq's {name} is {str(text)[:200]!r}: expected (channels, kernel, stride) "
            f"a layer, such as {_CONVOLUTIONS!r}, of at most {_MAX_CONVOLUTIONS} layers"
        )
        return [(1, 1, 1)]
    return layers


def _layers(node: ast.expr) -> list[tuple[int, int, int]]:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            layers = _layers(left) + _layers(right)
        case ast.BinOp(ast.List() as items, ast.Mult(), ast.Constant(int(times))) if times <= _MAX_CONVOLUTIONS:
            layers = _layers(items) * times
        case ast.List(elements):
            layers = [_layer(element) for element in elements]
        case _:
            raise ValueError
    if len(layers) > _MAX_CONVOLUTIONS:
        raise ValueError
    return layers


def _layer(node: ast.expr) -> tuple[int, int, int]:
    match node:
        case ast.Tuple([ast.Constant(int(channels)), ast.Constant(int(kernel)), ast.Constant(int(stride))]):
            if min(channels, kernel, stride) >= 1:
                return channels, kernel, stride
    raise ValueError
