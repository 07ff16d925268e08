"""Write the files of a report: for programs, for readers, and every plot by itself.

plots/        every plot as PNG and SVG
report.md     the tables
report.html   one page with everything, which needs nothing else
report.json   all results; written last, so that a folder with it is complete
"""

from dataclasses import asdict
from pathlib import Path

from dsdistill.harness import files
from dsdistill.harness.reports import gallery, markdown, page, plot_style
from dsdistill.harness.reports.report import FILE_NAME, FORMAT_VERSION, IMAGES_FILE, Report


def write_report(folder: Path, report: Report) -> None:
    """Write the plots, the two readable reports and, last, `report.json`.

    Args:
        folder: Exists; its `images.png` is shown in the page.
        report: The report of one evaluation.
    """
    (folder / "plots").mkdir(exist_ok=True)
    for name, figure in gallery.figures(report).items():
        files.write_bytes(folder / "plots" / f"{name}.png", plot_style.png(figure))
        files.write_bytes(folder / "plots" / f"{name}.svg", plot_style.svg_file(figure))
    picture = folder / IMAGES_FILE
    shown = {"Distilled images beside real ones": picture.read_bytes()} if picture.exists() else {}
    text = page.render([report], title=report.title, pictures=shown)
    files.write_bytes(folder / "report.html", text.encode())
    files.write_bytes(folder / "report.md", markdown.render(report).encode())
    stored = {"format": FORMAT_VERSION, **asdict(report)}
    files.write_json(folder / FILE_NAME, stored, compact_numbers=True)
