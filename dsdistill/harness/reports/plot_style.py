"""Style of the plots, and their rendering: for light and dark pages, and as files.

Everything is drawn in one placeholder ink on a transparent background. In a page the ink becomes
`currentColor`, so that one drawing serves light and dark; in a file it is black on white.
Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; markers and
hatches differ as well.
"""

import io
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from math import isclose
from typing import TYPE_CHECKING, Any

from dsdistill.harness.text import MAX_NAME_CHARACTERS, printable, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # in no palette, and black enough for a PNG
FONT = "'DejaVu Sans',Verdana,sans-serif"  # the font of the layout, and one as wide
MAX_TITLE_LENGTH = 50  # characters of the title of a panel, or of a line in a legend
WIDTH_INCHES = 4.4  # on a phone the text is still 9 pixels high
DPI = 150  # of PNG files

# Names come from data: a dollar sign in one does not begin a formula, nor a backslash a command.
_AS_TEXT: Any = {"text.parse_math": False, "text.usetex": False}
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "hatch.linewidth": 0.6,
    "hatch.color": INK,
    "svg.hashsalt": "dsdistill",
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": INK,
}


@dataclass(frozen=True)
class ArmStyle:
    """Colour, marker, hatch and line style of one kind of data, the same in all plots."""

    colour: str
    marker: str
    hatch: str
    line: Any = "-"


BLUE, SKY, PURPLE = "#0072B2", "#56B4E9", "#CC79A7"
ORANGE, GREEN, VERMILION = "#E69F00", "#009E73", "#D55E00"
_ARM_STYLES = {
    "distilled": ArmStyle(BLUE, "o", ""),
    "distilled-hard": ArmStyle(SKY, "s", "//"),
    "distilled-teacher": ArmStyle(PURPLE, "D", "xx"),
    "random": ArmStyle(ORANGE, "^", "\\\\", "--"),
    "k-means": ArmStyle(GREEN, "v", "..", "-."),
    "herding": ArmStyle(VERMILION, "P", "++", (0, (3, 1, 1, 1, 1, 1))),
    "full": ArmStyle(INK, "X", "", (0, (5, 2, 1, 2))),
    "random-soft": ArmStyle(SKY, "<", "\\\\", (0, (1, 1))),
    "random-solved": ArmStyle(PURPLE, ">", "\\\\", (0, (4, 1))),
}
SERIES = (*list(_ARM_STYLES.values())[:6], ArmStyle(INK, "X", "--", "--"))
# Of further sets, in their order.
_FURTHER_STYLES = (
    ArmStyle(VERMILION, "*", "||"),
    ArmStyle(GREEN, "p", "oo"),
    ArmStyle(ORANGE, "d", "--"),
    ArmStyle(PURPLE, "h", "**", "-."),
    ArmStyle(BLUE, "8", "OO", "--"),
    ArmStyle(SKY, "H", "|-", (0, (5, 2, 1, 2))),
)


def arm_style(arm: str) -> ArmStyle:
    """Style of an arm that every report may have."""
    return _ARM_STYLES[arm]


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """Styles of the arms of a report, by name; those of further sets follow the arms' order."""
    names = dict.fromkeys(arms)
    further = zip(
        (name for name in names if name not in _ARM_STYLES), itertools.cycle(_FURTHER_STYLES)
    )
    return {name: _ARM_STYLES[name] for name in names if name in _ARM_STYLES} | dict(further)


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw names as plain text within this context, whatever the user's own settings."""
    import matplotlib

    with matplotlib.rc_context(_AS_TEXT), warnings.catch_warnings():
        # The font of the files lacks some scripts of class names; the font of a page has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


@contextmanager
def style_context() -> Iterator[None]:
    """Draw and save figures in the common style within this context."""
    import matplotlib

    with plain_text(), matplotlib.rc_context(_STYLE):
        yield


def label(name: str, limit: int = MAX_NAME_CHARACTERS) -> str:
    """Shorten a name to one line of at most `limit` characters, for a plot.

    A legend omits names that begin with an underscore, so those get a space before it.
    """
    short = shorten(name, limit)
    return f" {short}" if short.startswith("_") else short


def format_log_axis(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: every tick, or 1, 2 and 5, or powers of ten.

    The longer the axis, the fewer ticks get a number.
    """
    low, high = axis.get_view_interval()
    axis.set_major_formatter(_round_number if high > 5 * low else _any_number)
    axis.set_minor_formatter(
        _any_number if high < 5 * low else _round_number if high < 100 * low else _no_number
    )


def new_figure(height: float, width: float = WIDTH_INCHES) -> "Figure":
    """Create an empty figure; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: "Figure", *, name: str = "plot", alt: str = "") -> str:
    """Render a figure for a page: a transparent SVG element whose ink is `currentColor`.

    Args:
        figure: A figure of `plots`.
        name: Prefix of every id in the element, unique within the page.
        alt: Text alternative; without one the figure is hidden from screen readers.
    """
    text = _save(figure, format="svg", fonttype="none").decode()
    text = text[text.index("<svg") :]
    # matplotlib's style sheet would apply to the whole page; its metadata is of no use there.
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", lambda tag: _adapt_tag(tag[0], name), text)
    text = re.sub(r">\s+<", "><", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r"<[^>]+>", lambda tag: _drop_unused_id(tag[0], used), text)
    role = f'role="img" aria-label="{escape(printable(alt))}"' if alt else 'aria-hidden="true"'
    return re.sub(r"^<svg\b[^>]*>", lambda tag: _resize_root_tag(tag[0], role), text).strip()


def svg_file(figure: "Figure") -> bytes:
    """Render a figure as an SVG file, black on white, with text as paths."""
    text = _save(figure, format="svg", facecolor="white").decode()
    return re.sub(r"<[^>]+>", lambda tag: tag[0].replace(INK, "#000000"), text).encode()


def png(figure: "Figure") -> bytes:
    """Render a figure as a PNG file, black on white."""
    return _save(figure, format="png", facecolor="white", dpi=DPI)


def _round_number(value: float, _: int) -> str:
    """Format a tick that is 1, 2 or 5 times a power of ten; empty for any other."""
    digit = f"{value:e}"[0]
    return (
        f"{value:g}"
        if digit in "125" and isclose(value, float(f"{value:.0e}"), rel_tol=1e-5)
        else ""
    )


def _any_number(value: float, _: int) -> str:
    return f"{value:g}"


def _no_number(value: float, _: int) -> str:
    return ""


def _save(figure: "Figure", *, fonttype: str = "path", **options: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    if options["format"] == "svg":
        options["metadata"] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style_context(), matplotlib.rc_context({"svg.fonttype": fonttype}):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _adapt_tag(tag: str, name: str) -> str:
    """Prefix the ids of a tag with the plot's name, and shorten it by about half."""
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    tag = re.sub(r"font-family:[^;\"]*; ?| transform=\"rotate\(-0 [^)]*\)\"", "", tag)
    return re.sub(r"\s+", " ", tag).replace(INK, "currentColor")


def _drop_unused_id(tag: str, used: set[str]) -> str:
    """Drop the id of a tag if nothing refers to it."""
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", tag)


def _resize_root_tag(tag: str, role: str) -> str:
    """Replace the opening tag: the page sets the size, the view box keeps the ratio of sides."""
    box = re.search(r'viewBox="[^"]*"', tag)
    assert box is not None
    width = float(box[0].split()[2])
    return f'<svg {box[0]} {role} style="width:{width * 4 / 3:.0f}px;font-family:{FONT}">'
