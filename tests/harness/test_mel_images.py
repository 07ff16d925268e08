"""Recordings as images: against torchaudio, where it is there, and against a sum by hand."""

from pathlib import Path

import numpy as np
import pytest
import recordings

from dsdistill.harness.data import mel_images, wav_files
from dsdistill.harness.data.mel_images import MelFormat, MelOptions
from dsdistill.harness.data.wav_files import WavHeader
from dsdistill.harness.errors import UserError

NOISE = np.random.default_rng(1).normal(0, 0.1, 16_000)


@pytest.mark.parametrize(("rate", "bands"), [(8000, 40), (16_000, 64), (11_025, 80)])
def test_power_in_mel_bands_is_that_of_torchaudio(rate: int, bands: int) -> None:
    torchaudio = pytest.importorskip("torchaudio")
    import torch

    mel = MelFormat(rate, 0.5, bands)
    samples = NOISE[: mel.samples]
    theirs = torchaudio.transforms.MelSpectrogram(
        rate, n_fft=mel.fft, win_length=mel.window, hop_length=mel.hop, n_mels=bands
    ).double()
    expected = theirs(torch.from_numpy(samples)).numpy()[:, : mel.frames]
    ours = mel_images.mel_power(samples, mel)
    # torchaudio's triangles are in float32.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_power_of_one_frame_is_its_discrete_fourier_sum() -> None:
    mel = MelFormat(8000, 0.5, 40)
    samples = NOISE[: mel.samples]
    frame, points, window = 20, mel.fft, mel.window
    n = np.arange(window)
    start = frame * mel.hop - window // 2
    part = samples[start : start + window] * (0.5 - 0.5 * np.cos(2 * np.pi * n / window))
    k = np.arange(points // 2 + 1)[:, None]
    power = np.abs((part * np.exp(-2j * np.pi * k * n / points)).sum(1)) ** 2
    hertz = np.arange(points // 2 + 1) * 8000 / points
    highest = 2595 * np.log10(1 + 4000 / 700)
    corners = 700 * (10 ** (np.arange(42) * highest / 41 / 2595) - 1)
    expected = [
        sum(
            p * np.interp(f, corners[m : m + 3], [0, 1, 0])
            for p, f in zip(power, hertz, strict=True)
        )
        for m in range(40)
    ]
    np.testing.assert_allclose(mel_images.mel_power(samples, mel)[:, frame], expected, rtol=1e-9)


def test_no_band_is_without_a_line_of_the_spectrum() -> None:
    for rate, bands in [(8000, 128), (44_100, 256), (1000, 40)]:
        mel = MelFormat(rate, 0.5, bands)
        assert mel_images.filter_bank(rate, mel.fft, bands).any(0).all()
        assert mel.fft >= mel.window


def test_a_tone_is_brightest_in_its_band_and_gain_changes_nothing(tmp_path: Path) -> None:
    mel = MelFormat(8000, 0.3, 40)
    quiet, loud = (
        mel_images.read(
            recordings.write(tmp_path / f"{x}.wav", recordings.tone(1000, loudness=x)), mel
        )
        for x in (0.05, 0.8)
    )
    assert loud.shape == (40, 30)
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 42) / 2595) - 1)
    nearest = int(np.abs(corners[1:-1] - 1000).argmin())
    assert (loud[:, 5:-5].argmax(0) == nearest).all()
    # 0.05 has 1638 steps of 16 bits: what differs is the noise of rounding, 60 dB below.
    bright = loud > 128
    assert np.abs(loud.astype(int) - quiet)[bright].max() <= 1
    assert loud.max() == 255


def test_silence_is_black(tmp_path: Path) -> None:
    path = recordings.write(tmp_path / "a.wav", np.zeros(4000))
    assert not mel_images.read(path, MelFormat(8000, 0.3)).any()


def test_length_is_cut_and_filled_on_both_sides() -> None:
    np.testing.assert_array_equal(mel_images.fit_length(np.arange(7.0), 3), [2, 3, 4])
    np.testing.assert_array_equal(mel_images.fit_length(np.arange(1.0, 3), 5), [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(mel_images.fit_length(np.arange(3.0), 3), [0, 1, 2])


def _headers(*lengths_and_rates: tuple[float, int]) -> list[WavHeader]:
    return [
        WavHeader(r, 1 + (r == 16_000), 16, False, 44, round(s * r)) for s, r in lengths_and_rates
    ]


def test_the_format_follows_from_the_recordings() -> None:
    headers = _headers(*[(0.3, 8000)] * 97, (0.91, 16_000), (1.0, 16_000), (9.0, 16_000))
    assert MelOptions().settle(headers) == MelFormat(8000, 0.3, 40)
    assert MelOptions(seconds=0.5, bands=64).settle(headers) == MelFormat(8000, 0.5, 64)
    assert MelOptions().settle(_headers((0.301, 8000), (0.2, 16_000))) == MelFormat(16_000, 0.4, 40)
    said = mel_images.describe_conversion(MelFormat(8000, 0.5), headers)
    assert said == (
        "recordings become images of 40 mel bands x 50 frames, 0.5 s at 8,000 Hz, 97.0% are "
        "shorter and padded with silence, 3.0% are longer and cut on both sides, 3 of another "
        "rate are resampled, 3 of several channels are mixed to one"
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (MelOptions(rate=10), "--sample-rate must be from 1000 to 384000, got 10"),
        (MelOptions(seconds=0.01), "--seconds must be from 0.1 to 600, got 0.01"),
        (MelOptions(bands=4), "--mel-bands must be from 8 to 256, got 4"),
    ],
)
def test_values_out_of_range_are_refused(options: MelOptions, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}$"):
        options.check()


def test_unreadable_recordings_do_not_decide(tmp_path: Path) -> None:
    good = recordings.write(tmp_path / "a.wav", NOISE[:4000])
    (tmp_path / "b.wav").write_bytes(b"")
    assert mel_images.read_headers([tmp_path / "b.wav", good]) == [wav_files.read_header(good)]
    with pytest.raises(UserError, match="no recording to train on can be read as a WAV file"):
        MelOptions().settle([])
