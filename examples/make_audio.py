"""Makes the clips in examples/audio: a melody, speech, noise, a drum beat and a glide, in different formats and rates.

Run ``python examples/make_audio.py``. Needs numpy, soundfile, and espeak-ng for the speech. The samples are the
same each time, except that speech follows espeak-ng's version.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

FOLDER = Path(__file__).parent / "audio"
PEAK = 0.7
FADE = 0.02  # seconds, at both ends

# (semitones from A4, beats): "Ode to Joy", by heart
MELODY = [(-5, 1), (-5, 1), (-4, 1), (-2, 1), (-2, 1), (-4, 1), (-5, 1), (-7, 1), (-9, 1), (-9, 1), (-7, 1), (-5, 1)]
MELODY += [(-5, 1.5), (-7, 0.5), (-7, 2)]
BASS = [(-21, 4), (-26, 4), (-21, 4), (-21, 1.5), (-26, 2.5)]
TEXT = "Hello! I am a machine, and this is a sentence for another machine to hear."


def seconds(duration: float, rate: int) -> np.ndarray:
    return np.arange(round(duration * rate)) / rate


def pluck(frequency: float, duration: float, rate: int) -> np.ndarray:
    """A plucked string: harmonics that fade faster the higher they are."""
    t = seconds(duration, rate)
    harmonics = np.arange(1, int(min(24, 0.4 * rate / frequency)) + 1)
    stretched = frequency * harmonics * np.sqrt(1 + 2e-4 * harmonics**2)  # stiff strings: slightly sharp overtones
    strength = np.abs(np.sin(np.pi * harmonics / 5)) / harmonics  # plucked at a fifth of its length
    waves = strength * np.sin(2 * np.pi * t[:, None] * stretched) * np.exp(-t[:, None] * (1.2 + 0.7 * harmonics))
    return waves.sum(axis=1) * np.clip(np.minimum(t / 0.004, (duration - t) / 0.08), 0, 1)


def melody(rate: int) -> np.ndarray:
    """[n, 2]: the tune to the right, the bass to the left."""
    beat = 0.27
    total = sum(beats for _, beats in MELODY) * beat
    out = np.zeros((round((total + 0.3) * rate), 2))
    for notes, ring, balance in ((MELODY, 0.6, (0.55, 0.85)), (BASS, 1.4, (0.9, 0.6))):
        start = 0.0
        for semitones, beats in notes:
            note = pluck(440 * 2 ** (semitones / 12), ring + beats * beat, rate)
            first = round(start * rate)
            note = note[: len(out) - first]
            out[first : first + len(note)] += note[:, None] * balance
            start += beats * beat
    return out


def speech() -> tuple[np.ndarray, int]:
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is needed for the speech: apt-get install espeak-ng, or brew install espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        subprocess.run(["espeak-ng", "-v", "en-gb", "-s", "165", "-p", "45", "-w", str(path), TEXT], check=True)
        return soundfile.read(path)


def noise(rate: int) -> np.ndarray:
    """Noise through a band that sweeps up and down over four octaves, with breath in it."""
    rng = np.random.default_rng(2021)
    size, hop = 512, 128
    window = np.hanning(size + 1)[:-1]
    frequencies = np.fft.rfftfreq(size, 1 / rate)[1:]
    count = int(3.5 * rate) // hop
    out = np.zeros(count * hop + size)
    for i in range(count):
        centre = 440 * 2 ** (2 - 2 * np.cos(2 * np.pi * 1.5 * i / count))
        spectrum = np.exp(-0.5 * (np.log2(frequencies / centre) / 0.35) ** 2) / np.sqrt(frequencies)
        random = rng.standard_normal(len(spectrum)) + 1j * rng.standard_normal(len(spectrum))
        out[i * hop : i * hop + size] += window * np.fft.irfft(np.concatenate([[0], spectrum * random]), size)
    return out


def beat(rate: int) -> np.ndarray:
    rng = np.random.default_rng(2021)
    t = seconds(0.4, rate)
    white = rng.standard_normal(len(t))
    kick = np.sin(2 * np.pi * (48 * t + 110 / 28 * (1 - np.exp(-28 * t)))) * np.exp(-9 * t)
    snare = 0.5 * white * np.exp(-16 * t) + 0.5 * np.sin(2 * np.pi * 185 * t) * np.exp(-22 * t)
    hat = 0.4 * np.diff(np.diff(white, prepend=0), prepend=0) * np.exp(-60 * t)
    open_hat = 0.3 * np.diff(np.diff(white, prepend=0), prepend=0) * np.exp(-12 * t)
    step = 60 / 112 / 4  # a sixteenth at 112 beats a minute
    patterns = (
        (kick, 0.9, "x..x..x...x....."),
        (snare, 0.8, "....x.......x..x"),
        (hat, 0.35, "x.xxx.x.x.xxx..."),
        (open_hat, 0.3, "..............x."),
    )
    out = np.zeros(round((32 * step + 0.2) * rate))
    for sound, level, pattern in patterns:
        for i, hit in enumerate(pattern * 2):
            if hit == "x":
                first = round(i * step * rate)
                part = sound[: len(out) - first]
                out[first : first + len(part)] += level * part
    return np.tanh(1.2 * out)


def glide(rate: int) -> np.ndarray:
    """A sine that rises from 110 to 880 Hz with a growing vibrato."""
    t = seconds(4, rate)
    octaves = 3 * t / t[-1] + 0.05 * (t / t[-1]) * np.sin(2 * np.pi * 5.5 * t)
    phase = 2 * np.pi * np.cumsum(110 * 2**octaves) / rate
    return np.sin(phase) + 0.25 * np.sin(2 * phase) + 0.1 * np.sin(3 * phase)


def finish(samples: np.ndarray, rate: int) -> np.ndarray:
    """Same peak for all, silent ends."""
    position = np.arange(len(samples))
    ramp = np.clip(np.minimum(position, position[::-1]) / (FADE * rate), 0, 1)
    fade = 0.5 - 0.5 * np.cos(np.pi * ramp)
    return (samples.T * fade).T * (PEAK / np.abs(samples).max())


def main() -> None:
    voice, voice_rate = speech()
    clips = {
        "melody.flac": (melody(44_100), 44_100),
        "speech.wav": (voice, voice_rate),
        "noise.wav": (noise(16_000), 16_000),
        "beat.ogg": (beat(48_000), 48_000),
        "glide.mp3": (glide(16_000), 16_000),
    }
    FOLDER.mkdir(exist_ok=True)
    for name, (samples, rate) in clips.items():
        path = FOLDER / name
        soundfile.write(path, finish(samples, rate), rate)
        info = soundfile.info(path)
        print(f"{name:12} {info.duration:4.1f} s  {rate} Hz  {info.channels} ch  {path.stat().st_size / 1000:4.0f} KB")


if __name__ == "__main__":
    main()
