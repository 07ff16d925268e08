"""A finished run that tests of several commands read."""

from pathlib import Path

import pytest

from dsdistill.options import KipOptions


@pytest.fixture(scope="session")
def kip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits, two images per class. Tests that change it copy it first."""
    from dsdistill.commands.distil import run_kip

    out = tmp_path_factory.mktemp("kip") / "run"
    return run_kip(KipOptions("digits", images_per_class=2, steps=60, out=out))
