"""Hidden states in a store: their layout.

A clip's states are one array of numbers: those of the system's members one after the other, each followed by the
member's embedding of the whole clip, if it has one. Of means, a member has [K, bases, groups * D] numbers, where K is
the number of states, ``bases`` the frame rates at which they are averaged (see :class:`gura_jax.fusion.Kept`) and
``groups`` that of the system's ``scene_groups``; of frames [T, K, D], and T is in the metadata, in the column
``state_frames.MEMBER``. ``run.json`` has the rest, under ``states``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from gura_jax.dataset.columns import STATE_FRAMES
from gura_jax.errors import StoreError
from gura_jax.fusion import Keep, Kept, KeptStates, kept_members
from gura_jax.model import Model
from gura_jax.models.encoder import Encoder, FrameGrid


class Grid(NamedTuple):
    """Where frames lie: see :class:`gura_jax.models.encoder.FrameGrid`, in samples at a rate in Hz."""

    sample_rate: int
    hop: int
    offset: float
    window: int

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """Return an encoder's."""
        return cls(encoder.sample_rate, *encoder.grid)

    @property
    def frames(self) -> FrameGrid:
        """The same without the rate."""
        return FrameGrid(self.hop, self.offset, self.window)


class MemberStates(NamedTuple):
    """What a store has of a member's hidden states.

    Attributes:
        name: the member's.
        num_states: hidden states of the encoder; 0: it has none, and its frames are kept.
        states: those that are kept.
        size: D.
        pooled_size: P, the size of the embedding of the whole clip; 0: there is none.
        grid: of the timestamp frames.
        scene_grid: of the frames that are averaged into scenes.
        bases: frame rates at which means are taken, the member's own first; none of frames.
    """

    name: str
    num_states: int
    states: tuple[int, ...]
    size: int
    pooled_size: int
    grid: Grid
    scene_grid: Grid
    bases: tuple[Grid, ...]

    @property
    def kept(self) -> int:
        """K."""
        return max(1, len(self.states))

    def is_sound(self, *, bases: bool) -> bool:
        """Whether all values are of a kind that can be; with frame rates of means, or without."""
        counts = _is_count(self.num_states, 0) and _is_count(self.size, 1) and _is_count(self.pooled_size, 0)
        chosen = counts and all(_is_count(state, 0) and state < self.num_states for state in self.states)
        grids = (self.grid, self.scene_grid, *self.bases)
        return (
            isinstance(self.name, str)
            and chosen
            and bool(self.states) == bool(self.num_states)
            and bool(self.bases) == bases
            and all(_is_count(grid.sample_rate, 1) and _is_count(grid.hop, 1) for grid in grids)
            and all(_is_count(grid.window, 0) and isinstance(grid.offset, (int, float)) for grid in grids)
        )


class States(NamedTuple):
    """What a store has of hidden states.

    Attributes:
        of: ``"mean"`` or ``"frames"``.
        groups: of frames, which are averaged one by one.
        members: in the order of the system.
    """

    of: str
    groups: int
    members: tuple[MemberStates, ...]

    @classmethod
    def of_model(cls, model: Model, keep: Keep) -> Self:
        """Describe what a run keeps.

        Raises:
            SystemConfigError: see :func:`gura_jax.fusion.kept_members`.
        """
        return cls(keep.of, model.fusion.scene_groups, tuple(map(_described, kept_members(model.fusion, keep))))

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> Self:
        """Read the description in ``run.json``.

        Raises:
            StoreError: there is none.
        """
        if "states" not in run:
            raise StoreError(
                "expected a store with hidden states, found one without: gura-jax embed --states mean (or frames) "
                "writes them"
            )
        try:
            content = run["states"]
            members = tuple(_from_json(member) for member in content["members"])
            found = cls(content["of"], content["groups"], members)
            if not found.is_sound:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise StoreError(
                "run.json: expected the description of hidden states that gura-jax embed writes, found a damaged one"
            ) from None
        return found

    @property
    def is_sound(self) -> bool:
        """Whether all values are of a kind that can be."""
        if self.of not in ("mean", "frames") or not _is_count(self.groups, 1) or not self.members:
            return False
        return all(member.is_sound(bases=self.of == "mean") for member in self.members)

    def as_json(self) -> dict[str, Any]:
        """Return what ``run.json`` has."""
        members = []
        for member in self.members:
            grids = {"grid": list(member.grid), "scene_grid": list(member.scene_grid)}
            bases = [list(base) for base in member.bases]
            members.append(member._asdict() | grids | {"states": list(member.states), "bases": bases})
        return {"of": self.of, "groups": self.groups, "members": members}

    def find(self, name: str | None) -> MemberStates:
        """Return a member; by default the first with hidden states.

        Raises:
            StoreError: there is none.
        """
        names = [member.name for member in self.members]
        for member in self.members:
            if member.name == name or (name is None and member.num_states):
                return member
        wanted = "a member with hidden states" if name is None else f"a member {name!r}"
        raise StoreError(f"expected {wanted}, found {', '.join(names)}")

    def shapes(self, frames: Mapping[str, int]) -> Iterator[tuple[MemberStates, tuple[int, ...]]]:
        """Iterate over the members and the shapes of their numbers, without their embeddings of the whole clip.

        Args:
            frames: of each member, where frames are kept.
        """
        for member in self.members:
            if self.of == "mean":
                yield member, (member.kept, len(member.bases), self.groups * member.size)
            else:
                yield member, (frames[member.name], member.kept, member.size)

    def numbers(self, samples: np.ndarray, rate: int) -> np.ndarray:
        """Return how many numbers clips have, [n], from their samples at a rate: for means exactly, else about."""
        pooled = sum(member.pooled_size for member in self.members)
        if self.of == "mean":
            return np.full(len(samples), pooled + sum(math.prod(shape) for _, shape in self.shapes({})), np.int64)
        total = np.full(len(samples), pooled, np.int64)
        for member in self.members:
            own = samples * member.grid.sample_rate // rate
            total += member.kept * member.size * np.maximum(0, member.grid.frames.count(own))
        return total

    def pack(self, states: Mapping[str, KeptStates], row: int) -> tuple[np.ndarray, dict[str, int]]:
        """Join what a batch has of a clip: its numbers, and of each member the count of frames, where they are kept."""
        parts, frames = [], {}
        for member in self.members:
            values, counts, pooled = states[member.name]
            own = np.asarray(values[row])
            if counts is not None:
                frames[member.name] = int(counts[row])
                own = own[: frames[member.name]]
            parts.append(own.ravel())
            if member.pooled_size:
                assert pooled is not None  # as its size says
                parts.append(np.asarray(pooled[row]))
        return np.concatenate(parts), frames

    def unpack(self, numbers: np.ndarray, meta: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Divide a clip's numbers, or those of several clips [..., numbers], by member: states, and pooled [..., P].

        Args:
            numbers: of the clip.
            meta: its row of the metadata.

        Raises:
            StoreError: they are not as many as the store's description says.
        """
        frames = {name: int(meta[STATE_FRAMES + name]) for name in self.frames_of}
        found, start = {}, 0
        for member, shape in self.shapes(frames):
            size = math.prod(shape)
            values = numbers[..., start : start + size]
            pooled = numbers[..., start + size : start + size + member.pooled_size]
            start += size + member.pooled_size
            if start > numbers.shape[-1]:
                break
            found[member.name] = values.reshape(*numbers.shape[:-1], *shape), pooled
        if start != numbers.shape[-1]:
            raise StoreError(f"expected {start} numbers of hidden states or more a clip, found {numbers.shape[-1]}")
        return found

    @property
    def frames_of(self) -> Sequence[str]:
        """The members whose frames are kept; none of means."""
        return [member.name for member in self.members] if self.of == "frames" else []


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _described(kept: Kept) -> MemberStates:
    encoder = kept.encoder
    return MemberStates(
        kept.member.name,
        encoder.num_states,
        kept.states,
        encoder.feature_size,
        encoder.pooled_size,
        Grid.of(kept.member.encoder),
        Grid.of(kept.member.scene_encoder),
        tuple(map(Grid.of, kept.bases)),
    )


def _from_json(content: Mapping[str, Any]) -> MemberStates:
    bases = tuple(Grid(*base) for base in content["bases"])
    grids = {name: Grid(*content[name]) for name in ("grid", "scene_grid")}
    return MemberStates(**{**content, **grids, "states": tuple(content["states"]), "bases": bases})
