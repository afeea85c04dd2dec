"""convert/parity.py: every published system against PyTorch, end to end; and that parity can fail."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from reference import speech
from refusals import refuses

from gura_jax import ENCODERS, parallel
from gura_jax.convert import parity
from gura_jax.convert.parity import Row, compare
from gura_jax.convert.references import Crepe, Hubert, Reference
from gura_jax.errors import AudioError
from gura_jax.loading import outline
from gura_jax.systems import SYSTEMS, Member, System

SAMPLES = 2503  # of the shorter clip, where the system embeds one as short
# Codes are the same or others; a distance of zero elsewhere would be that of an array to itself.
EXACT = [(name, "state 0") for name in ("vq-wav2vec", "vq-wav2vec-kmeans")]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the batch of two is padded to eight, one for each device, and CREPE takes four times as long."""
    one = parallel.make_mesh(jax.local_devices()[:1])
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None: one)


@pytest.fixture(scope="module")
def shared() -> Iterator[None]:
    """The 25 systems are made of six encoders: compute what is the same for equal weights and clips once.

    The weights are seeded by a member's place, so PyTorch's outputs, bit by bit, say which network it was.
    """
    run_reference, member_rows = parity._run, parity._member_rows
    outputs: dict[Any, Any] = {}

    def run(reference: Reference, clip: np.ndarray, dtype: Any, built: Any) -> Any:
        if not isinstance(reference, Crepe):
            return run_reference(reference, clip, dtype, built)
        sums = tuple(float(x.double().abs().sum()) for x in reference.state_dict().values())
        key = (dtype, sums, clip.tobytes())
        if key not in outputs:
            outputs[key] = run_reference(reference, clip, dtype, built)
        return outputs[key]._replace(parts=dict(outputs[key].parts))  # compare() empties them

    def parts(alone: System, clips: Any, references: Any) -> Iterator[Row]:
        key = (alone.name, *(x.tobytes() for x in references[0][0].parts.values()))
        if key not in outputs:
            outputs[key] = list(member_rows(alone, clips, references))
        yield from outputs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_run", run)
        patch.setattr(parity, "_member_rows", parts)
        yield


def rows(system: str | System, **options: Any) -> list[Row]:
    """Of a clip as short as may be and of a longer one, in one padded batch."""
    samples = max(SAMPLES, outline(system, size="tiny").shortest(frames=True, scenes=True))
    clips = (speech(samples + 1497, 1), speech(samples, 2))
    return list(compare(system, clips, weights="random", size="tiny", **options))


def failures(found: list[Row]) -> list[str]:
    return [
        f"{r.member} {r.layer}: {r.to_pytorch:.1e} to PyTorch, {r.to_oracle:.1e} to float64 ({r.pytorch_to_oracle:.1e})"
        for r in found
        if not r.passed
    ]


@pytest.mark.slow
def test_mert_beside_an_encoder_of_another_rate() -> None:
    """MERT takes 24 kHz, CREPE 16."""
    members = (Member("mert-330m", "mean"), Member("crepe-tiny"))
    found = rows(System("today", members, "interleave", feature_size=64))
    assert not failures(found)


# Every kind of encoder, layer choice and combination; the others are made of the same parts, and take minutes.
DEFAULT = ("hubert_base", "fusion_wav2vec2", "fusion_cat_xwc", "crepe")


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    "system", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]
)
def test_system(system: str) -> None:
    found = rows(system)
    assert not failures(found)
    members = outline(system, size="tiny").fusion.members
    layers = [
        (m.name, part) for m in members for part in (*m.encoder.parts, *(["pooled"] if m.encoder.pooled_size else []))
    ]
    assert [(r.member, r.layer) for r in found] == [*layers, (system, "frames"), (system, "scene")]
    assert all(r.to_pytorch < r.bound for r in found)
    assert {(r.member, r.layer) for r in found if r.to_pytorch == 0} <= set(EXACT)


def test_a_clip_too_short_for_a_member_is_refused() -> None:
    """Before any network is made; PyTorch's own error would be of a kernel's size."""
    with refuses(AudioError, "audio[1]: expected at least 2800 samples", "for beats, found 2503"):
        next(compare("beats", (speech(4000), speech(2503)), weights="random", size="tiny"))


@pytest.mark.parametrize(
    ("capacity", "combination"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in (("tiny", "interleave_time"), ("small", "average"))],
)
def test_a_users_system(capacity: str, combination: Any) -> None:
    """Other members, chosen and weighted layers, the paper's reading, scene groups.

    With positions computed in signed integers, XLA took more than minutes to compile the first of these.
    """
    system = System(
        "mine",
        (Member("wav2vec2-base", (1, -1)), Member(f"crepe-{capacity}"), Member("hubert-large", (0.5, 0.0, -1.0, 2.0))),
        combination,
        feature_size=100,
        scene_groups=3,
    )
    assert not failures(rows(system))


def _break(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Change one tensor of PyTorch's network, by a tenth, once it has been converted."""
    whole = parity._reference

    def broken(*args: Any) -> Any:
        member, network = whole(*args)
        with torch.no_grad():
            tensor = network.state_dict()[f"model.{name}"]
            tensor.mul_(1 + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        return member, network

    monkeypatch.setattr(parity, "_reference", broken)


def test_a_broken_crepe_fails_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "conv3.weight")
    found = rows(System("mine", (Member("crepe-tiny"),)))
    assert [r.passed for r in found] == [True, True, *[False] * 7]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("feature_extractor.conv_layers.0.conv.weight", "convolution 0"),
        pytest.param("feature_extractor.conv_layers.4.conv.bias", "convolution 4", marks=pytest.mark.slow),
        ("feature_projection.projection.bias", "projection"),
        pytest.param("encoder.pos_conv_embed.conv.bias", "positional", marks=pytest.mark.slow),
        pytest.param("encoder.layers.1.feed_forward.output_dense.weight", "state 2", marks=pytest.mark.slow),
        ("encoder.layers.2.attention.v_proj.bias", "state 3"),
    ],
)
def test_a_broken_speech_encoder_fails_from_there_on(monkeypatch: pytest.MonkeyPatch, name: str, first: str) -> None:
    _break(monkeypatch, name)
    found = rows(System("mine", (Member("hubert-large", "mean"),)))
    index = [r.layer for r in found].index(first)
    assert [r.passed for r in found] == [i < index for i in range(len(found))]


def test_weight_norm_left_out_would_show() -> None:
    """In a fresh PyTorch network g is the norm of v, and a converter that ignores it would pass."""
    network: Any = Hubert.random(ENCODERS["hubert-base"].config.tiny(), seed=0)
    weight = network.model.encoder.pos_conv_embed.conv.parametrizations.weight
    norm = torch.linalg.vector_norm(weight.original1, dim=(0, 1), keepdim=True)
    assert ((weight.original0 - norm).abs() > 0.01 * norm).any()


@pytest.mark.slow
def test_fusion_cat_xwc_at_full_size() -> None:
    """HuBERT xLarge and wav2vec 2.0 Large of random weights and CREPE's real ones: minutes and a dozen GB."""
    found = list(compare("fusion_cat_xwc", [speech(16_000)], weights="random"))
    assert not failures(found)
    assert len(found) == (9 + 49) + (9 + 25) + 7 + 2
