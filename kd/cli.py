"""The command `kd`: parse, run, print. Frameworks are imported inside the commands."""

import json
import os
import sys

from dsdistill.harness import command_line
from dsdistill.harness.text import printable
from kd.options import (
    AugmentOptions,
    EvaluateOptions,
    ExportOptions,
    FeaturesOptions,
    QuantizeOptions,
    ReportOptions,
    SynthesizeOptions,
    TrainOptions,
)
from kd.runs.printed_figures import chosen_figures, print_figures


def _train(options: TrainOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import train
    from kd.runs import run_options

    options = train.resolve(options)
    try:
        report = train.run(options)
    except KeyboardInterrupt as error:
        assert options.out is not None
        message = (
            f"kd: interrupted; continue with `{run_options.resume_line(options.out, options)}`"
        )
        if not (options.out / "config.json").exists():
            message = "kd: interrupted; the same line goes on with what is finished"
        if int(os.environ.get("RANK", "0")) > 0:
            raise SystemExit(1) from error  # the first of several processes says it
        raise SystemExit(printable(message)) from error
    if not report:  # another process writes, and prints
        return
    if report["note"]:
        print(printable(f"kd: {report['note']}"), file=sys.stderr)
    print_figures({"folder": str(options.out), **chosen_figures(report)})


def _evaluate(options: EvaluateOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands.evaluate import evaluate

    found = evaluate(options)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_figures({k: v for k, v in found.items() if k != "notes"})  # these are said


def _export(options: ExportOptions) -> None:
    from kd.commands.export import export

    found = export(options)
    if found["note"]:
        kind = "images" if "random_images" in found else "tokens"
        print(printable(f"kd: compared on random {kind} only: {found['note']}"), file=sys.stderr)
    rounded = {name: f"{found[name]:.2g}" for name in ("largest_difference", "tolerance")}
    fields = (name for name in _EXPORT_FIELDS if name in found)
    print_figures({name: rounded.get(name, found[name]) for name in fields})


def _quantize(options: QuantizeOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import quantize

    report = quantize.quantize(options)
    print_figures({"folder": report["folder"], **chosen_figures(report)})


def _synthesize(options: SynthesizeOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import synthesize

    print_figures(synthesize.synthesize(options))


def _features(options: FeaturesOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import features

    print_figures(features.run(options))


def _augment(options: AugmentOptions) -> None:
    options.check()  # before the seconds that importing torch takes
    from kd.commands import augment

    if options.preview is None:
        print_figures(augment.write(options))
    else:
        print("\n".join(augment.preview(options)))


def _report(options: ReportOptions) -> None:
    from dsdistill.harness.files import write_bytes
    from kd.commands import report

    text = report.render(options.runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out, text.encode())
    print(printable(str(options.out)))


_EXPORT_FIELDS = (
    "written",
    "largest_difference",
    "tolerance",
    "argmax_agreement",
    "random_images",
    "real_images",
    "texts",
    "lengths",
    "data",
)


COMMANDS: command_line.Commands = {
    "train": (TrainOptions, _train),
    "evaluate": (EvaluateOptions, _evaluate),
    "quantize": (QuantizeOptions, _quantize),
    "synthesize": (SynthesizeOptions, _synthesize),
    "export": (ExportOptions, _export),
    "features": (FeaturesOptions, _features),
    "augment": (AugmentOptions, _augment),
    "report": (ReportOptions, _report),
}


def main() -> None:
    """Run the command that the user typed."""
    description = "Train a small student from labels or from a large teacher, and judge it."
    command_line.main("kd", description, COMMANDS, "interrupted")
