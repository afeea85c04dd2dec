"""Queries of a search: recordings, embedded by the system that the store was made with; vectors; clips of the store."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from gura_jax.audio import load_segments
from gura_jax.dataset.identity import as_json, describe_system, differences
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.search import Of, vector_size
from gura_jax.dataset.sources import open_clip
from gura_jax.errors import AudioError, InputError, StoreError
from gura_jax.loading import Weights, find_encoder, load_model
from gura_jax.model import Model
from gura_jax.nearest import check_vector
from gura_jax.systems import SYSTEMS, Member, System

ID = "id:"  # begins a query that is a clip of the store
VECTORS = ".npy"


class Query(NamedTuple):
    """A vector to search for.

    Attributes:
        name: as it was given.
        vector: [S], or [D] for frames.
        sound: [n] float32, of a recording, at the rate of the store's system.
        clip: row of the store's metadata, of one of its clips.
    """

    name: str
    vector: np.ndarray
    sound: np.ndarray | None = None
    clip: int | None = None


class Failure(NamedTuple):
    """A query that has no vector.

    Attributes:
        name: as it was given.
        error: begins with the name.
    """

    name: str
    error: InputError | AudioError


def read_queries(
    store: EmbeddingStore, given: Sequence[str], of: Of = "scenes", weights: Weights = "pretrained"
) -> list[Query]:
    """Make a vector of each query.

    Args:
        store: to be searched.
        given: ``id:`` and the id of a clip of the store; a ``.npy`` file of one vector [S] or several [n, S]; anything
            else is a recording, a file or a URL as ``gura-jax embed`` takes, of any rate.
        of: ``"scenes"``; for ``"frames"`` the vector of a recording or a clip is the mean of its frames.
        weights: where those of the store's system are, as :func:`load_model` takes them; members that had random
            weights have them again.

    Raises:
        InputError: no such clip or file, or vectors of another size.
        AudioError: a recording that cannot be read, or is shorter than the system's shortest clip.
        StoreError: the system or its weights are not those that the store was made with.
    """
    queries: list[Query] = []
    for found in try_queries(store, given, of, weights):
        if isinstance(found, Failure):
            raise found.error
        queries.append(found)
    return queries


def try_queries(
    store: EmbeddingStore, given: Sequence[str], of: Of = "scenes", weights: Weights = "pretrained"
) -> Iterator[Query | Failure]:
    """Make a vector of each query, or say why it has none; as :func:`read_queries`, of which the arguments are.

    Raises:
        StoreError: the store has no frames, or the system or its weights are not those that it was made with.
    """
    size = vector_size(store, of)
    model: Model | None = None
    for text in given:
        if not text.startswith(ID) and not text.lower().endswith(VECTORS):
            model = model or load_system(store, weights)
        try:
            if text.startswith(ID):
                found = [_of_clip(store, text, of)]
            elif model is None or text.lower().endswith(VECTORS):
                found = _of_file(store, text, size, of)
            else:
                found = [_of_recording(model, text, of)]
        except (InputError, AudioError) as error:
            yield Failure(text, error)
        else:
            yield from map(_checked, found)


def _checked(query: Query) -> Query | Failure:
    try:
        check_vector(query.vector, query.name)
    except InputError as error:
        return Failure(query.name, error)
    return query


def _of_clip(store: EmbeddingStore, text: str, of: Of) -> Query:
    name = text.removeprefix(ID)
    if name not in store:
        raise InputError(f"{text}: expected the id of a clip of {store.folder}, found none of this name")
    clip = store[name]
    vector = clip.scene
    if of == "frames":
        if clip.frames is None or not len(clip.frames):
            raise InputError(f"{text}: expected a clip with frames, found none")
        vector = clip.frames.mean(axis=0, dtype=np.float64)
    return Query(text, np.asarray(vector), clip=store.ids.index(name))


def _of_file(store: EmbeddingStore, text: str, size: int, of: Of) -> list[Query]:
    try:
        with open(text, "rb") as file:
            magic = file.read(len(MAGIC_PREFIX))
        # Mapped: a wrong header reserves no memory. Without the magic bytes, NumPy takes it for a pickle or an archive.
        array = np.load(text, mmap_mode="r", allow_pickle=False) if magic == MAGIC_PREFIX else None
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, OverflowError):
        # NumPy's own message is left out: it can advise to unpickle the file.
        raise InputError(f"{text}: expected a .npy file of numbers, found a damaged one, or one of objects") from None
    if array is None:
        raise InputError(f"{text}: expected a .npy file of numbers, found another file")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{text}: expected a .npy file of real numbers, found {array.dtype}")
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != size or not len(rows):
        raise InputError(
            f"{text}: expected vectors of {size} numbers, as the {of} of {store.folder}, found {list(array.shape)}"
        )
    names = [text] if array.ndim == 1 else [f"{text}[{i}]" for i in range(len(rows))]
    return [Query(name, vector) for name, vector in zip(names, rows.astype(np.float64), strict=True)]


def _of_recording(model: Model, text: str, of: Of) -> Query:
    (clip,) = load_segments(text, [(0.0, None)], sample_rate=model.sample_rate, opener=open_clip)
    if isinstance(clip, AudioError):
        raise clip
    shortest = model.shortest(frames=of == "frames", scenes=of == "scenes")
    if len(clip) < shortest:
        raise AudioError(
            f"{text}: expected at least {1000 * shortest / model.sample_rate:g} ms for {model.system.name}, found "
            f"{1000 * len(clip) / model.sample_rate:g} ms"
        )
    if of == "scenes":
        return Query(text, model.scene_embeddings([clip])[0], clip)
    frames, _ = model.timestamp_embeddings([clip])
    return Query(text, np.asarray(frames[0].mean(axis=0, dtype=np.float64)), clip)


# The system of a store


def load_system(store: EmbeddingStore, weights: Weights = "pretrained") -> Model:
    """Load the system that a store was made with, with the same weights.

    Raises:
        StoreError: it cannot be told from ``run.json``, or is another one here: the message says what differs.
        CheckpointError: weights are not here.
    """
    run = store.run
    try:
        described = run["system"]
        system, options = _system(described), _options(described)
        options |= {"dtype": run["dtype"], "precision": run["precision"]}
        random = {member["name"]: "random" for member in described["members"] if "seed" in member["weights"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{store.folder}: expected a run.json that describes the system, found none of this version "
            f"({error!r}): search by vectors (.npy) or clips ({ID})"
        ) from None
    if isinstance(weights, Mapping):
        chosen: Weights = random | dict(weights)
    else:
        chosen = weights if weights == "random" else random
    model = load_model(system, weights=chosen, **options)
    if found := differences(*map(_without_origin, (described, describe_system(model)))):
        raise StoreError(
            f"{store.folder}: expected the system and weights that the store was made with, found others:\n{found}\n"
            "pass the --weights that gura-jax embed was given, or search by vectors (.npy) or clips "
            f"({ID})"
        )
    return model


def _system(described: Mapping[str, Any]) -> System:
    members = described["members"]
    if any(member["architecture"] is None for member in members):  # Python objects, of a registered system
        if described["name"] not in SYSTEMS:
            raise StoreError(
                f"the system {described['name']!r} has a member that is a Python object: expected it to be registered "
                f"(GURA_JAX_FAMILIES), or a search by vectors (.npy) or clips ({ID})"
            )
        return SYSTEMS[described["name"]]
    made = tuple(
        Member(
            member["encoder"],
            layers=member["layers"],
            name=member["name"],
            scene=member.get("scene", "frames"),
            normalise=member.get("normalise", False),
        )
        for member in members
    )
    fields = ("name", "combination", "feature_size", "scene_groups")
    return System(members=made, sample_rate=described.get("sample_rate"), **{name: described[name] for name in fields})


def _options(described: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``load_model`` that made encoders of this size and random weights of this seed."""
    options: dict[str, Any] = {}
    for member in described["members"]:
        if "seed" in member["weights"]:
            options["seed"] = member["weights"]["seed"]
        if member["architecture"] is not None:
            config = find_encoder(member["encoder"]).config
            tiny, full = (as_json(dataclasses.asdict(each)) for each in (config.tiny(), config))
            if member["architecture"] == tiny != full:
                options["size"] = "tiny"
    return options


def _without_origin(described: Mapping[str, Any]) -> dict[str, Any]:
    """Drop where weights are from: the same may lie elsewhere."""
    members = []
    for member in described["members"]:
        kept = {key: value for key, value in member["weights"].items() if key != "source" or value == "random"}
        members.append({**member, "weights": kept})
    return {**described, "members": members}
