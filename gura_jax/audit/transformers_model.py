"""Audio models of transformers, called as their documentation says: AutoFeatureExtractor, then AutoModel."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import gura_jax.convert.references  # noqa: F401 - mends a torchaudio that transformers fails to import
from gura_jax.audit.subjects import Embedding, Mode
from gura_jax.errors import InputError, SystemConfigError
from gura_jax.systems import HUB_ID

AUDIO_INPUTS = ("input_values", "input_features")
MASK = "attention_mask"
SEED = 0  # of random weights


class TransformersModel:
    """An audio model of transformers, on the CPU in float32.

    The extractor pads a batch, and what it returns goes to the model: with the attention mask if it returns one, which
    is judged; and the other way round, for information, if the model takes a mask. Frames are those of the last hidden
    state that the model's own ``_get_feat_extract_output_lengths`` counts, and their mean is the scene.
    """

    shortest = 0
    packages: tuple[str, ...] = ("transformers", "torch")

    def __init__(self, source: str, weights: Any, size: Any) -> None:
        self.name = f"transformers:{source}"
        if size is not None or weights not in ("pretrained", "random"):
            raise InputError("transformers:NAME takes no --size, and --weights pretrained or random")
        if not Path(source).is_dir() and not HUB_ID.fullmatch(source):
            raise self._refused("a folder of Hugging Face's, or a hub id", "neither")
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # those of its libraries too
            raise self._refused("a model of transformers", error) from None
        kind = f"an audio model, with its feature extractor ({config.model_type})"
        try:
            self._extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
            rate = self._extractor.sampling_rate
            torch.manual_seed(SEED)
            if weights == "random":
                model = transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:
            raise self._refused(kind, error) from None
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self._model: Any = model.eval()
        self._input = str(getattr(model, "main_input_name", None))
        if not isinstance(rate, int) or self._input not in AUDIO_INPUTS:
            raise self._refused(kind, f"main input {self._input}, sampling rate {rate!r}")
        self.sample_rate = rate
        # As users call it: an extractor that pads by itself (Whisper's, to 30 s) is left to do so.
        signature = inspect.signature(self._extractor.__call__).parameters
        default = signature["padding"].default if "padding" in signature else None
        self._padding = default if isinstance(default, (str, bool)) and default else True
        silence = [np.zeros(rate, np.float32)]
        try:
            by_itself, asked = (MASK in self._extract(silence, mask) for mask in (None, True))
        except Exception as error:
            raise self._refused(kind, error) from None
        takes_mask = MASK in inspect.signature(self._model.forward).parameters
        self._own_mask = takes_mask and by_itself
        self.modes = (self._mode(self._own_mask, True),)
        if takes_mask and asked:
            self.modes += (self._mode(not self._own_mask, False),)

    def _refused(self, wanted: str, found: object) -> SystemConfigError:
        if isinstance(found, Exception):
            lines = str(found).strip().splitlines() or [""]
            found = f"{type(found).__name__}: {lines[0]}"
        return SystemConfigError(f"{self.name}: expected {wanted}, found: {found}")

    @staticmethod
    def _mode(mask: bool, judged: bool) -> Mode:
        return Mode("with mask" if mask else "without mask", judged)

    def embed(self, clips: Sequence[np.ndarray], row: int, mode: Mode) -> Embedding:
        """See :class:`gura_jax.audit.subjects.Subject`."""
        mask = mode.name == "with mask"
        # Where a mask is only held back from the model, the extractor still normalises each clip by itself.
        inputs = self._extract(clips, True if mask and not self._own_mask else None)
        arguments = {self._input: inputs[self._input]} | ({MASK: inputs[MASK]} if mask else {})
        with torch.inference_mode():
            hidden = getattr(self._model(**arguments), "last_hidden_state", None)  # [B, T, D]
        if hidden is None:
            raise SystemConfigError(f"{self.name}: expected a model with a last_hidden_state, found none")
        frames = hidden[row].numpy()  # [T, D]
        frames = frames[: self._count(clips, row, len(frames), inputs[self._input])]
        return Embedding(frames, frames.mean(axis=0))

    def _extract(self, clips: Sequence[np.ndarray], mask: bool | None = None) -> Mapping[str, Any]:
        options = {} if mask is None else {"return_attention_mask": mask}
        return self._extractor(
            list(clips), sampling_rate=self.sample_rate, padding=self._padding, return_tensors="pt", **options
        )

    def _count(self, clips: Sequence[np.ndarray], row: int, frames: int, inputs: torch.Tensor) -> int:
        """Frames of a clip, of all that its row has."""
        length = len(clips[row])
        if inputs.ndim > 2:  # a spectrogram, whose rows are counted by the extractor
            mask = self._extract(clips, True).get(MASK)
            if mask is None:  # of fixed length: all is the clip's
                return frames
            length = int(mask[row].sum())
            if not hasattr(self._model, "_get_feat_extract_output_lengths"):
                return length if frames == mask.shape[1] else frames
        if not hasattr(self._model, "_get_feat_extract_output_lengths"):
            return frames
        return int(self._model._get_feat_extract_output_lengths(torch.tensor([length]))[0])
