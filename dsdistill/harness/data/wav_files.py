"""One WAV file, as samples of one channel in [-1, 1].

Read are PCM of 8, 16, 24 and 32 bits and floating point of 32 and 64 bits, in files with the plain
and with the extensible header; several channels are averaged. The standard library's `wave` knows
no floating point, and SciPy's reader only warns of a file that ends early, which is damage here.

Source: Microsoft and IBM (1991), "Multimedia Programming Interface and Data Specifications 1.0";
Microsoft's WAVEFORMATEXTENSIBLE.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

EXTENSIONS = (".wav", ".wave")
# Recordings of other formats, which can be converted.
UNREAD_RECORDINGS = {".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma"}
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_LENGTH = 0xFFFFFFFF  # of a file whose writer could not go back to its header


class WavHeader(NamedTuple):
    """What a file says before its samples.

    Attributes:
        rate: Samples of a channel per second.
        channels: Number of channels.
        bits: Bits of one sample of one channel.
        is_float: Whether samples are floating-point numbers.
        start: Position of the first sample in the file, in bytes.
        frames: Number of samples of each channel.
    """

    rate: int
    channels: int
    bits: int
    is_float: bool
    start: int
    frames: int

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.frames / self.rate


def is_wav(file: Path) -> bool:
    """Whether a file is a recording, by its extension."""
    return file.suffix.lower() in EXTENSIONS


def read_header(path: Path) -> WavHeader:
    """Read what a file says before its samples.

    Raises:
        ValueError: If it is no complete WAV file of a known kind; one line without the path.
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        return _read_header(file)


def read(path: Path) -> tuple[Float[np.ndarray, " n"], int]:
    """Read a recording: float32 samples in [-1, 1], channels averaged, and their rate.

    Raises:
        ValueError: If it is no complete WAV file of a known kind, or a sample is not finite; one
            line without the path.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        header = _read_header(file)
        file.seek(header.start)
        data = file.read(header.frames * header.channels * header.bits // 8)
    samples = _decode(data, header).reshape(header.frames, header.channels).mean(1)
    if not np.isfinite(samples).all():
        raise ValueError("samples that are not finite")
    return samples.astype(np.float32), header.rate


def resample(samples: Float[np.ndarray, " n"], rate: int, new: int) -> Float[np.ndarray, " m"]:
    """Convert samples to another rate, without what the new rate cannot represent.

    Args:
        samples: The samples.
        rate: Their rate.
        new: The new rate; the same rate returns the samples themselves.
    """
    if rate == new:
        return samples
    from scipy import signal

    common = math.gcd(rate, new)
    return signal.resample_poly(samples, new // common, rate // common).astype(np.float32)


def _read_header(file: BinaryIO) -> WavHeader:
    start = file.read(12)
    if not start:
        raise ValueError("an empty file")
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise ValueError("not a WAV file")
    end = os.fstat(file.fileno()).st_size
    form: tuple[int, int, int, int] | None = None
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"fmt ":
            form = _parse_format(file.read(size))
        elif name == b"data":
            if form is None:
                raise ValueError("samples before their format")
            return _describe_data(form, file.tell(), size, end)
        else:
            file.seek(size, os.SEEK_CUR)
        file.seek(size % 2, os.SEEK_CUR)  # chunks begin at even positions
    raise ValueError("no samples")


def _parse_format(content: bytes) -> tuple[int, int, int, int]:
    """Format tag, channels, rate and bits of a `fmt ` chunk."""
    if len(content) < 16:
        raise ValueError("an incomplete header")
    tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content)
    if tag == EXTENSIBLE and len(content) >= 26:
        (tag,) = struct.unpack_from("<H", content, 24)
    if (tag, bits) not in _TYPES and (tag, bits) != (PCM, 24):
        raise ValueError(
            f"samples of format {tag} with {bits} bits: convert it to PCM of 8, 16, 24 or 32 bits"
        )
    if not channels or not rate:
        raise ValueError(f"{channels} channels at {rate} Hz")
    return tag, channels, rate, bits


def _describe_data(form: tuple[int, int, int, int], start: int, size: int, end: int) -> WavHeader:
    tag, channels, rate, bits = form
    present = end - start
    if size == UNKNOWN_LENGTH:
        size = present
    if size > present:
        raise ValueError(f"it ends after {max(present, 0):,} of {size:,} bytes of samples")
    frames = size // (channels * bits // 8)
    if not frames:
        raise ValueError("no samples")
    return WavHeader(rate, channels, bits, tag == FLOAT, start, frames)


_TYPES = {  # (format tag, bits) -> type of a sample
    (PCM, 8): "u1",
    (PCM, 16): "<i2",
    (PCM, 32): "<i4",
    (FLOAT, 32): "<f4",
    (FLOAT, 64): "<f8",
}


def _decode(data: bytes, header: WavHeader) -> Float[np.ndarray, " n"]:
    """Samples of all channels in turn; integers are divided by their largest magnitude."""
    if header.bits == 24:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(triples), 4), np.uint8)
        padded[:, 1:] = triples  # in the upper bytes, so that the sign stays where it is
        values = padded.view("<i4")[:, 0]
        return values / 2.0**31
    values = np.frombuffer(data, _TYPES[FLOAT if header.is_float else PCM, header.bits])
    if header.is_float:
        return values.astype(np.float64)
    offset = 128 if header.bits == 8 else 0  # 8 bits have no sign
    return (values.astype(np.float64) - offset) / 2.0 ** (header.bits - 1)
