"""The pages of `--help`: what people read is complete, true and short enough."""

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tyro

import dsdistill.cli
import kd.cli
from dsdistill.harness import command_line, help_page
from dsdistill.options import OPTIMIZER_DEFAULTS, KipOptions, with_defaults
from kd import recipe, recipes
from kd.options import Overrides, TrainOptions

PROGRAMS = {"dsdistill": dsdistill.cli.COMMANDS, "kd": kd.cli.COMMANDS}
CASES = [
    pytest.param(program, name, options, id=f"{program}-{name}")
    for program, commands in PROGRAMS.items()
    for name, (options, _) in commands.items()
]
every_command = pytest.mark.parametrize(("program", "name", "options"), CASES)
MOST_PER_GROUP = 12


def parse(monkeypatch: pytest.MonkeyPatch, program: str, words: list[str]) -> Any:
    classes = {name: options for name, (options, _) in PROGRAMS[program].items()}
    monkeypatch.setattr(sys, "argv", [program, *words])
    return command_line._parse(program, "", classes)


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name(program), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(params=[80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@every_command
def test_a_page_is_for_people(program: str, name: str, options: type, width: int) -> None:
    page = help_page.render_command(f"{program} {name}", options)
    assert "None" not in page
    assert "{" not in page
    assert max(map(len, page.splitlines())) <= width
    assert page.startswith(f"usage: {program} {name} ")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_lists_its_commands_with_one_line_each(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    classes = {name: options for name, (options, _) in PROGRAMS[program].items()}
    page = help_page.render_program(program, "What it is for.", classes)
    for name in classes:
        (line,) = re.findall(rf"^  {name} +\S.*$", page, re.MULTILINE)
        assert len(line) <= 100
    assert len(page.splitlines()) < 25


@every_command
def test_groups_are_short_and_hold_every_option_once(
    program: str, name: str, options: type
) -> None:
    groups = [names.split() for names in vars(options)["LAYOUT"].groups.values()]
    assert max(map(len, groups)) <= MOST_PER_GROUP
    listed = [name for group in groups for name in group]
    with_flags = [option.name for option in help_page.read_options(options) if option.flag]
    assert sorted(listed) == sorted(with_flags)
    assert set(vars(options)["LAYOUT"].notes) <= set(vars(options)["LAYOUT"].groups)


@every_command
def test_a_page_has_the_flags_that_the_parser_takes(program: str, name: str, options: type) -> None:
    box = io.StringIO()
    commands: dict[str, Any] = {name: options, "another": KipOptions}
    with contextlib.redirect_stdout(box), pytest.raises(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            commands, args=[name, "--help"], config=(tyro.conf.FlagCreatePairsOff,)
        )
    parsed = set(re.findall(r"^\W (?:-h, )?(--[a-z-]+)", box.getvalue(), re.MULTILINE))
    page = help_page.render_command(f"{program} {name}", options)
    assert set(re.findall(r"^  (--[a-z-]+)", page, re.MULTILINE)) == parsed - {"--help"}


@every_command
def test_examples_can_be_parsed(
    program: str, name: str, options: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = vars(options)["LAYOUT"].examples
    assert 1 <= len(examples) <= 2
    for example in examples:
        first, *words = shlex.split(example)
        assert (first, words[0]) == (program, name)
        assert type(parse(monkeypatch, program, words)) is options


@every_command
def test_every_choice_is_shown_or_explained(program: str, name: str, options: type) -> None:
    shown = {option.name: option for option in help_page.read_options(options)}
    for field_name, choices in literals(options):
        option = shown[field_name]
        for choice in choices:
            assert re.search(rf"\b{choice}\b", f"{option.metavar} {option.text}"), option.flag


def literals(options: type) -> Iterator[tuple[str, tuple[Any, ...]]]:
    hints = help_page.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint, _ = help_page._split(hints[field.name])
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from literals(hint)
        elif get_origin(hint) is Literal:
            yield field.name, get_args(hint)


@every_command
def test_a_default_that_is_typed_changes_nothing(
    program: str, name: str, options: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all options whose default is a value, and not a sentence about others."""
    fields = {field.name for field in dataclasses.fields(options)}
    known = [option for option in help_page.read_options(options) if option.name in fields]
    start = [name]
    for option in known:
        if option.required:
            choice = (option.metavar or "").split("|")[0]
            start += [option.flag, choice] if option.flag else ["RUN"]
    plain = parse(monkeypatch, program, start)
    typed = 0
    for option in known:
        value = getattr(plain, option.name)
        if not option.flag or not option.default or value is None:
            continue
        shown = (
            str(Path(option.default).expanduser()) if isinstance(value, Path) else option.default
        )
        again = getattr(parse(monkeypatch, program, [*start, option.flag, shown]), option.name)
        # A float is shown with six digits.
        assert again == (pytest.approx(value, 1e-5) if isinstance(value, float) else value)
        typed += 1
    assert typed or name in ("export", "inspect", "cache")


@pytest.mark.parametrize("optimizer", OPTIMIZER_DEFAULTS)
def test_defaults_of_the_optimizer_are_those_used(optimizer: Any) -> None:
    used = with_defaults(KipOptions(optimizer=optimizer))
    shown = {option.name: option.default for option in help_page.read_options(KipOptions)}
    for name in OPTIMIZER_DEFAULTS[optimizer]:
        assert f"{help_page.format_default(getattr(used, name))} with {optimizer}" in shown[name]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", [field.name for field in recipe.OPTIONS])
def test_defaults_of_the_recipe_are_those_used(
    name: str, distilled: bool, layer_norm: bool
) -> None:
    used = getattr(recipes.default(distilled=distilled, layer_norm=layer_norm), name)
    (shown,) = (o.default for o in help_page.read_options(Overrides) if o.name == name)
    value = help_page.format_default(used)
    if ";" in shown and value:
        assert re.search(rf"(^|[ ;]){re.escape(value)}($|[ ;,])", shown), shown
    elif value:
        assert shown == value


def test_defaults_that_are_set_elsewhere_are_those_used() -> None:
    from dsdistill.commands import prepare
    from dsdistill.harness.data import origin
    from dsdistill.kernels import networks
    from dsdistill.loops import plan
    from dsdistill.options import EvaluateOptions, LabelSolveOptions
    from kd.assembly import training_parts
    from kd.training import steps

    def read(options: type) -> dict[str, help_page.Option]:
        return {option.name: option for option in help_page.read_options(options)}

    kip, train, evaluate = read(KipOptions), read(TrainOptions), read(EvaluateOptions)
    count = str(prepare.DEFAULT_IMAGES_PER_CLASS)
    assert kip["images_per_class"].default.startswith(f"{count}, or the size of the set")
    assert read(LabelSolveOptions)["images_per_class"].default == count
    assert prepare.WARM_UP_DIVISOR == 4
    assert "a quarter of --steps" in kip["warm_up"].text
    assert plan.VALIDATIONS_PER_PHASE == 40
    assert "forty" in kip["patience"].text
    depths = {name: depth for name, (_, depth) in networks._BUILDERS.items() if depth}
    assert depths == {"fc": 1, "conv": 1, "convnet": 3, "myrtle": 5}
    assert kip["depth"].default == "fc and conv 1, convnet 3, myrtle 5"
    assert (
        f"{recipes.SMALL.steps}, for kip-convnet and kip-fc {recipes.KIP.steps}"
        in evaluate["steps"].default
    )
    assert train["validation_fraction"].default == f"{origin.DEFAULT_VALIDATION_FRACTION:g}"
    assert train["student"].default.startswith(f"{training_parts.DEFAULT_STUDENT},")
    assert f"{recipes.TEACHER_LOSS} with a teacher" in train["loss"].default
    assert f"{recipes.MUTUAL_LOSS} with --peers" in train["loss"].default
    assert f"at most {steps.VALIDATIONS} validations" in train["validate_every"].default
    assert train["workers"].default == str(TrainOptions().readers)
    assert all(name in train["recipe"].text for name in recipes.NAMED)


def test_a_recipe_is_what_its_page_says() -> None:
    """A field that is given, with the value that the page shows, gives the same recipe."""
    shown = {option.name: option.default for option in help_page.read_options(Overrides)}
    plain = recipes.default(distilled=False, layer_norm=False)
    for name, default in shown.items():
        value = getattr(plain, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = re.findall(r"[0-9.]+", default.split("else ")[-1])[0]
            assert replace(plain, **{name: type(value)(number)}) == plain, name


@pytest.mark.heavy
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_real_command_prints_its_pages_and_its_version(program: str) -> None:
    for words in (["--help"], ["-h"], ["report", "RUN", "--help"]):
        done = run(program, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: {program} ")
    done = run(program, "--version")
    assert re.fullmatch(rf"{program} \d+\.\d+\.\d+\S*\n", done.stdout)
    assert done.returncode == 0


def test_a_page_of_which_only_the_start_is_read_is_no_error() -> None:
    command = Path(sys.executable).with_name("dsdistill")
    line = f"set -o pipefail; {command} kip --help | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kip --steps x", "--steps takes a whole number, got 'x'"),
        ("kip --ridge small", "--ridge takes a number, got 'small'"),
        ("evaluate RUN --mean a", "--mean takes numbers, got 'a'"),
        ("kip --channels 2", "invalid choice '2' for argument '--channels'"),
        ("evaluate", "Missing from dsdistill evaluate: Folder of a run"),
        ("kip --depth", "Missing value for argument '--depth'. Expected 1 values"),
    ],
)
def test_an_error_speaks_of_values_and_not_of_types(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, "dsdistill", words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dsdistill: {message}")
    assert "None" not in line
    assert "did you mean" not in line


def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(run("dsdistill", "--tyro-print-completion", "bash").stdout)
    ask = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
$(complete -p dsdistill | sed 's/.*-F \\([^ ]*\\).*/\\1/')
echo "${COMPREPLY[@]}"
"""

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", ask, "bash", str(script), "dsdistill", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("ki") == ["kip"]
    assert complete("kip", "--learning") == ["--learning-rate"]
    assert complete("kip", "--optimizer", "g") == ["gauss-newton"]


@pytest.mark.parametrize("word", ["none", "None"])
def test_an_evaluation_can_do_without_a_cache(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsdistill.commands import evaluate
    from dsdistill.parallel import devices

    chosen: list[Any] = []
    monkeypatch.setattr(evaluate, "run", chosen.append)
    monkeypatch.setattr(devices, "use_all", lambda: None)  # for a process without JAX's devices yet
    options = parse(monkeypatch, "dsdistill", ["evaluate", "RUN", "--cache", word])
    dsdistill.cli.evaluate(options)
    assert chosen[0].cache is None
