"""Pictures of embeddings over time; needs the extra ``plot`` (librosa and matplotlib)."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gura_jax.audio import HEAR_RATE
from gura_jax.errors import GuraError

MEL_BANDS = 80
MEL_WINDOW = 0.064  # s: long enough to separate the lowest bands
MEL_HOP = 0.010  # s
DYNAMIC_RANGE = 70.0  # dB below the loudest moment; what is quieter is mostly room noise
CLIPPED = 1.0  # per cent of the values, at each end, outside the colour range: outliers would flatten the rest

_INK, _FAINT = "#1d2330", "#6b7280"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip and its embedding over time.

    Attributes:
        title: printed above the clip.
        audio: [n] float32.
        frames: [T, D].
        times: [T] in milliseconds, evenly spaced.
        sample_rate: of the audio, in Hz.
    """

    title: str
    audio: np.ndarray
    frames: np.ndarray
    times: np.ndarray
    sample_rate: int = HEAR_RATE


def embedding_figure(clips: Sequence[Clip], path: str | os.PathLike[str], title: str) -> None:
    """Draw each clip's log-mel spectrogram above its embedding over time, and save the picture.

    In an embedding panel, each row is a feature, and its colour is the distance from the feature's mean over all clips'
    frames, in standard deviations. Similar features are adjacent: they are ordered by hierarchical clustering of their
    correlations, in the same order for every clip. 1 % of the values at each end lie outside the colour range.

    Args:
        clips: at least one, all of one system.
        path: where to save the picture; the suffix chooses the format (.png, .pdf, .svg).
        title: printed at the top, for example the system's name.

    Raises:
        GuraError: the extra ``plot`` is not installed, embeddings differ in size, or the picture cannot be saved.
    """
    try:
        import librosa
        import librosa.display
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GuraError(f"pictures need librosa and matplotlib ({error}): pip install 'gura-jax[plot]'") from None

    sizes = sorted({clip.frames.shape[1] for clip in clips})
    if len(sizes) != 1:
        raise GuraError(f"expected clips whose embeddings have one size, found {len(clips)} clips of sizes {sizes}")
    images = _standardised(clips)
    limit = max(np.percentile(np.abs(np.concatenate(images)), 100 - CLIPPED), 1e-6)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.9 + 2.9 * len(clips)), dpi=150, facecolor="white")
        height = figure.get_figheight()
        figure.text(0.085, 1 - 0.3 / height, title, fontsize=15, fontweight="bold", va="center")
        rows = figure.add_gridspec(
            len(clips), 1, left=0.085, right=0.9, top=1 - 0.85 / height, bottom=0.5 / height, hspace=0.26
        )
        for row, (clip, image) in enumerate(zip(clips, images, strict=True)):
            cells = rows[row].subgridspec(2, 1, height_ratios=(1, 1.35), hspace=0.06)
            upper = figure.add_subplot(cells[0])
            lower = figure.add_subplot(cells[1], sharex=upper)

            window, hop_length = round(MEL_WINDOW * clip.sample_rate), round(MEL_HOP * clip.sample_rate)
            padded = librosa.util.fix_length(clip.audio, size=max(len(clip.audio), window))
            power = librosa.feature.melspectrogram(
                y=padded, sr=clip.sample_rate, n_fft=window, hop_length=hop_length, n_mels=MEL_BANDS
            )
            mel = librosa.display.specshow(
                librosa.power_to_db(power, ref=np.max, top_db=DYNAMIC_RANGE),
                sr=clip.sample_rate,
                hop_length=hop_length,
                x_axis="time",
                y_axis="mel",
                cmap="magma",
                vmin=-DYNAMIC_RANGE,
                vmax=0,
                ax=upper,
            )
            seconds = len(clip.audio) / clip.sample_rate
            hop = (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1) if len(clip.times) > 1 else 1000 * seconds
            embedding = lower.imshow(
                image.T,
                extent=((clip.times[0] - hop / 2) / 1000, (clip.times[-1] + hop / 2) / 1000, 0, image.shape[1]),
                origin="lower",
                aspect="auto",
                cmap="viridis",
                vmin=-limit,
                vmax=limit,
            )
            upper.set_title(clip.title, loc="left", fontsize=10.5, fontweight="bold", pad=5)
            upper.set(xlabel="", ylabel="Hz", xlim=(0, seconds), yticks=(256, 1024, 4096))
            upper.tick_params(axis="x", length=0, labelbottom=False)
            lower.set(
                ylabel=f"{image.shape[1]} features,\nby similarity",
                yticks=(),
                xlabel="seconds" if row == len(clips) - 1 else "",
            )
            lower.set_facecolor("#eceef2")  # shows where there are no frames
            upper.yaxis.set_label_coords(-0.062, 0.5)
            lower.yaxis.set_label_coords(-0.016, 0.5)
            if row == 0:  # one scale for all
                for panel, drawn, label in ((upper, mel, "dB"), (lower, embedding, "standard\ndeviations")):
                    figure.colorbar(drawn, cax=panel.inset_axes((1.015, 0, 0.012, 1)), label=label)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
            raise GuraError(f"{path}: the picture cannot be saved: {error}") from None


def _standardised(clips: Sequence[Clip]) -> list[np.ndarray]:
    """Standardise features over all clips and order them by similarity; returns frames [T, D] of each clip."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    frames = np.concatenate([clip.frames for clip in clips]).astype(np.float64)
    deviation = frames.std(axis=0)
    frames = (frames - frames.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    if frames.shape[1] > 1:
        frames = frames[:, leaves_list(linkage(frames.T, "ward"))]
    return np.split(frames, np.cumsum([len(clip.frames) for clip in clips])[:-1])
