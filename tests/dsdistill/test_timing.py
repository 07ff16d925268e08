"""The target batch for a stated time, the expected duration of a run, and its wording."""

import jax
import numpy as np
import pytest

from dsdistill.harness.data.labeled_images import Examples, LabeledImages
from dsdistill.harness.data.preprocess import identity
from dsdistill.harness.errors import UserError
from dsdistill.harness.runs import progress
from dsdistill.kernels import networks
from dsdistill.loops import timing
from dsdistill.methods import kip
from dsdistill.methods.adam import Adam
from dsdistill.methods.gauss_newton import GaussNewton
from dsdistill.methods.initial_support import draw_support


@pytest.mark.parametrize(
    ("text", "value"),
    [(5000, 5000), ("480", 480), ("2s", 2.0), ("0.5 s", 0.5), ("500ms", 0.5), ("1min", 60.0)],
)
def test_parse(text, value):
    assert timing.parse_target_batch(text) == value
    assert type(timing.parse_target_batch(text)) is type(value)


@pytest.mark.parametrize("text", ["", "soon", "2h", "1e3", "1.5", 0, -3, "0s", "-2s"])
def test_parse_refuses(text):
    with pytest.raises(UserError, match="--target-batch must be"):
        timing.parse_target_batch(text)


def train(n: int) -> Examples:
    labels = np.arange(n) % 10
    images = np.random.default_rng(0).random((n, 4, 4, 1), np.float32)
    return Examples(
        LabeledImages(images, labels, tuple("abcdefghij")), identity(1), is_preprocessed=True
    )


FC = networks.parse("fc"), networks.parse("fc", 2)


def chosen(seconds: float, n: int = 10_000, count: int = 1) -> int:
    objective, data = kip.KipObjective(FC[:count]), train(n)
    support = draw_support(data, 1, noise=False, corruption=0, seed=0)
    return timing.choose_target_batch(objective, support, data, seconds, seed=0)


def timed(monkeypatch, seconds) -> list[int]:
    """Replace measured step times by a function of targets and network."""
    sizes = []

    def measured(objective, support, train, targets, seed):
        sizes.append(targets)
        return seconds(targets, objective.networks[0])

    monkeypatch.setattr(timing, "_time_step", measured)
    return sizes


def test_the_batch_is_on_the_line(monkeypatch):
    sizes = timed(monkeypatch, lambda m, _: 0.1 + 0.001 * m)
    assert chosen(2.0) == 1900
    assert sizes == [40, 160, 640]  # until a quarter of the time


def test_an_expensive_step_is_timed_at_two_small_sizes(monkeypatch):
    sizes = timed(monkeypatch, lambda m, _: 1 + 0.1 * m)
    assert chosen(3.0) == 20
    assert sizes == [40, 160]


def test_a_time_that_is_too_short_gives_one_a_class(monkeypatch):
    timed(monkeypatch, lambda m, _: 1 + 0.1 * m)
    assert chosen(0.5) == 10


def test_a_long_time_takes_all_there_are(monkeypatch):
    sizes = timed(monkeypatch, lambda m, _: 1e-6 * m)
    assert chosen(60, n=504) == 500  # a multiple of the classes
    assert sizes == [40, 160]


def test_equal_times_do_not_divide_by_zero(monkeypatch):
    timed(monkeypatch, lambda m, _: 0.01)
    assert chosen(0.02, n=100_000) == 1760  # ten times the mean time a target is the most


def test_fewer_images_than_the_smallest_size(monkeypatch):
    timed(monkeypatch, lambda m, _: 0.01)
    assert chosen(1.0, n=20) == 20


def test_of_several_networks_the_mean_counts(monkeypatch):
    timed(monkeypatch, lambda m, network: 0.001 * m * (3 if network is FC[1] else 1))
    assert chosen(2.0, count=2) == 1000


@pytest.mark.heavy
def test_a_real_measurement():
    assert 10 <= chosen(0.001, n=500) <= 500


@pytest.mark.parametrize(
    "work",
    [
        None,
        pytest.param(Adam(), marks=pytest.mark.heavy),
        pytest.param(GaussNewton(), marks=pytest.mark.heavy),
    ],
)
def test_a_tile_announces_long_work_alone(work, monkeypatch):
    monkeypatch.setitem(timing.TILE_SIDES, "exact planes", 4)
    conv, long = networks.parse("conv(1)"), timing.MIN_ANNOUNCED_TILES * 4 * 4
    assert timing.time_tile(conv, train(20), long, work) is None
    assert timing.time_tile(FC[0], train(20), 1e9, work) is None  # its steps say so soon enough
    tile = timing.time_tile(conv, train(20), long + 1, work)
    assert tile is not None
    assert tile.pairs == 4 * 4 * jax.device_count()
    assert 0 < tile.seconds < 10


def test_the_time_of_a_tile_is_without_compiling(monkeypatch):
    times = iter([30.0, 3.0, 2.0])
    monkeypatch.setattr(timing, "_time_call", lambda run, images: next(times))
    assert timing.time_tile(networks.parse("conv(1)"), train(3), 1e9, Adam()) == (
        2.0,
        3 * 3 * jax.device_count(),
    )


def step(seconds: float, network: int = 0) -> kip.Step:
    return kip.Step(1, None, 0.0, network, 1, seconds)  # type: ignore[arg-type]


def test_pace_leaves_out_the_steps_that_compile():
    one = timing.StepTimer(1)
    assert one.seconds(step(30)) is None
    assert one.seconds(step(2)) == 2
    two = timing.StepTimer(2)
    for taken, network in ((30, 0), (2, 0), (40, 1)):
        assert two.seconds(step(taken, network)) is None
    assert two.seconds(step(4, 1)) == 3


def test_only_long_work_shows_its_parts(capsys, monkeypatch):
    parts = [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert list(progress.track_if_slow(parts, "test images")) == parts
    assert list(progress.track_if_slow([], "test images")) == []
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress.track_if_slow(parts, "test images")) == parts
    said = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said] == [f"{done}/9 test images" for done in (4, 8, 9)]
    assert said[-1].endswith("0:00 left")


def test_expected_is_one_line(capsys):
    progress.announce_duration(720, "step", 0.72, 864_000)
    assert capsys.readouterr().err == (
        "expected: 12 min to the end of the run "
        "(0.7 s per step, 1.2 million pairs of images per second)\n"
    )
    progress.announce_duration(0.0123, "chunk", 0.0123, 10)
    assert capsys.readouterr().err == (
        "expected: 12 ms to the end of the run (12 ms per chunk, 813 pairs of images per second)\n"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0042, "4.2 ms"),
        (0.72, "0.7 s"),
        (15.2, "15 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (3600, "60 min"),
        (9000, "2.5 h"),
        (90000, "25 h"),
    ],
)
def test_durations(seconds, words):
    assert progress.format_duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.123, "0.12"),
        (14.2, "14"),
        (43_210, "43,210"),
        (1.24e6, "1.24 million"),
        (2e9, "2 billion"),
    ],
)
def test_amounts(number, words):
    assert progress.format_amount(number) == words
