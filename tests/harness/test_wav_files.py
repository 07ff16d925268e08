"""WAV files of every kind, against SciPy's reader and against the samples that were written."""

import struct
from pathlib import Path

import numpy as np
import pytest
import recordings
from scipy.io import wavfile

from dsdistill.harness.data import wav_files

SAMPLES = np.random.default_rng(0).uniform(-1, 1, 101)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("u1", 128), ("<i2", 2**15), ("<i4", 2**31), ("<f4", 1), ("<f8", 1)],
)
def test_scipy_writes_what_is_read(dtype: str, scale: float, tmp_path: Path) -> None:
    values = SAMPLES if scale == 1 else np.rint(SAMPLES * (scale - 1) + 128 * (dtype == "u1"))
    wavfile.write(tmp_path / "a.wav", 11_025, values.astype(dtype))
    samples, rate = wav_files.read(tmp_path / "a.wav")
    stored = values.astype(dtype).astype(np.float64)
    expected = (stored - 128 * (dtype == "u1")) / scale
    assert rate == 11_025
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, expected, atol=1e-7)  # rounding to float32


def test_24_bits_keep_their_sign(tmp_path: Path) -> None:
    integers = np.array([-(2**23), -1, 0, 1, 2**23 - 1])
    data = b"".join(int(value).to_bytes(3, "little", signed=True) for value in integers)
    path = recordings.write_raw(tmp_path / "a.wav", wav_files.PCM, 24, data)
    np.testing.assert_array_equal(wav_files.read(path)[0], (integers / 2**23).astype(np.float32))
    assert np.array_equal(wavfile.read(path)[1] >> 8, integers)  # SciPy reads the file too


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([SAMPLES, -SAMPLES / 2], 1).astype(np.float32)
    wavfile.write(tmp_path / "a.wav", 8000, both)
    assert wav_files.read_header(tmp_path / "a.wav")[:3] == (8000, 2, 32)
    np.testing.assert_allclose(wav_files.read(tmp_path / "a.wav")[0], SAMPLES / 4, atol=1e-7)


def test_the_extensible_header_says_its_format_further_on(tmp_path: Path) -> None:
    values = np.arange(-5, 5).astype("<i2")
    guid = struct.pack("<H", wav_files.PCM) + bytes.fromhex("000000001000800000aa00389b71")
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, 8000, 16_000, 2, 16, 22, 16, 4) + guid
    body = b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", 2 * len(values)) + values.tobytes()
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body)
    np.testing.assert_allclose(wav_files.read(path)[0], values / 2**15)


def test_a_length_that_its_writer_did_not_know_is_all_that_follows(tmp_path: Path) -> None:
    path = recordings.write(tmp_path / "a.wav", SAMPLES)
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff" * 4  # the size of the samples
    path.write_bytes(content)
    assert wav_files.read_header(path).frames == len(SAMPLES)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "an empty file"),
        (b"ID3 is an mp3 in disguise", "not a WAV file"),
        (b"RIFF\x04\x00\x00\x00WAVE", "no samples"),
        (b"RIFF\x00\x00\x00\x00WAVEdata\x02\x00\x00\x00\x00\x00", "samples before their format"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt \x02\x00\x00\x00\x01\x00", "an incomplete header"),
    ],
)
def test_what_is_no_recording_says_why(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{why}$"):
        wav_files.read(tmp_path / "a.wav")


def test_a_file_that_ends_early_is_damaged(tmp_path: Path) -> None:
    path = recordings.write(tmp_path / "a.wav", SAMPLES)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="it ends after 152 of 202 bytes of samples"):
        wav_files.read(path)


def test_compressed_and_endless_samples_are_refused(tmp_path: Path) -> None:
    path = recordings.write_raw(tmp_path / "a.wav", 2, 4, b"\0" * 8)  # ADPCM
    with pytest.raises(ValueError, match="format 2 with 4 bits: convert it to PCM of 8, 16"):
        wav_files.read(path)
    data = np.array([0, np.nan], "<f4").tobytes()
    path = recordings.write_raw(tmp_path / "b.wav", wav_files.FLOAT, 32, data)
    with pytest.raises(ValueError, match="not finite"):
        wav_files.read(path)


def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold() -> None:
    low, high = (recordings.tone(f, 1.0, rate=16_000) for f in (440, 6000))
    down = wav_files.resample((low + high).astype(np.float32), 16_000, 8000)
    middle = slice(1000, -1000)  # the filter needs neighbours
    expected = recordings.tone(440, 1.0, rate=8000)
    np.testing.assert_allclose(down[middle], expected[middle], atol=0.01)
    assert len(wav_files.resample(low, 16_000, 11_025)) == 11_025
    assert wav_files.resample(low, 16_000, 16_000) is low
