"""MTEB's interface of encoders: any system as a model of MTEB, for its audio tasks (MAEB).

Source: https://embeddings-benchmark.github.io/mteb/. MTEB passes a loader of batches; here the clips are read from its
data set, at full length, and packed into batches of like length by :meth:`gura_jax.Model.embed`. So an embedding does
not depend on MTEB's batches, nor on the clips beside it.
"""

import collections
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from gura_jax.audio import check_clip, check_rate, load_segments, open_file, resample
from gura_jax.dataset.decode import decode_threads
from gura_jax.dataset.identity import describe_system
from gura_jax.dataset.plan import MAX_ROWS
from gura_jax.dataset.table import Settings, batch_seconds
from gura_jax.errors import AudioError, InputError, SystemConfigError
from gura_jax.evaluate.embed import SystemEmbeddings
from gura_jax.files import plain_name
from gura_jax.loading import load_model
from gura_jax.model import Model
from gura_jax.models.families import ENCODERS
from gura_jax.systems import System, find_system

try:
    # First, as it mends a torchaudio that transformers, and so MTEB, would fail to import.
    import gura_jax.convert.references  # noqa: F401  # isort: skip
    from datasets import Audio
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import Licenses
except ModuleNotFoundError as error:
    raise SystemConfigError(f"gura_jax.mteb needs the package {error.name}: pip install 'gura-jax[mteb]'") from None

ORGANISATION = "gura-jax"  # MTEB's names are ORGANISATION/MODEL
AUDIO = "audio"  # the column, and the modality
REVISION_DIGITS = 40  # as many as a commit has
# Batches that are packed together: the more, the fuller each is. On a CPU, 256 s of audio; 16 MB at 16 kHz.
BATCHES_TOGETHER = 8
PROGRESS_SECONDS = 10.0  # between two lines of progress without a terminal
AHEAD = 2  # clips that each thread decodes before the devices ask for them
# Settings that change embeddings, and are not part of a system; MTEB keeps results of other than these apart.
DEFAULTS = {"dtype": "float32", "precision": "highest"}


class MtebEncoder(AbsEncoder):
    """A gura_jax model as an audio encoder of MTEB; made by :func:`load`.

    Clips may have any sample rate and any number of channels, and are embedded at full length. MTEB compares
    embeddings by their cosine.

    Attributes:
        model: the :class:`gura_jax.Model`.
        mteb_model_meta: its description. The revision changes with the system's description and its weights;
            ``loader_kwargs`` says where the weights of each member came from.
    """

    mteb_model_meta: ModelMeta  # never None

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.mteb_model_meta = describe(model, name)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __repr__(self) -> str:
        return f"<gura_jax.mteb.MtebEncoder of {self.model!r}>"

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        precision: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Compute a scene embedding for each clip.

        Args:
            inputs: a ``DataLoader`` over a data set with the column ``audio``; its batches do not matter.
            task_metadata, hf_split, hf_subset: named in errors.
            prompt_type: queries and documents are embedded in the same way.
            show_progress_bar: on standard error.
            precision: of quantised embeddings, which there are none of.
            kwargs: ``batch_size`` does not matter.

        Returns:
            [n, S] float32, in the order of the data set.

        Raises:
            InputError: the data set has no audio, or quantised embeddings are wanted.
            AudioError: a clip that cannot be decoded, is not finite or far outside [-1, 1], or is too short for the
                system. It is not padded, as that would change its embedding.
        """
        from tqdm import tqdm

        where = f"{task_metadata.name}, {hf_subset}, {hf_split}"
        if precision not in (None, "float32"):
            raise InputError(f"precision: expected float32 embeddings, found {precision!r}")
        data = inputs.dataset.with_format(None)
        if AUDIO not in data.features:
            raise InputError(f"{where}: expected a column {AUDIO!r}, found {', '.join(data.features) or 'none'}")
        data = data.select_columns([AUDIO])
        if isinstance(data.features[AUDIO], Audio):  # decoded here, by the same code as files
            data = data.cast_column(AUDIO, Audio(decode=False))
        scenes = np.zeros((len(data), self.model.scene_embedding_size), np.float32)
        limit = BATCHES_TOGETHER * batch_seconds(self.model, Settings()) * self.model.sample_rate  # samples
        clips: list[np.ndarray] = []
        samples = done = 0
        seconds = 0.1 if sys.stderr.isatty() else PROGRESS_SECONDS
        bar = {"desc": where, "unit": "clip", "mininterval": seconds, "disable": not show_progress_bar}
        with tqdm(total=len(data), **bar) as progress:
            rows = ((row[AUDIO], f"{where}: clip {i}") for i, row in enumerate(data))
            for clip in _in_threads(self._clip, rows):
                clips.append(clip)
                samples += len(clip)
                if samples >= limit or done + len(clips) == len(data):
                    scenes[done : done + len(clips)] = self.model.scene_embeddings(clips, batch_size=MAX_ROWS)
                    progress.update(len(clips))
                    done += len(clips)
                    clips, samples = [], 0
        return scenes

    def _clip(self, row: tuple[Any, str]) -> np.ndarray:
        """Return a clip [samples] at the model's rate, mixed to mono."""
        item, name = row
        rate, shortest = self.model.sample_rate, self.model.shortest(frames=False, scenes=True)
        clip = _from_file(item, name, rate) if _is_file(item) else _from_array(item, name, rate)
        if len(clip) < shortest:
            raise AudioError(
                f"{name}: expected at least {shortest} samples ({1000 * shortest / rate:g} ms) for "
                f"{self.model.system.name}, found {len(clip)}"
            )
        return clip


def load(system: str | Path | System, **options: Any) -> MtebEncoder:
    """Load a system as an encoder of MTEB, for ``mteb.evaluate`` and the like.

    Args:
        system, options: as for :func:`gura_jax.load_model`.

    Raises:
        SystemConfigError: an unknown system, member, encoder or option.
        CheckpointError: weights that are missing, damaged, or of another architecture.
        InputError: a system's name that no folder can have.
    """
    described = find_system(system, options.pop("layers", None))
    model = load_model(described, **options)
    source = SystemEmbeddings(described, options.get("weights", "pretrained"), options.get("size"))
    return MtebEncoder(model, plain_name(source.name, Path(str(system))))


def describe(model: Model, name: str) -> ModelMeta:
    """Describe a model in MTEB's terms; None where nothing is known.

    Args:
        model: the model.
        name: its name, which becomes that of a folder.
    """
    system = describe_system(model)
    size = sum(
        math.prod(array.shape) for member in model.fusion.members for array in member.encoder.abstract_params().values()
    )
    changed = {"dtype": model.dtype, "precision": model.compilation.precision}
    presets = [ENCODERS.get(str(member["encoder"])) for member in system["members"]]
    known = not model.random_members and all(preset is not None and preset.source for preset in presets)
    return ModelMeta(
        loader=None,
        # MTEB has no field for the origin of weights; this one is written to model_meta.json as it is.
        loader_kwargs={"system": system, "versions": {package: version(package) for package in ("gura-jax", "jax")}},
        name=f"{ORGANISATION}/{name}",
        revision=_revision(system),
        release_date=None,
        languages=None,
        n_parameters=size,
        n_embedding_parameters=0,
        memory_usage_mb=round(size * 4 / 2**20, 1),  # float32
        max_tokens=None,
        embed_dim=int(model.scene_embedding_size),
        license=_licence([preset.licence for preset in presets if preset]) if known else None,
        open_weights=True if known else None,
        public_training_code=None,
        public_training_data=None,
        framework=["JAX"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=[AUDIO],
        experiment_kwargs={key: value for key, value in changed.items() if value != DEFAULTS[key]} or None,
    )


def _revision(system: Mapping[str, Any]) -> str:
    """Hash what the embeddings depend on: not names, nor where weights were found."""
    members = [
        {key: value for key, value in member.items() if key not in _origin(member)}
        | {"weights": {key: value for key, value in member["weights"].items() if key != "source"}}
        for member in system["members"]
    ]
    content = {key: value for key, value in system.items() if key != "name"} | {"members": members}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:REVISION_DIGITS]


def _origin(member: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that say where a member came from; the class of one that is a Python object is all there is."""
    return ("name", "weights") if member["architecture"] is None else ("name", "weights", "encoder")


def _licence(licences: Iterable[str]) -> Any:
    """Return MTEB's name of the members' licence; None if that of a member is not known, or MTEB has no name for it."""
    found = {licence.lower() for licence in licences}
    if not found <= set(get_args(Licenses)):
        return None
    return found.pop() if len(found) == 1 else "multiple"


def _in_threads(function: Callable[[Any], np.ndarray], items: Iterable[Any]) -> Iterator[np.ndarray]:
    """Map in threads, in order, a few items ahead of the one that is asked for."""
    threads = decode_threads()
    waiting: collections.deque[Future[np.ndarray]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_file(item: Any) -> bool:
    """Whether a clip is an encoded file, as data sets store it."""
    return isinstance(item, Mapping) and "array" not in item


def _from_file(item: Mapping[str, Any], name: str, rate: int) -> np.ndarray:
    """Decode a file's bytes, or the file at a path."""
    path, content = item.get("path"), item.get("bytes")
    if content is not None:
        opened: Callable[[str], BinaryIO] = lambda _: io.BytesIO(content)  # noqa: E731
    elif path is not None:
        opened = lambda _: open_file(path)  # noqa: E731
    else:
        raise AudioError(f"{name}: expected an audio file, found none")
    (clip,) = load_segments(f"{name} ({path})" if path else name, [(0.0, None)], sample_rate=rate, opener=opened)
    if isinstance(clip, AudioError):
        raise clip
    return clip


def _from_array(item: Any, name: str, rate: int) -> np.ndarray:
    """Mix samples [n] or [channels, n], and resample them."""
    try:
        samples, own = np.asarray(item["array"]), item["sampling_rate"]
    except (TypeError, LookupError):
        raise AudioError(f"{name}: expected an array and its sampling_rate, found {type(item).__name__}") from None
    if samples.ndim == 2:
        samples = samples.mean(axis=0)
    return resample(check_clip(samples, name, sample_rate=own), check_rate(own), rate)
