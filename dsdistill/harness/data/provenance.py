"""Provenance of a distilled set, with every type checked.

A file may come from anyone and say anything: each value has the type and range that its use
requires, or counts as absent. No name in a file is imported, and sizes must agree with the images
in the file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsdistill.harness.errors import UserError
from dsdistill.harness.text import shorten

MAX_KERNEL_NUMBER = 100  # largest depth, and largest number in a kernel's name, that is accepted
MAX_WIDTH = 4096  # of a finite network in a kernel's name
OWN_MODULE = "a module"  # the backbone of a set, where a caller's own module was it
# What a set was made from that no data were read for.
FROM_WEIGHTS = "the weights of a network alone"
MAX_TEXT_CHARACTERS = 300  # of a displayed text


@dataclass(frozen=True)
class Provenance:
    """Checked provenance of a set; None where the file says nothing, or nothing usable.

    Attributes:
        method: `kip`, `ls`, or another name in one printable line.
        kernel: Readable name of the kernel that evaluated the set.
        judge: The kernel as written on a command line, with its depth in `depth`.
        depth, w_std, b_std: Depth, weight and bias deviation of that kernel.
        support_flips: Whether the mirror images of the set count as further images.
        backbone: Network through whose features the set was made.
        ridge: Relative ridge of the kernel ridge regression that evaluated the set.
        source: Data set, folder or file that the set was distilled from.
        sha256: SHA-256 of the training images and labels of that data.
        image_size: Height and width that images were resized to, in pixels.
        channels: Channels that images were converted to; None if they were kept.
        validation_fraction: Share of the training images that was held out.
        seconds: Duration of the distillation.
        peak_memory: Peak memory of the distillation, in bytes.
        metrics: Figures by name.
        from_weights: Whether the set was made from a network's weights, without data.
        notes: Sentences for a report.
        config: Options of the run; None for a set that `dsdistill` did not make.
        unusable: Names of values that are present but cannot be used, such as `data.source`.
    """

    method: str
    kernel: str | None
    judge: str | None
    depth: int | None
    w_std: float | None
    b_std: float | None
    support_flips: bool | None
    backbone: str | None
    ridge: float | None
    source: str | None
    sha256: str | None
    image_size: int | None
    channels: int | None
    validation_fraction: float | None
    seconds: float | None
    peak_memory: int | None
    metrics: Mapping[str, float | None]
    from_weights: bool
    notes: tuple[str, ...]
    config: Mapping[str, Any] | None
    unusable: tuple[str, ...]


def parse(stored: Mapping[str, Any], shape: Sequence[int]) -> Provenance:
    """Parse and check stored provenance; never raises.

    Args:
        stored: `provenance` of the file.
        shape: Height, width and channels of the set's images.
    """
    unusable: list[str] = []
    data = _mapping(stored.get("data"), "data", unusable)
    config = _mapping(stored.get("config"), "config", unusable)

    def read(mapping: Mapping[str, Any], name: str, key: str, check: Any) -> Any:
        value = mapping.get(key)
        if value is None:
            return None
        if (checked := check(value)) is None:
            unusable.append(name)
        return checked

    def image_size(value: object) -> int | None:
        size = _integer(value, 1, 2**31)
        return size if size == shape[0] == shape[1] else None

    method = read(stored, "method", "method", _line)
    kernel = read(stored, "kernel", "kernel", _line)
    return Provenance(
        method=method or "unknown method",
        kernel=kernel,
        judge=read(config, "config.kernel", "kernel", _kernel),
        depth=read(config, "config.depth", "depth", lambda v: _integer(v, 1, MAX_KERNEL_NUMBER)),
        w_std=read(config, "config.w_std", "w_std", lambda v: _number(v, 1e-6, 1e6)),
        b_std=read(config, "config.b_std", "b_std", lambda v: _number(v, 0, 1e6)),
        support_flips=read(
            config,
            "config.support_flips",
            "support_flips",
            lambda v: v if isinstance(v, bool) else None,
        ),
        backbone=read(config, "config.features", "features", _line),
        ridge=read(stored, "evaluation_ridge", "evaluation_ridge", lambda v: _number(v, 0, 1e6)),
        source=read(data, "data.source", "source", _source),
        sha256=read(data, "data.sha256", "sha256", _sha256),
        channels=read(config, "config.channels", "channels", lambda v: v if v in (1, 3) else None),
        image_size=read(config, "config.image_size", "image_size", image_size),
        validation_fraction=read(
            config,
            "config.validation_fraction",
            "validation_fraction",
            lambda v: number if (number := _number(v, 0, 1)) is not None and number < 1 else None,
        ),
        seconds=read(stored, "seconds", "seconds", lambda v: _number(v, 0, 1e10)),
        peak_memory=read(stored, "peak_memory", "peak_memory", lambda v: _integer(v, 0, 2**60)),
        metrics=_metrics(stored.get("metrics")),
        from_weights=stored.get("made_from") == FROM_WEIGHTS,
        notes=_notes(stored.get("notes")),
        config=config if isinstance(stored.get("config"), Mapping) else None,
        unusable=tuple(unusable),
    )


def require_usable(who: object, provenance: Provenance, names: Sequence[str]) -> None:
    """Refuse a set whose provenance has unusable values that are about to be used.

    Args:
        who: Name of the set in the message.
        provenance: Provenance of the set.
        names: Names of the values to be used.

    Raises:
        UserError: If one of them is unusable; the message names the first.
    """
    sections = [name.partition(".")[0] for name in names]
    for name in (*sections, *names):
        if name in provenance.unusable:
            raise UserError(
                f"{who} states a {name} that cannot be used: its file was written or changed by "
                "another program"
            )


def _mapping(value: object, name: str, unusable: list[str]) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if value is not None:
        unusable.append(name)
    return {}


def _line(value: object) -> str | None:
    return shorten(value, MAX_TEXT_CHARACTERS) if isinstance(value, str) and value else None


def _kernel(value: object) -> str | None:
    """One or several kernel names with small numbers: a network is built as deep as they say."""
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= MAX_TEXT_CHARACTERS
        or not value.isprintable()
    ):
        return None
    numbers = re.findall(r"[0-9]+", value)
    limit = MAX_WIDTH if value.startswith("features:") else MAX_KERNEL_NUMBER
    return value if all(len(n) < 9 and int(n) <= limit for n in numbers) else None


def _source(value: object) -> str | None:
    """A data set name or path, but no URL: nothing is downloaded from an address in a file."""
    if not isinstance(value, str) or not value or not value.isprintable():
        return None
    return None if "://" in value or value.startswith("-") else value


def _sha256(value: object) -> str | None:
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else None


def _integer(value: object, low: int, high: int) -> int | None:
    return value if type(value) is int and low <= value <= high else None


def _number(value: object, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if low <= value <= high else None  # NaN is in no range


def _metrics(value: object) -> dict[str, float | None]:
    """Metrics that are numbers; None stands for a value that was not finite."""
    if not isinstance(value, Mapping):
        return {}
    checked = {name: _number(number, -1e300, 1e300) for name, number in value.items()}
    return {
        shorten(name, MAX_TEXT_CHARACTERS): number
        for name, number in checked.items()
        if number is not None or value[name] is None
    }


def _notes(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(shorten(note, MAX_TEXT_CHARACTERS) for note in value if isinstance(note, str))
