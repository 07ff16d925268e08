"""An empty value on the command line, as an unset variable of the shell gives it, is refused."""

import sys

import pytest

import dsdistill.cli
import kd.cli

COMMANDS = {"kd": kd.cli.main, "dsdistill": dsdistill.cli.main}


@pytest.mark.parametrize(
    ("line", "after"),
    [
        (["kd", "train", "digits", "--teacher", ""], "--teacher"),
        (["kd", "train", "digits", "--teacher", " "], "--teacher"),
        (["kd", "train", "digits", "--teacher="], "--teacher"),
        (["kd", "train", "digits", "--loss", "", "--out", "run"], "--loss"),
        (["kd", "train", "digits", "--student", ""], "--student"),
        (["kd", "train", "digits", "--data_root", ""], "--data-root"),
        (["kd", "train", ""], "'train'"),
        (["kd", "evaluate", "run", ""], "'run'"),
        (["kd", "evaluate", "run", "--teacher", ""], "--teacher"),
        (["kd", "export", "run", "--format", "onnx", "--out", ""], "--out"),
        (["kd", "report", ""], "'report'"),
        (["dsdistill", "ls", ""], "'ls'"),
        (["dsdistill", "kip", "digits", "--init", ""], "--init"),
        (["dsdistill", "evaluate", "set", "--learners", ""], "--learners"),
        (["dsdistill", "evaluate", "set", "--data", ""], "--data"),
        (["dsdistill", "inspect", ""], "'inspect'"),
    ],
    ids=" ".join,
)
def test_an_empty_value_is_refused_in_one_line(
    line: list[str],
    after: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[line[0]]()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{line[0]}: an empty value after {after} ")
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_option_whose_empty_value_says_something_keeps_it(dsdistill) -> None:
    done = dsdistill("evaluate", "nothing", "--controls", "")
    assert (done.returncode, done.stderr) == (1, "dsdistill: no distilled set at nothing\n")
