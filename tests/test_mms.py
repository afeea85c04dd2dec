"""MMS' adapters: a language by name, in a folder, on the hub, in fairseq's files; the encoder is with wav2vec 2.0's."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx, traverse_util
from hub_server import COMMIT, HubServer, serve
from reference import VARIANTS, relative, speech
from refusals import refuses
from safetensors.torch import save_file

from gura_jax import load_model
from gura_jax.convert import convert
from gura_jax.convert.references import MMS, shake
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.models.encoder import Options
from gura_jax.models.families import config_from_source
from gura_jax.models.mms import Adapter

ADAPTER = "adapter_layer"


def model_of(seed: int) -> Any:
    """A fine-tuned model of published form: English adapters, and a head."""
    torch.manual_seed(seed)
    config = {k: v for k, v in VARIANTS["mms"].items() if k != "model_type"}
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**config, vocab_size=7)).eval()
    shake(model)
    return model


def write(folder: Path) -> None:
    """The model, and adapters of two more languages as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of(0).save_pretrained(folder)
    for seed, language, suffix in ((1, "fra", "safetensors"), (2, "azj-script_latin", "bin")):
        state = {k: v for k, v in model_of(seed).state_dict().items() if ADAPTER in k or "lm_head" in k}
        path = folder / f"adapter.{language}.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)


def check(params: Mapping[str, np.ndarray], seed: int) -> None:
    """All but the adapters are the model's; those are of this seed."""
    for own, name in ((seed, f"encoder.layers.1.{ADAPTER}.linear_2"), (0, "encoder.layers.1.attention.q_proj")):
        wanted = dict(model_of(own).named_parameters())[f"wav2vec2.{name}.weight"].detach().numpy().T
        np.testing.assert_array_equal(params[f"{name}.kernel"], wanted)


@pytest.mark.parametrize(("language", "seed"), [(None, 0), ("fra", 1), ("azj-script_latin", 2)])
def test_a_language_in_a_folder(tmp_path: Path, language: str | None, seed: int) -> None:
    write(tmp_path / "mms")
    converted = convert(tmp_path / "mms", language=language)
    assert converted.manifest.source == ("mms" if language is None else f"mms with the adapters of {language}")
    assert (f"adapter.{language}" in " ".join(converted.manifest.source_sha256)) == (language is not None)
    assert converted.manifest.architecture.model_type == "mms"
    check(converted.params, seed)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    write(tmp_path / "repos" / "owner" / "mms")
    yield from serve(tmp_path / "repos", tmp_path / "cache", monkeypatch)


def test_a_language_on_the_hub(hub: HubServer) -> None:
    """Fetched by name; the reference of parity takes the same; without a network it comes from the cache."""
    converted = convert("owner/mms", language="fra")
    assert converted.manifest.source == f"owner/mms@{COMMIT} with the adapters of fra"
    check(converted.params, 1)
    assert "adapter.fra.safetensors" in hub.downloads
    assert not any("azj" in name for name in hub.downloads)
    reference = MMS.load(converted.manifest.architecture, converted.manifest.source)
    theirs = reference.model.encoder.layers[1].adapter_layer.linear_2.weight.detach().numpy().T
    np.testing.assert_array_equal(theirs, converted.params[f"encoder.layers.1.{ADAPTER}.linear_2.kernel"])
    with refuses(ConversionError, "adapters of, azj-script_latin, fra, found 'deu'"):
        convert("owner/mms", language="deu")
    hub.shutdown()
    hub.server_close()
    check(convert("owner/mms", language="fra").params, 1)


def test_languages_that_cannot_be(tmp_path: Path) -> None:
    write(tmp_path / "mms")
    with refuses(ConversionError, "language: expected one that it has adapters of, azj-script_latin, fra", "'deu'"):
        convert(tmp_path / "mms", language="deu")
    for language in ("../fra", "", "fra.safetensors"):
        with refuses(ConversionError, "language: expected the name of an adapter", repr(language)):
            convert(tmp_path / "mms", language=language)
    with refuses(ConversionError, "language fra: expected a folder or a hub id", "found model.safetensors"):
        convert(tmp_path / "mms" / "model.safetensors", language="fra")
    plain = {k: v for k, v in VARIANTS["wav2vec2 large"].items() if k != "model_type"}
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**plain)).save_pretrained(tmp_path / "plain")
    with refuses(ConversionError, "language: expected one that it has adapters of, none, found 'fra'"):
        convert(tmp_path / "plain", language="fra")


def test_post_norm_networks_have_none() -> None:
    """transformers ignores theirs without a word."""
    with refuses(SystemConfigError, "do_stable_layer_norm: expected true, as only pre-norm networks have adapters"):
        config_from_source({**VARIANTS["mms"], "do_stable_layer_norm": False})


def test_a_language_matters(tmp_path: Path) -> None:
    write(tmp_path / "mms")
    found = [load_model(str(tmp_path / "mms"))]
    from gura_jax import checkpoint

    converted = convert(tmp_path / "mms", language="fra")
    checkpoint.save(tmp_path / "fra", converted.params, converted.manifest)
    found.append(load_model(str(tmp_path / "fra")))
    english, french = (model.scene_embeddings([speech(8000)])[0] for model in found)
    assert np.abs(english - french).max() > 1e-2


# fairseq's names: wav2vec2.py and wav2vec2_asr.py of fairseq.models.wav2vec
FAIRSEQ = {
    r"wav2vec2\.feature_extractor\.conv_layers\.(\d+)\.conv\.": r"feature_extractor.conv_layers.\1.0.",
    r"wav2vec2\.feature_extractor\.conv_layers\.(\d+)\.layer_norm\.": r"feature_extractor.conv_layers.\1.2.1.",
    r"wav2vec2\.feature_projection\.layer_norm\.": "layer_norm.",
    r"wav2vec2\.feature_projection\.projection\.": "post_extract_proj.",
    r"wav2vec2\.masked_spec_embed": "mask_emb",
    r"wav2vec2\.encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0": "encoder.pos_conv.0.weight_g",
    r"wav2vec2\.encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1": "encoder.pos_conv.0.weight_v",
    r"wav2vec2\.encoder\.pos_conv_embed\.conv\.bias": "encoder.pos_conv.0.bias",
    r"wav2vec2\.(encoder\.layers\.\d+)\.attention\.": r"\1.self_attn.",
    r"wav2vec2\.(encoder\.layers\.\d+)\.layer_norm\.": r"\1.self_attn_layer_norm.",
    r"wav2vec2\.(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.": r"\1.fc1.",
    r"wav2vec2\.(encoder\.layers\.\d+)\.feed_forward\.output_dense\.": r"\1.fc2.",
    r"wav2vec2\.": "",
}
STACKED = {
    "norm.weight": "ln_W",
    "norm.bias": "ln_b",
    "linear_1.weight": "W_a",
    "linear_1.bias": "b_a",
    "linear_2.weight": "W_b",
    "linear_2.bias": "b_b",
}


def fairseq_state(seed: int) -> dict[str, torch.Tensor]:
    """The model as fairseq has it, whose adapters have a first axis of one place."""
    found = {}
    for name, value in model_of(seed).state_dict().items():
        if name.startswith("lm_head."):
            found[name.replace("lm_head", "w2v_encoder.proj")] = value
            continue
        pattern, theirs = next((a, b) for a, b in FAIRSEQ.items() if re.match(a, name))
        renamed = re.sub(pattern, theirs, name)
        head, _, part = renamed.partition(f".{ADAPTER}.")
        renamed, value = (f"{head}.{ADAPTER}.{STACKED[part]}", value[None]) if part else (renamed, value)
        found[f"w2v_encoder.w2v_model.{renamed}"] = value.clone()
    return found


def write_fairseq(path: Path, languages: bool = True, **changes: Any) -> Path:
    """A file as infer.py of fairseq's speech recognition reads it: by language, the adapters and a head."""
    inner = {
        "_name": "wav2vec2",
        "extractor_mode": "layer_norm",
        "layer_norm_first": True,
        "conv_bias": True,
        "encoder_layers": 2,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2",
        "conv_pos_groups": 4,
        "layer_type": "transformer",  # as it was trained; fine-tuning says otherwise
        "adp_num": -1,
    }
    settings = {"layer_type": "trf_adp", "adp_num": 1, "adp_dim": 5, "adp_act_fn": "relu", "adp_trf_idx": "all"}
    settings = {"_name": "wav2vec_ctc", **settings, "w2v_args": {"model": inner}, **changes}
    content: dict[str, Any] = {
        "cfg": {"model": settings, "task": {"normalize": True, "multi_corpus_keys": "a"}},
        "model": fairseq_state(0),
    }
    if languages:
        content["adapter"] = {
            language: {
                "model": {k: v for k, v in fairseq_state(seed).items() if ADAPTER in k or ".proj." in k},
                "task_state": {},
            }
            for language, seed in (("eng", 0), ("fra", 1), ("azj-script_latin", 2))
        }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("language", "seed"), [("eng", 0), ("fra", 1), ("azj-script_latin", 2)])
def test_a_language_in_fairseqs_file(tmp_path: Path, language: str, seed: int) -> None:
    """The arrays of transformers' model, all of them."""
    write(tmp_path / "mms")
    (tmp_path / "mms" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    expected = convert(tmp_path / "mms", language=None if language == "eng" else language)
    path = write_fairseq(tmp_path / "mms1b_all.pt")
    found = convert(path, language=language)
    check(found.params, seed)
    assert found.manifest.source == f"mms1b_all.pt with the adapters of {language}"
    assert list(found.manifest.source_sha256) == ["mms1b_all.pt"]
    assert found.manifest.architecture == expected.manifest.architecture
    assert found.manifest.normalise is expected.manifest.normalise is True
    assert found.params.keys() == expected.params.keys()
    for name, array in expected.params.items():
        np.testing.assert_array_equal(found.params[name], array, err_msg=name)


def test_adapters_compute_what_fairseqs_do(tmp_path: Path) -> None:
    """AdapterFast of fairseq.models.wav2vec.wav2vec2, with the tensors of the file, beside ours with the converted."""
    converted = convert(write_fairseq(tmp_path / "a.pt"), language="fra")
    config: Any = converted.manifest.architecture
    path = f"encoder.layers.1.{ADAPTER}."
    stack = {n: fairseq_state(1)[f"w2v_encoder.w2v_model.{path}{n}"] for n in STACKED.values()}
    x = torch.from_numpy(speech(320)).reshape(10, 32)
    h = torch.nn.functional.layer_norm(x, (32,), stack["ln_W"][0], stack["ln_b"][0])
    h = torch.nn.functional.linear(h, stack["W_a"][0], stack["b_a"][0]).relu()
    expected = torch.nn.functional.linear(h, stack["W_b"][0], stack["b_b"][0])
    own = {k.removeprefix(path): jnp.asarray(v) for k, v in converted.params.items() if k.startswith(path)}
    assert len(own) == len(STACKED)
    adapter = Adapter(config, Options(), rngs=nnx.Rngs(0))
    nnx.update(adapter, traverse_util.unflatten_dict({tuple(k.split(".")): v for k, v in own.items()}))
    assert relative(adapter(jnp.asarray(x.numpy())[None])[0], expected.numpy()) <= 1e-6


def test_one_fine_tuned_by_fairseq_has_no_language(tmp_path: Path) -> None:
    """What fairseq writes itself, before the languages are put into one file."""
    path = write_fairseq(tmp_path / "a.pt", languages=False, adp_trf_idx="0:2")
    check(convert(path).params, 0)
    with refuses(ConversionError, "language fra: expected a folder or a hub id", "found a.pt"):
        convert(path, language="fra")


@pytest.mark.parametrize("language", [None, "deu"])
def test_fairseqs_file_needs_one_of_its_languages(tmp_path: Path, language: str | None) -> None:
    path = write_fairseq(tmp_path / "a.pt")
    with refuses(ConversionError, "adapters of, azj-script_latin, eng, fra", f"found {language!r}"):
        convert(path, language=language)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_type": "transformer"}, "layer_type is 'transformer', which is not supported: expected 'trf_adp'"),
        ({"adp_num": 3}, "adp_num is 3, which is not supported: expected 1"),
        ({"adp_act_fn": "gelu"}, "adp_act_fn is 'gelu'"),
        ({"adp_trf_idx": "1:2"}, "adp_trf_idx is '1:2', which is not supported: expected 'all' or '0:2'"),
        ({"adp_dim": "5"}, "adp_dim is '5': expected a positive whole number"),
        ({"adp_dim": 6}, "adapter_layer.W_a: expected shape [1, 6, 32], found [1, 5, 32]"),
    ],
)
def test_other_adapters_of_fairseq_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with refuses(ConversionError, words):
        convert(write_fairseq(tmp_path / "a.pt", **changes), language="fra")
