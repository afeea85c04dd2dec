"""gura_jax/plot.py: pictures of embeddings over time."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from gura_jax.errors import GuraError
from gura_jax.plot import STYLE, Clip, _standardised, embedding_figure


def clip(title: str = "noise", seconds: float = 1.0, size: int = 24, seed: int = 0, rate: int = 16_000) -> Clip:
    rng = np.random.default_rng(seed)
    samples = round(rate * seconds)
    count = (samples - rate // 40) // (rate // 50) + 1
    audio = (0.1 * rng.standard_normal(samples)).astype(np.float32)
    frames = rng.standard_normal((count, size)).astype(np.float32)
    return Clip(title, audio, frames, 12.5 + 20 * np.arange(count), rate)


@pytest.mark.slow
def test_a_picture_grows_with_its_clips(tmp_path: Path) -> None:
    heights = []
    for count in (1, 3):
        path = tmp_path / f"{count}.png"
        embedding_figure([clip(f"clip {i}", 0.5 + i, seed=i) for i in range(count)], path, title="a system")
        picture = image.imread(path)
        assert picture.shape[1] == 1500
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 200
        heights.append(picture.shape[0])
    assert heights[1] > 2 * heights[0]


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    embedding_figure([clip()], tmp_path / "a.svg", title="a system")
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_time_is_in_seconds_at_any_rate(rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")
    embedding_figure([clip(seconds=2.0, rate=rate)], tmp_path / "a.svg", title="a system")
    labels = re.findall(r">([0-9]\.[0-9])</text>", (tmp_path / "a.svg").read_text())
    assert 1 < max(map(float, labels)) <= 2


def test_silence_and_the_shortest_clip(tmp_path: Path) -> None:
    silent = Clip("silence", np.zeros(400, np.float32), np.zeros((1, 8), np.float32), np.array([12.5]))
    embedding_figure([silent], tmp_path / "a.png", title="a system")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_features_that_move_together_stand_together() -> None:
    rng = np.random.default_rng(0)
    sources = rng.standard_normal((80, 3))
    kind = rng.permutation(np.arange(30) % 3)
    frames = (10.0 ** rng.integers(-3, 3, 30)) * (sources[:, kind] + 0.1 * rng.standard_normal((80, 30))) + 5
    clips = [Clip("", np.zeros(400), part, np.zeros(len(part))) for part in np.split(frames, [50])]
    found = _standardised(clips)
    assert [part.shape for part in found] == [(50, 30), (30, 30)]
    together = np.concatenate(found)
    np.testing.assert_allclose(together.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(together.std(axis=0), 1)
    neighbours = np.corrcoef(together.T).diagonal(1)
    assert (neighbours < 0.5).sum() == 2  # three groups, two borders


def test_errors_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuraError, match=r"found 2 clips of sizes \[24, 32\]"):
        embedding_figure([clip(), clip(size=32)], tmp_path / "a.png", title="")
    with pytest.raises(GuraError, match="found 0 clips"):
        embedding_figure([], tmp_path / "a.png", title="")
    with pytest.raises(GuraError, match=r"a\.xyz: the picture cannot be saved"):
        embedding_figure([clip()], tmp_path / "a.xyz", title="")
    with pytest.raises(GuraError, match=r"a\.png: the picture cannot be saved"):
        embedding_figure([clip()], tmp_path / "missing" / "a.png", title="")
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(GuraError, match=r"pip install 'gura-jax\[plot\]'"):
        embedding_figure([clip()], tmp_path / "a.png", title="")
