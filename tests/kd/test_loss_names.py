"""The short names of losses in Python are those of the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import kd_support as support
import pytest
import torch

import kd.losses
from kd.losses import adversarial, contrastive, short_names
from kd.objectives import terms


def test_the_names_are_those_of_the_command_line() -> None:
    assert {name.replace("-", "_") for name in terms.TERMS} == set(kd.losses.__all__)
    assert sorted(kd.losses.__all__) == kd.losses.__all__
    assert set(kd.losses.__all__) <= set(dir(kd.losses))


@pytest.mark.parametrize("name", terms.TERMS)
def test_a_term_of_the_command_line_is_the_function_of_its_name(name: str) -> None:
    function = getattr(kd.losses, name.replace("-", "_"))
    # The terms hold the parameters of a memory or a discriminator too, which the losses alone do
    # not have.
    alone = {"crd": contrastive.crd, "adv": adversarial.discrimination}
    expected = alone.get(name, terms.TERMS[name].function)
    assert function is expected
    assert function.__doc__


def test_a_loss_by_its_name() -> None:
    student, teacher = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    # T = 2: KL between (p, 1 - p) and (1 - p, p) with log-odds of 1 is 2 p - 1, and T² = 4.
    p = torch.sigmoid(torch.tensor(1.0)).item()
    assert kd.losses.kd(student, teacher, temperature=2).item() == pytest.approx(4 * (2 * p - 1))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'dkdd'"):
        _ = kd.losses.dkdd  # pyright: ignore[reportAttributeAccessIssue]


def test_torch_is_imported_at_the_first_use() -> None:
    code = (
        "import sys, kd.losses; assert 'torch' not in sys.modules; kd.losses.kd; "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=support.environment())


def test_every_name_is_imported_where_type_checkers_read() -> None:
    tree = ast.parse(Path(short_names.__file__).read_text())
    imported = [a for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(alias.asname or alias.name for alias in imported) == short_names.__all__
