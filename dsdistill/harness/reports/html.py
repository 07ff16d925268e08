"""HTML of self-contained pages: no network, no script, no font.

Text goes through `text`, which escapes it; where a docstring says markup, it is inserted as it is.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from dsdistill.harness.reports import plot_style
from dsdistill.harness.text import printable

# Nothing is loaded and nothing runs; pictures are in the page itself.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
)
ENLARGED_PIXELS = 500  # width up to which small pictures are enlarged
CSS_DPI = 96  # pixels per inch of a page, by the standard of CSS
Cell = str | tuple[str, int]  # markup, and the number of columns it spans


def text(value: object) -> str:
    """Escape a value's text and bring it onto one line."""
    return escape(printable(str(value)))


def document(title: str, body: Iterable[str]) -> str:
    """Build a whole page.

    Args:
        title: Title of the page; text.
        body: Sections; markup.
    """
    sheet = (resources.files("dsdistill.harness.reports") / "page.css").read_text("utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # An empty icon keeps a browser from requesting one.
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>\n{sheet}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(identity: str, title: str, *parts: str) -> str:
    """Build a section with a heading from markup; empty if all its parts are."""
    inner = "\n".join(filter(None, parts))
    if not inner:
        return ""
    return (
        f'<section aria-labelledby="{identity}">\n<h2 id="{identity}">{text(title)}</h2>\n'
        f"{inner}\n</section>"
    )


def paragraph(words: str, kind: str = "") -> str:
    """Build a paragraph from text, of the CSS class `kind`."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def bullet_list(lines: Iterable[str]) -> str:
    """Build a bullet list from lines of markup; empty without lines."""
    inner = "".join(f"<li>{line}</li>\n" for line in lines)
    return f"<ul>\n{inner}</ul>" if inner else ""


def table(
    caption: str, head: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
) -> str:
    """Build a table that scrolls by itself where the page is narrow.

    Args:
        caption: Caption above the table; text.
        head: Names of the columns; text.
        groups: Pairs of a heading (text, may be empty) and rows of markup; the first cell of a row
            is its name.
    """
    columns = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    bodies = "\n".join(_group(name, rows, len(head)) for name, rows in groups)
    # Role, label and tab index let a keyboard or a screen reader scroll the region.
    return (
        f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0">\n<table>\n'
        f"<caption><span>{text(caption)}</span></caption>\n<thead><tr>{columns}</tr></thead>\n{bodies}\n"
        "</table>\n</div>"
    )


def figure(content: str, caption: str) -> str:
    """Build a figure from markup, with a caption (text) below it; it scrolls by itself too."""
    return (
        f'<figure>\n<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0">\n'
        f"{content}\n</div>\n<figcaption>{text(caption)}</figcaption>\n</figure>"
    )


def figure_grid(figures: Sequence[str]) -> str:
    """Place figures beside each other where there is room; empty without figures."""
    inner = "\n".join(filter(None, figures))
    return f'<div class="figures">\n{inner}\n</div>' if inner else ""


def picture(png: bytes, alt: str) -> str:
    """Embed a PNG in the page.

    A small one is enlarged by an integer factor with sharp pixels. Others have their printed size,
    and on a narrow screen at least two fifths of that.
    """
    width = int.from_bytes(png[16:20], "big")  # a field of the header, which every PNG begins with
    factor = ENLARGED_PIXELS // max(width, 1)
    shown = width * factor if factor > 1 else round(width * CSS_DPI / plot_style.DPI)
    least = f";min-width:{2 * shown // 5}px"
    sized = f'class="{"pixels" if factor > 1 else "picture"}" style="width:{shown}px{least}"'
    encoded = base64.b64encode(png).decode()
    return f'<img {sized} alt="{text(alt)}" src="data:image/png;base64,{encoded}">'


def code(lines: Iterable[str]) -> str:
    """Build a block of command lines from text; empty without lines."""
    inner = "\n".join(map(text, lines))
    return f'<pre tabindex="0"><code>{inner}</code></pre>' if inner else ""


def _group(name: str, rows: Sequence[Sequence[Cell]], columns: int) -> str:
    lines = [_row(row) for row in rows]
    if name:
        heading = f'<th scope="rowgroup" colspan="{columns}"><span>{text(name)}</span></th>'
        lines.insert(0, f'<tr class="group">{heading}</tr>')
    return "<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _row(cells: Sequence[Cell]) -> str:
    first, *rest = cells
    inner = "".join(map(_cell, rest))
    return f'<tr><th scope="row">{first}</th>{inner}</tr>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<td>{cell}</td>"
    return f'<td class="words" colspan="{cell[1]}">{cell[0]}</td>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
