"""MMS' adapters: a language by name, in a folder and on the hub; the encoder itself is tested with wav2vec 2.0's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import COMMIT, HubServer, serve
from reference import VARIANTS, speech
from refusals import refuses
from safetensors.torch import save_file

from gura_jax import load_model
from gura_jax.convert import convert
from gura_jax.convert.references import MMS, shake
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.models.families import config_from_source

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
    with refuses(ConversionError, "language fra: expected a folder or a hub id"):
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
