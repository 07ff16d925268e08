"""Headless Chromium on pages of this project: what it shows, asks for and complains about."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
DARK, LIGHT = "preferredColorScheme=0", "preferredColorScheme=1"
# The browser's own errands are none of the page's, and reach nobody.
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
NOBODY = "not an origin"  # who asks, where no page does


@dataclass(frozen=True)
class Seen:
    """What came of a page.

    Attributes:
        dom: After everything has run.
        console: Messages, errors of the policy among them.
        requests: Addresses that the page asked for, over any network.
    """

    dom: str
    console: list[str]
    requests: list[str]


def visit(page: Path, folder: Path, size: tuple[int, int] = (1200, 900)) -> Seen:
    """Open a page and say what was seen.

    Args:
        page: HTML file.
        folder: For the browser's files.
        size: Of the window, in pixels.
    """
    log = folder / "net.json"
    done = _run(
        folder,
        size,
        "--dump-dom",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        page.as_uri(),
    )
    console = re.findall(r"INFO:CONSOLE.*", done.stderr)
    return Seen(done.stdout, console, _requests(log))


def screenshot(page: Path, folder: Path, size: tuple[int, int], scheme: str) -> Path:
    """A PNG of the top of a page.

    Args:
        page: HTML file.
        folder: For the browser's files and the picture.
        size: Of the window, in pixels.
        scheme: `DARK` or `LIGHT`.
    """
    picture = folder / "screenshot.png"
    _run(
        folder,
        size,
        f"--screenshot={picture}",
        "--hide-scrollbars",
        f"--blink-settings={scheme}",
        page.as_uri(),
    )
    return picture


def _run(folder: Path, size: tuple[int, int], *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            f"--window-size={size[0]},{size[1]}",
            f"--user-data-dir={folder / 'profile'}",
            *QUIET,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def _requests(log: Path) -> list[str]:
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    return [e["url"] for e in asked if e.get("initiator", NOBODY) != NOBODY]
