"""WAV files for tests: tones, written by the standard library or byte by byte."""

import struct
import wave
from pathlib import Path

import numpy as np
from jaxtyping import Float

RATE = 8000


def tone(
    frequency: float, seconds: float = 0.3, rate: int = RATE, loudness: float = 0.5
) -> Float[np.ndarray, " n"]:
    """A sine in [-1, 1]."""
    return loudness * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write(
    path: Path, samples: Float[np.ndarray, " n"], rate: int = RATE, channels: int = 1
) -> Path:
    """Write 16-bit PCM, every channel alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.rint(samples * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(values, channels).tobytes())
    return path


def write_raw(path: Path, tag: int, bits: int, data: bytes, *, rate: int = RATE) -> Path:
    """Write one channel of any format, with a chunk of odd length before the samples."""
    form = struct.pack("<HHIIHH", tag, 1, rate, rate * bits // 8, bits // 8, bits)
    chunks = [(b"fmt ", form), (b"LIST", b"odd"), (b"data", data)]
    body = b"".join(
        name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for name, content in chunks
    )
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)
    return path


def folder(
    root: Path, count: int = 10, classes: tuple[float, ...] = (300.0, 900.0, 2500.0)
) -> Path:
    """A folder of class folders of tones that differ a little, in loudness, pitch and length."""
    rng = np.random.default_rng(0)
    for frequency in classes:
        for number in range(count):
            pitch, loudness = frequency * rng.uniform(0.97, 1.03), rng.uniform(0.1, 0.9)
            sound = tone(pitch, rng.uniform(0.12, 0.2), loudness=loudness)
            noisy = sound + rng.normal(0, 0.02, len(sound))
            write(root / f"{frequency:g}" / f"{number}.wav", noisy.clip(-1, 1))
    return root
