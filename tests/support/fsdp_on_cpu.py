"""`kd` with FSDP on CPUs: Accelerate itself takes to it on GPUs alone."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from kd.cli import main
from kd.parallel import engine


class OnCpu(Accelerator):
    """An accelerator that has been told so."""

    def __init__(self, *, fsdp_plugin: Any, **options: Any) -> None:
        super().__init__(fsdp_plugin=fsdp_plugin, **options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    engine.Accelerator = OnCpu  # pyright: ignore[reportPrivateImportUsage]
    main()
