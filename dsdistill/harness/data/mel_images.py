"""Recordings as images: the logarithm of their power in mel bands, frame by frame.

An image has a row for each band, the lowest first, and a column for every 10 ms. Its values span
the 80 dB below the recording's loudest, so that they are in [0, 1] and do not depend on the gain;
silence is 0. All recordings of a data set have one rate, length and number of bands, a `MelFormat`.

Source: Davis and Mermelstein (1980), "Comparison of parametric representations for monosyllabic
word recognition"; O'Shaughnessy's mel scale, 2595 log10(1 + f / 700), triangles without
normalisation, as torchaudio's `MelSpectrogram` has them by default.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dsdistill.harness.data import wav_files
from dsdistill.harness.data.wav_files import WavHeader
from dsdistill.harness.errors import UserError

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.01
RANGE_DB = 80.0  # between black and white
DEFAULT_BANDS = 40
COVERED_SHARE = 0.95  # of the recordings, whose whole length the default length holds
MIN_BANDS, MAX_BANDS = 8, 256  # networks halve images three times
MIN_SECONDS, MAX_SECONDS = 0.1, 600.0
MIN_RATE, MAX_RATE = 1000, 384_000


@dataclass(frozen=True)
class MelFormat:
    """How every recording of a data set becomes an image of the same size.

    Attributes:
        rate: Samples per second; recordings of another rate are resampled.
        seconds: Length; shorter recordings have silence on both sides, longer ones are cut on both.
        bands: Number of mel bands, the height of an image.
    """

    rate: int
    seconds: float
    bands: int = DEFAULT_BANDS

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return round(self.rate * HOP_SECONDS)

    @property
    def frames(self) -> int:
        """Number of frames, the width of an image."""
        return round(self.seconds / HOP_SECONDS)

    @property
    def samples(self) -> int:
        """Number of samples of a recording of this length."""
        return self.frames * self.hop

    @property
    def window(self) -> int:
        """Samples of a frame's window."""
        return round(self.rate * WINDOW_SECONDS)

    @property
    def fft(self) -> int:
        """Points of the Fourier transform: a power of 2 by which no mel band is without a line."""
        points = 1 << math.ceil(math.log2(self.window))
        while not filter_bank(self.rate, points, self.bands).any(0).all():
            points *= 2
        return points

    def describe(self) -> dict[str, Any]:
        """All that another program needs to make the same images, by name."""
        return {
            "sample_rate": self.rate,
            "seconds": self.seconds,
            "samples": self.samples,
            "length": "silence on both sides, or cut on both",
            "mel_bands": self.bands,
            "frames": self.frames,
            "window": f"Hann, {self.window} samples, periodic",
            "hop": self.hop,
            "fft": self.fft,
            "padding": "reflected, frames centred, the last one dropped",
            "mel_scale": "2595 log10(1 + f / 700), triangles without normalisation",
            "values": f"1 + 10 log10(power / largest power) / {RANGE_DB:g}, at least 0, "
            "rounded to 255 steps; silence is 0",
        }

    def __str__(self) -> str:
        return f"{self.bands} mel bands of {self.seconds:g} s at {self.rate:,} Hz"


@dataclass(frozen=True)
class MelOptions:
    """What is asked of a `MelFormat`; None follows from the recordings.

    Attributes:
        rate: Samples per second; None is the most frequent rate, of equal ones the higher.
        seconds: Length; None is one that holds `COVERED_SHARE` of the recordings whole.
        bands: Number of mel bands; None is `DEFAULT_BANDS`.
    """

    rate: int | None = None
    seconds: float | None = None
    bands: int | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UserError: With the option, the rule and the value.
        """
        for option, value, least, most in (
            ("--sample-rate", self.rate, MIN_RATE, MAX_RATE),
            ("--seconds", self.seconds, MIN_SECONDS, MAX_SECONDS),
            ("--mel-bands", self.bands, MIN_BANDS, MAX_BANDS),
        ):
            if value is not None and not least <= value <= most:
                raise UserError(f"{option} must be from {least:g} to {most:g}, got {value:g}")

    def settle(self, headers: Sequence[WavHeader]) -> MelFormat:
        """Choose what was not asked for by the recordings.

        Args:
            headers: Headers of the recordings that are trained on.

        Raises:
            UserError: If an option is out of range, or there is no recording.
        """
        self.check()
        if not headers:
            raise UserError("no recording to train on can be read as a WAV file: convert them")
        rates = Counter(header.rate for header in headers)
        rate = self.rate or max(rates, key=lambda rate: (rates[rate], rate))
        covering = float(np.quantile([h.seconds for h in headers], COVERED_SHARE, method="higher"))
        # In tenths of a second, where rounding errors must not add one.
        longest = math.ceil(round(10 * covering, 6)) / 10
        seconds = self.seconds or min(max(longest, MIN_SECONDS), MAX_SECONDS)
        return MelFormat(rate, seconds, self.bands or DEFAULT_BANDS)


def describe_conversion(mel: MelFormat, headers: Sequence[WavHeader]) -> str:
    """A clause on what becomes of recordings, with the shares that are changed on the way.

    Args:
        mel: The format of their images.
        headers: Headers of the recordings.
    """
    lengths = np.array([round(header.seconds * mel.rate) for header in headers])
    resampled = sum(header.rate != mel.rate for header in headers)
    mixed = sum(header.channels > 1 for header in headers)
    clauses = [f"recordings become images of {mel.bands} mel bands x {mel.frames} frames"]
    clauses.append(f"{mel.seconds:g} s at {mel.rate:,} Hz")
    if short := np.count_nonzero(lengths < mel.samples):
        clauses.append(f"{short / len(headers):.1%} are shorter and padded with silence")
    if long := np.count_nonzero(lengths > mel.samples):
        clauses.append(f"{long / len(headers):.1%} are longer and cut on both sides")
    clauses += [f"{resampled:,} of another rate are resampled"] if resampled else []
    clauses += [f"{mixed:,} of several channels are mixed to one"] if mixed else []
    return ", ".join(clauses)


def read(path: Path, mel: MelFormat) -> UInt8[np.ndarray, "bands frames"]:
    """Read a recording as an image.

    Raises:
        ValueError: If it is no complete WAV file of a known kind; one line without the path.
        OSError: If it cannot be read.
    """
    samples, rate = wav_files.read(path)
    samples = fit_length(wav_files.resample(samples, rate, mel.rate), mel.samples)
    return np.rint(255 * decibels(mel_power(samples, mel))).astype(np.uint8)


def fit_length(samples: Float[np.ndarray, " n"], length: int) -> Float[np.ndarray, " length"]:
    """Cut samples on both sides, or add silence on both sides; of an odd number more at the end."""
    if len(samples) >= length:
        start = (len(samples) - length) // 2
        return samples[start : start + length]
    before = (length - len(samples)) // 2
    return np.pad(samples, (before, length - len(samples) - before))


def mel_power(samples: Float[np.ndarray, " n"], mel: MelFormat) -> Float[np.ndarray, "m t"]:
    """Power in mel bands, frame by frame.

    Frames are centred at multiples of the hop, with the ends of the recording reflected; the last
    one, at the very end, is left out, so that a recording of t hops has t frames.

    Args:
        samples: Samples of `mel.samples` length.
        mel: Format with the rate and the number of bands.
    """
    points, window = mel.fft, mel.window
    padded = np.pad(samples.astype(np.float64), points // 2, mode="reflect")
    # Periodic, as for spectra: one point more, without the last.
    hann = np.zeros(points)
    start = (points - window) // 2
    hann[start : start + window] = np.hanning(window + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, points)[:: mel.hop][: mel.frames]
    power = np.abs(np.fft.rfft(frames * hann)) ** 2  # (t, points / 2 + 1)
    return np.ascontiguousarray((power @ filter_bank(mel.rate, points, mel.bands)).T)


def decibels(power: Float[np.ndarray, "m t"]) -> Float[np.ndarray, "m t"]:
    """Logarithm of power, from 0 for `RANGE_DB` below the largest to 1 for the largest.

    Without any power, as digital silence is, it is 0 throughout.
    """
    largest = power.max()
    if largest <= 0:
        return np.zeros_like(power)
    relative = np.maximum(power / largest, 10 ** (-RANGE_DB / 10))
    return 1 + 10 * np.log10(relative) / RANGE_DB


@cache
def filter_bank(rate: int, points: int, bands: int) -> Float[np.ndarray, "lines m"]:
    """Triangles whose corners are evenly spaced in mel from 0 to half the rate.

    Args:
        rate: Samples per second.
        points: Points of the Fourier transform.
        bands: Number m of bands.
    """
    lines = np.linspace(0, rate // 2, points // 2 + 1)  # Hz
    highest = 2595 * np.log10(1 + (rate // 2) / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    widths = np.diff(corners)
    distance = corners - lines[:, None]  # (lines, m + 2)
    rising, falling = -distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]
    return np.maximum(0, np.minimum(rising, falling))


def read_headers(files: Sequence[Path]) -> list[WavHeader]:
    """Read the headers of recordings; unreadable ones are left out."""
    headers = []
    for file in files:
        with suppress(ValueError, OSError):
            headers.append(wav_files.read_header(file))
    return headers
