"""`kd features`: the features of all images of a data set through a trained network, in one file.

The file is described in `dsdistill.harness.data.feature_file`; the commands of `dsdistill` read it
as any data set.
"""

from pathlib import Path
from typing import Any

from dsdistill.harness import shell, stopping
from dsdistill.harness.data import datasets
from dsdistill.harness.runs import progress
from kd.data.files import image_files
from kd.data.files.image_files import ImageFiles
from kd.evaluation import backbones, extraction, image_sets
from kd.evaluation.extraction import Extraction
from kd.models import network_names
from kd.options import FeaturesOptions


def run(options: FeaturesOptions) -> dict[str, Any]:
    """Extract the features; return figures to print.

    Raises:
        UserError: If data or backbone are missing, do not fit together, or the file exists.
    """
    backbones.check_name(options.student)
    path, device = options.out or _default_path(options), backbones.device(options.device)
    images = image_sets.load(options.data, root=options.data_root)
    typed = network_names.names_in(options.student, options.trust_module)
    backbone = backbones.load(
        options.student,
        options.layer,
        images.shape,
        image_size=options.image_size,
        convertible=isinstance(images.store, ImageFiles),
        typed=typed,
    ).to(device)
    if isinstance(images.store, ImageFiles) and backbone.model.shape[2] == 3:
        gray = image_files.describe_gray(Path(options.data).expanduser(), images.store)
        if gray is not None:
            progress.note(gray.partition(";")[0])  # what follows is an option of `kd train`
    what = Extraction(
        images,
        backbone,
        device,
        datasets.absolute_name(options.data),
        options.views,
        options.min_scale,
        options.hflip,
        options.seed,
        options.batch_size,
        options.readers,
    )
    given = {name: value for name, value in vars(options).items() if name != "data"}
    command = shell.line(
        "kd features", given | {"out": path, "resume": True}, _defaults(), options.data
    )
    with stopping.explain_stop(command, path):
        figures = extraction.write(path, what, resume=options.resume)
    return {
        "file": str(path),
        "values_of_each": backbone.width,
        "training_images": images.counts[0],
        "validation_images": images.counts[1],
        "test_images": images.counts[2],
        "views": options.views,
        **figures,
    }


def _default_path(options: FeaturesOptions) -> Path:
    """`features-<data>-<backbone>.npz` in the current folder."""
    name = Path(options.student).name.replace(":", "-").replace("/", "-")
    return Path(f"features-{Path(options.data).stem}-{name}.npz")


def _defaults() -> dict[str, Any]:
    return vars(FeaturesOptions(data="", student=""))
