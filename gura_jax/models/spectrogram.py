"""Mel spectrograms as the published encoders have them, and the base of transformers that take one.

A spectrogram is exact for each clip of a padded batch, and always float32: in bfloat16 the sums over frequencies would
be off by half a per cent.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.backend import Platform
from gura_jax.errors import SystemConfigError
from gura_jax.models.attention import over_frames
from gura_jax.models.encoder import FrameGrid, Options, Output, Params, frame_mask
from gura_jax.models.transformer import TransformerEncoder

Scale = Literal["htk", "slaney", "kaldi", "linear"]
KALDI_SCALE = 2.0**15  # of samples, which it takes as 16-bit integers
PRE_EMPHASIS = 0.97  # of Kaldi's frames
POWER_FLOOR = 1e-10  # of energies in a logarithm to base 10
FLOAT32_EPS = float(np.finfo(np.float32).eps)  # floor of Kaldi's energies


@dataclasses.dataclass(frozen=True)
class Spectrogram:
    """Energies of mel bands over time.

    Attributes:
        mels: number of bands.
        scale: of frequencies; linear: the transform's own, without bands.
        low, high: Hz, of the lowest and the highest band's edges.
        window: samples of a frame.
        fft: of the transform, at least as many; frames are filled up with zeros.
        hop: samples from one frame to the next.
        taper: the window function: Hann's, periodic or not; or of Kaldi, whose frames each lose their mean and are
            pre-emphasised.
        area: whether bands are divided by their width in Hz, as Slaney's.
        sample_rate: Hz.
    """

    mels: int
    scale: Scale
    low: float
    high: float
    window: int
    fft: int
    hop: int
    taper: Literal["hann", "hann_symmetric", "kaldi_hann", "kaldi_povey"] = "hann"
    area: bool = False
    sample_rate: int = 16_000

    @property
    def kaldi(self) -> bool:
        """Whether frames begin where the clip does; else they are centred, and the clip is reflected at its ends."""
        return self.taper.startswith("kaldi")

    @property
    def shortest(self) -> int:
        """Samples that a clip needs: a frame, or enough to be reflected."""
        return self.window if self.kaldi else self.fft // 2 + 1

    def count(self, samples: Any) -> Any:
        """Frames of clips of so many samples; works on integers and arrays."""
        return FrameGrid(self.hop, 0.0, self.window if self.kaldi else 0).count(samples)

    def __call__(self, audio: jax.Array, lengths: jax.Array, platform: Platform) -> jax.Array:
        """Energies of each clip's bands.

        Args:
            audio: [B, N] float32, zero past a clip's end.
            lengths: [B] int32, of at least :attr:`shortest`; the frames of a shorter clip mean nothing.
            platform: says how many frames are transformed at once.

        Returns:
            [B, F, mels] float32; past a clip's own frames, any finite value.
        """
        B, N = audio.shape
        if not self.kaldi:
            audio = reflected(audio, lengths, self.fft // 2)
        width = self.window if self.kaldi else self.fft
        taper, filters = self._taper(), by_factors(mel_filters(self), self.fft)
        num_frames = self.count(N)

        @jax.named_scope("spectrogram")
        def some(samples: jax.Array, start: jax.Array) -> jax.Array:
            frames = (samples.shape[1] - width) // self.hop + 1
            index = np.arange(frames, dtype=np.int32)[:, None] * self.hop + np.arange(width, dtype=np.int32)[None, :]
            x = samples[:, index]  # [B, F, width]
            if self.kaldi:
                x = x - x.mean(axis=-1, keepdims=True)
                x = x - PRE_EMPHASIS * jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
            power = power_spectrum(jnp.pad(x * taper[None, None, :], ((0, 0), (0, 0), (0, self.fft - width))))
            return jnp.einsum("bfij,ijm->bfm", power, filters, precision="highest")

        x = over_frames(some, audio, num_frames, width, self.hop, platform.spectra)  # [B, n, F, mels]
        return x.reshape(B, -1, self.mels)[:, :num_frames]

    def _taper(self) -> np.ndarray:
        """The window function [width], float32."""
        if self.kaldi:
            hann = np.hanning(self.window)
            return (hann**0.85 if self.taper == "kaldi_povey" else hann).astype(np.float32)
        hann = np.hanning(self.window) if self.taper == "hann_symmetric" else np.hanning(self.window + 1)[:-1]
        missing = self.fft - self.window
        return np.pad(hann, (missing // 2, missing - missing // 2)).astype(np.float32)


def power_spectrum(x: jax.Array) -> jax.Array:
    """Squared magnitudes of the discrete Fourier transform of real frames.

    In two steps, of two factors K and L of N (Cooley and Tukey, 1965), each a matrix product: these are divided among
    devices with the batch, for which XLA would gather a transform. It rounds as a fast transform does.

    Args:
        x: [B, F, N].

    Returns:
        [B, F, K, L // 2 + 1]: at i, j that of the frequency i + K * j, up to N // 2 and some beyond.
    """
    (B, F, N), precision = x.shape, "highest"
    K = _factor(N)
    k, l = np.arange(K), np.arange(N // K)  # samples are at l + L * k  # noqa: E741
    first = _rotation(np.outer(k, k) / K)  # [K, K, 2], of k and i
    twiddle = _rotation(np.outer(l, k) / N)  # [L, K, 2], of l and i
    second = _rotation(np.outer(l, l[: len(l) // 2 + 1]) / len(l))  # [L, J, 2], of l and j
    y = jnp.einsum("bfkl,kic->bflic", x.reshape(B, F, K, -1), first, precision=precision)
    re, im, cos, sin = y[..., 0], y[..., 1], twiddle[None, None, ..., 0], twiddle[None, None, ..., 1]
    y = jnp.stack([re * cos - im * sin, re * sin + im * cos], axis=-1)
    # (a + b i)(c + d i): what each part of y adds to each part of the result.
    cos, sin = second[..., 0], second[..., 1]
    matrix = np.stack([np.stack([cos, sin], axis=-1), np.stack([-sin, cos], axis=-1)], axis=1)  # [L, 2, J, 2]
    z = jnp.einsum("bflic,lcjd->bfijd", y, matrix, precision=precision)
    return jnp.square(z).sum(axis=-1)


def _factor(N: int) -> int:
    """The largest factor up to its root."""
    return max(k for k in range(1, math.isqrt(N) + 1) if N % k == 0)


def by_factors(filters: np.ndarray, N: int) -> np.ndarray:
    """Filters [N // 2 + 1, M] over frequencies as :func:`power_spectrum` has them: [K, L // 2 + 1, M]."""
    K = _factor(N)
    columns = N // K // 2 + 1
    filters = np.pad(filters, ((0, K * columns - len(filters)), (0, 0)))
    return filters.reshape(columns, K, -1).swapaxes(0, 1)


def _rotation(turns: np.ndarray) -> np.ndarray:
    """exp(-2 pi i turns), real and imaginary part on a last axis, rounded from float64."""
    angle = 2 * np.pi * (turns % 1.0)
    return np.stack([np.cos(angle), -np.sin(angle)], axis=-1).astype(np.float32)


def reflected(audio: jax.Array, lengths: jax.Array, size: int) -> jax.Array:
    """Reflect each clip at both of its ends, without its first and last sample.

    Args:
        audio: [B, N], zero past a clip's end.
        lengths: [B] int32, over ``size``.
        size: samples before and after each clip.

    Returns:
        [B, size + N + size]; zero past the samples after a clip.
    """
    N = audio.shape[1]
    head = jnp.pad(audio, ((0, 0), (0, max(0, size + 1 - N))))[:, size:0:-1]
    index = lengths[:, None] - 2 - jnp.arange(size, dtype=jnp.int32)[None, :]
    tail = jnp.take_along_axis(audio, jnp.maximum(index, 0), axis=1, mode="clip")
    body = jnp.pad(audio, ((0, 0), (0, size)))
    place = jax.vmap(lambda row, end, n: jax.lax.dynamic_update_slice(row, end, (n,)))
    return jnp.concatenate([head, place(body, tail, lengths)], axis=1)


def decibels(power: jax.Array) -> jax.Array:
    """Of energies."""
    return 10 * jnp.log10(jnp.maximum(power, POWER_FLOOR))


def cut_off_below(x: jax.Array, counts: jax.Array, span: float) -> jax.Array:
    """Raise what is more than ``span`` below the highest value of each clip: [B, F, M], [B] -> [B, F, M].

    Zero past each clip's frames.
    """
    mask = frame_mask(counts, x.shape[1])[:, :, None]
    highest = jnp.where(mask, x, -jnp.inf).max(axis=(1, 2), keepdims=True)
    return jnp.where(mask, jnp.maximum(x, highest - span), 0.0)


def mel_filters(row: Spectrogram) -> np.ndarray:
    """Triangles [K, mels] over the frequencies of the transform; Kaldi's are straight over mels, the others' over Hz.

    Computed in float64. torchaudio computes them in float32, up to 1.4e-5 off.

    Args:
        row: the front end.
    """
    if row.scale == "linear":
        return np.eye(row.mels, dtype=np.float32)
    to_mel, to_hertz = _SCALES[row.scale]
    low, high = to_mel(np.array([row.low, row.high]))
    edges = np.linspace(low, high, row.mels + 2)
    frequencies = np.linspace(0, row.sample_rate / 2, row.fft // 2 + 1)
    hertz = to_hertz(edges)
    x, corners = (to_mel(frequencies), edges) if row.scale == "kaldi" else (frequencies, hertz)
    left, centre, right = (corners[None, k : k + row.mels] for k in range(3))
    filters = np.minimum((x[:, None] - left) / (centre - left), (right - x[:, None]) / (right - centre))
    filters = np.maximum(filters, 0)
    if row.scale == "kaldi":
        filters[-1] = 0  # Kaldi leaves out the highest frequency
    if row.area:
        filters *= 2 / (hertz[2:] - hertz[:-2])[None, :]
    return filters.astype(np.float32)


_SLANEY_BREAK, _SLANEY_STEP = 1000.0, np.log(6.4) / 27  # linear below it; then 27 mels for a factor of 6.4


def _slaney_mel(hertz: np.ndarray) -> np.ndarray:
    above = 15 + np.log(np.maximum(hertz, _SLANEY_BREAK) / _SLANEY_BREAK) / _SLANEY_STEP
    return np.where(hertz < _SLANEY_BREAK, hertz * 3 / 200, above)


def _slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, _SLANEY_BREAK * np.exp(_SLANEY_STEP * (np.maximum(mel, 15) - 15)))


_SCALES = {  # Hz to mels, and back
    "htk": (lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)),
    "slaney": (_slaney_mel, _slaney_hertz),
    "kaldi": (lambda f: 1127 * np.log(1 + f / 700), lambda m: 700 * (np.exp(m / 1127) - 1)),
}


class SpectrogramEncoder(TransformerEncoder):
    """Base of encoders whose transformer takes a spectrogram.

    A family's encoder adds the two that :meth:`inputs` calls, and :meth:`outputs` where a frame is not one token.
    """

    def __init__(self, config: Any, options: Options, grid: FrameGrid, spectrogram: Spectrogram) -> None:
        super().__init__(config, options, grid)
        if options.normalise:
            raise SystemConfigError(f"normalise: {config.model_type} normalises its spectrogram, and no clip")
        self.spectrogram, self.sample_rate = spectrogram, spectrogram.sample_rate
        self.shortest = spectrogram.shortest
        self.parts = ("log-mel", *(f"state {i}" for i in range(self.num_states)))

    def log_mel(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The spectrogram [B, F, M] as the network takes it, and each clip's number of its frames [B]."""
        raise NotImplementedError

    def tokens(self, network: Any, mel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the transformer takes of it: x [B', T', D], and the mask [B', T'] of what counts."""
        raise NotImplementedError

    def inputs(self, network: Any, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The spectrogram's tokens."""
        mel, _ = self.log_mel(audio, lengths)
        return self.tokens(network, mel, lengths)

    def outputs(self, x: jax.Array, audio: jax.Array, lengths: jax.Array) -> Output:
        """The frames of each clip's windows, one after the other."""
        frames = x.reshape(len(audio), -1, x.shape[-1])[:, : self.grid.count(audio.shape[1])]
        return Output(frames, self.grid.count(lengths))

    def states(
        self, params: Params, audio: jax.Array, lengths: jax.Array
    ) -> Iterator[tuple[str, jax.Array, jax.Array]]:
        """The spectrogram, and the states as frames."""
        network = self.network(params)
        mel, counts = self.log_mel(audio, lengths)
        yield "log-mel", mel, counts
        for i, state in enumerate(network.encoder(*self.tokens(network, mel, lengths))):
            frames, counts, _ = self.outputs(state, audio, lengths)
            yield f"state {i}", frames, counts
