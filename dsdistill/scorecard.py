"""`dsdistill evaluate`: the only place where the distillation meets learners of both frameworks."""

import platform
import shlex
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dsdistill.harness import artifact, controls, datasets, lists, progress, report, runs
from dsdistill.harness.artifact import Distilled
from dsdistill.harness.datasets import Splits
from dsdistill.harness.errors import UserError
from dsdistill.harness.evaluate import Arm, Learner, Row, evaluate
from dsdistill.harness.labeled import Examples
from dsdistill.options import Evaluate

VALIDATION = 0.1  # for a set that held no validation images out itself


def run(options: Evaluate) -> Path:
    """Evaluate a distilled set, print the comparison, and return the folder of the report.

    Raises:
        UserError: For input that breaks a rule, before anything is trained.
    """
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    file = artifact.locate(options.run)
    distilled = artifact.load(file)
    learners = [_learner(name, distilled) for name in lists.names("--learners", options.learners)]
    splits = _splits(distilled, options.data_root)
    arms = _arms(distilled, splits, lists.names("--controls", options.controls, empty=True))
    out = options.out or runs.next_free("evaluation", file.parent)
    runs.check_free(out, "report.json")
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(learners, arms, splits, distilled, list(range(options.seeds)))
    report.write(out, rows, _facts(options, distilled, splits, rows))
    _print(rows, out)
    return out


def _rows(
    learners: list[Learner],
    arms: list[Arm],
    splits: Splits,
    distilled: Distilled,
    seeds: list[int],
) -> list[Row]:
    validation = Examples(splits.validation, distilled.preprocess)
    test = Examples(splits.test, distilled.preprocess)
    done, rows = 0, []
    with progress.bar(len(learners) * len(arms) * len(seeds), unit="trainings") as show:
        for learner in learners:
            for arm in arms:

                def on_seed(accuracy: float) -> None:
                    nonlocal done
                    done += 1
                    show(done, accuracy=accuracy)

                rows.append(evaluate(learner, arm, validation, test, seeds, on_seed=on_seed))
    return rows


def _arms(distilled: Distilled, splits: Splits, names: list[str]) -> list[Arm]:
    train = Examples(splits.train, distilled.preprocess)
    images_per_class = max(len(distilled) // len(distilled.classes), 1)
    examples = distilled.examples()
    return [
        Arm("distilled", lambda seed: examples),
        *(controls.arm(name, train, images_per_class) for name in names),
    ]


def _learner(name: str, distilled: Distilled) -> Learner:
    if name == "ridge":
        from dsdistill import ridge
        from dsdistill.kernels import networks

        config = distilled.provenance["config"]
        first = lists.names("--kernel", config["kernel"])[0]  # of several, the one that judged
        std = {name: config[name] for name in ("w_std", "b_std") if name in config}
        network = networks.parse(first, config["depth"], **std)
        return ridge.Ridge(network, distilled.provenance["evaluation_ridge"])
    from kd.learners import learner

    return learner(name)


def _splits(distilled: Distilled, root: Path) -> Splits:
    """The data set that the set was made from, split as it was then."""
    data, config = distilled.provenance["data"], distilled.provenance["config"]
    splits = datasets.load(
        data["source"],
        root=root,
        image_size=config["image_size"],
        validation_fraction=config["validation_fraction"] or VALIDATION,
    )
    if splits.train.classes != distilled.classes:
        raise UserError(
            f"the distilled set has {len(distilled.classes)} classes, {data['source']} has "
            f"{len(splits.train.classes)}, or they differ in name or order"
        )
    if splits.digest != data["sha256"]:
        raise UserError(f"{data['source']} is not the data the set was made from: it has changed")
    return splits


def _facts(
    options: Evaluate, distilled: Distilled, splits: Splits, rows: list[Row]
) -> dict[str, Any]:
    made = distilled.provenance
    again = ["dsdistill", "evaluate", str(options.run), "--learners", options.learners]
    again += ["--controls", options.controls, "--seeds", str(options.seeds)]
    return {
        "title": f"{made['method']} on {splits.name}, {len(distilled)} images",
        "notes": _notes(distilled, splits, rows),
        "commands": [_distil_command(made), shlex.join(again)],
        "distilled": {
            name: made[name] for name in ("method", "kernel", "data", "seconds", "metrics")
        },
        "machine": platform.platform(),
        "versions": made["versions"]
        | {name: metadata.version(name) for name in ("torch", "scikit-learn")},
    }


def _notes(distilled: Distilled, splits: Splits, rows: list[Row]) -> list[str]:
    made = distilled.provenance
    spent = progress.clock(made["seconds"])
    notes = [f"Distilled in {spent} with the kernel {made['kernel']}; the stored labels are used."]
    limited = [row for row in rows if row.data == "full" and row.images < len(splits.train)]
    return notes + [
        f"{row.learner} on full data: a class-balanced draw of {row.images} of "
        f"{len(splits.train)} images, since its exact solution of all needs too much memory."
        for row in limited
    ]


def _distil_command(made: Mapping[str, Any]) -> str:
    """The command line that makes the set again; options that have their default are left out."""
    from dsdistill.options import Kip, LabelSolve, settled

    defaults = vars(LabelSolve())
    if made["method"] == "kip":
        optimizer = made["config"].get("optimizer", Kip.optimizer)
        defaults = vars(settled(Kip(optimizer=optimizer))) | {"optimizer": Kip.optimizer}
    words = ["dsdistill", made["method"], shlex.quote(str(made["config"]["data"]))]
    for name, value in {**made["config"], **made["config"].get(runs.CHOSEN, {})}.items():
        if name not in defaults or name == "data" or value == defaults.get(name):
            continue
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, shlex.quote(str(value))]
    return " ".join(words)


def _print(rows: list[Row], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*report.COLUMNS)
    for row in rows:
        table.add_row(*report.cells(row))
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"report: {out / 'report.md'}")
