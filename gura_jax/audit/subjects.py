"""What can be audited, behind one small interface: our systems, HEAR modules, and transformers' audio models."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gura_jax.audit.cases import CASES, FEW_CASES, Case
from gura_jax.batching import bucket_length
from gura_jax.errors import InputError, SystemConfigError
from gura_jax.evaluate.modules import Module
from gura_jax.loading import load_model
from gura_jax.model import Model


class Embedding(NamedTuple):
    """A clip's embeddings, without those of padding."""

    frames: np.ndarray  # [T, D]
    scene: np.ndarray | None  # [S]; None: the model has none of the clip without padding


class Mode(NamedTuple):
    """A way to pass a batch to a model.

    Attributes:
        name: printed.
        judged: whether its differences fail the audit; others are for information.
        cases: those that are tried.
    """

    name: str
    judged: bool = True
    cases: tuple[Case, ...] = CASES


class Subject(Protocol):
    """A model, as the audit sees it.

    Attributes:
        name: printed.
        sample_rate: of the clips that it takes, in Hz.
        shortest: samples of the shortest clip that it takes, where that is known; companions have as many at least.
        modes: ways to pass a batch; the first is also the way to embed a clip alone.
        packages: that compute, for their versions.
    """

    name: str
    sample_rate: int
    shortest: int
    modes: tuple[Mode, ...]
    packages: tuple[str, ...]

    def embed(self, clips: Sequence[np.ndarray], row: int, mode: Mode) -> Embedding:
        """Embed clips [samples] as one batch, and return the embeddings of one of them.

        May raise whatever the model's own code raises.
        """
        ...


class OwnSystem:
    """A system of gura_jax; its batches have the clips' lengths, more padding, or are those of ``Model.embed``."""

    packages: tuple[str, ...] = ("gura-jax", "jax")

    def __init__(self, name: str, weights: Any, size: Any) -> None:
        self.name = name
        one, *more = jax.local_devices()
        self._load = functools.partial(load_model, name, weights=weights, size=size)
        self._model = self._load(devices=[one])
        self.sample_rate = self._model.sample_rate
        self.shortest = self._model.shortest(frames=True, scenes=True)
        self._calls: dict[Mode, Callable[[Sequence[np.ndarray], int], Embedding]] = {
            Mode("one batch"): functools.partial(self._pad, self._model, 0),
            Mode("more padding", cases=FEW_CASES): functools.partial(self._pad, self._model, 1),
            Mode("packed by embed()", cases=FEW_CASES): self._pack,
        }
        if more:
            mode = Mode(f"on {1 + len(more)} devices", cases=FEW_CASES)
            self._calls[mode] = lambda clips, row: self._pad(self._on_all_devices, 0, clips, row)
        self.modes = tuple(self._calls)

    @functools.cached_property
    def _on_all_devices(self) -> Model:
        return self._load()

    def embed(self, clips: Sequence[np.ndarray], row: int, mode: Mode) -> Embedding:
        """See :class:`Subject`."""
        return self._calls[mode](self._model.check(list(clips), self.shortest), row)

    def _pad(self, model: Model, more: int, clips: Sequence[np.ndarray], row: int) -> Embedding:
        """Compute one batch, with ``more`` silent rows, and if there are any, at the next bucket's length."""
        longest = max(map(len, clips))
        samples = bucket_length(longest + more) if more else longest
        out = jax.device_get(model(*model.pad(clips, len(clips) + more, samples)))
        return Embedding(out.frames[row, : out.counts[row]], out.scenes[row])

    def _pack(self, clips: Sequence[np.ndarray], row: int) -> Embedding:
        found = self._model.embed(list(clips))[row]
        return Embedding(np.asarray(found.frames), np.asarray(found.scene))


class HearModule:
    """A module with HEAR's common API, which takes clips of one length: the caller pads others with zeros.

    It cannot be told the clips' lengths. Of a padded clip as many frames are taken as the clip has alone, and no scene
    embedding, which would be that of the clip and its padding.
    """

    shortest = 0

    def __init__(self, name: str, weights: Any, size: Any) -> None:
        if size is not None or not isinstance(weights, str) or weights == "random":
            raise InputError("hear:MODULE takes no --size, and one --weights, the model file that its load_model gets")
        self.name = f"hear:{name}"
        self._module = Module(name, None if weights == "pretrained" else weights)
        self.sample_rate = self._module.rate
        self.modes = (Mode("padded with zeros"),)
        self.packages: tuple[str, ...] = ("torch",) if self._module.torch is not None else ("numpy",)
        self._counts: dict[int, int] = {}  # frames by samples

    def embed(self, clips: Sequence[np.ndarray], row: int, mode: Mode) -> Embedding:
        """See :class:`Subject`."""
        del mode
        longest, samples = max(map(len, clips)), len(clips[row])
        batch = np.stack([np.pad(clip, (0, longest - len(clip))) for clip in clips])
        frames = self._module(batch, frames=True)[0][row]
        if samples == longest:
            self._counts.setdefault(samples, len(frames))
            return Embedding(frames, self._module(batch, frames=False)[0][row])
        if samples not in self._counts:
            self._counts[samples] = self._module(clips[row][None], frames=True)[0].shape[1]
        return Embedding(frames[: self._counts[samples]], None)


def _open_transformers(name: str, weights: Any, size: Any) -> Subject:
    try:
        from gura_jax.audit.transformers_model import TransformersModel
    except ModuleNotFoundError as error:
        raise SystemConfigError(
            f"transformers: expected the package {error.name}: pip install 'gura-jax[convert]'"
        ) from None
    return TransformersModel(name, weights, size)


KINDS: Mapping[str, Callable[[str, Any, Any], Subject]] = {"hear": HearModule, "transformers": _open_transformers}
"""By the prefix of a model's name; without one it is a system of ours."""


def open_subject(model: str, *, weights: Any = "pretrained", size: Any = None) -> Subject:
    """Load what is to be audited.

    Args:
        model: what :func:`gura_jax.load_model` takes; ``hear:MODULE``, by its import name; or ``transformers:NAME``,
            the path of a Hugging Face folder or a hub id.
        weights: of a system, as for :func:`gura_jax.load_model`; of a HEAR module the path for its ``load_model``; of
            transformers ``"pretrained"``, or ``"random"``, which needs the folder's configuration only.
        size: ``"tiny"``, of a system.

    Raises:
        GuraError: it cannot be loaded, or is of another modality.
    """
    kind, colon, name = model.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](name, weights, size)
    try:
        return OwnSystem(model, weights, size)
    except SystemConfigError as error:
        others = ", ".join(f"{prefix}:NAME" for prefix in KINDS)
        raise SystemConfigError(f"{error} (models of other packages: {others})") from None
