"""Which hosts work together: as the user wrote it, or as the launcher of this command says."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from dsdistill.harness.errors import UserError


def parse(hosts: str | None) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None for a host on its own.

    Args:
        hosts: `10.0.0.1:9876,0/2` for the first of two hosts, which listens at this address;
            `none` for a host on its own; None: as JAX detects, where several tasks were launched.

    Raises:
        UserError: For any other text.
    """
    if hosts is None:
        return {} if _has_several_tasks(os.environ) else None
    if hosts == "none":
        return None
    found = re.fullmatch(r"(\S+):([0-9]+),([0-9]+)/([0-9]+)", hosts)
    if not found:
        raise UserError(
            "--hosts must be ADDRESS:PORT,INDEX/COUNT, such as 10.0.0.1:9876,0/2 on the first of "
            f"two hosts, or none, got {hosts!r}"
        )
    port, index, count = map(int, found.groups()[1:])
    if not 0 < port < 2**16:
        raise UserError(f"--hosts needs a port from 1 to 65535, got {port}")
    if index >= count:
        raise UserError(f"--hosts: INDEX counts from 0 and is below COUNT, got {index}/{count}")
    if count == 1:
        return None
    return {
        "coordinator_address": f"{found[1]}:{port}",
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _has_several_tasks(environment: Mapping[str, str]) -> bool:
    """Whether several tasks of this command were launched, by the environment alone.

    JAX's own detection follows where this holds. It asks the network in some places and takes a
    lone task for a cluster, so that a plain container could not run anything.
    """
    counts = (environment.get(n) for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if any(count not in (None, "1") for count in counts):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # A Kubernetes Job; without this package JAX cannot ask it for its pods.
    return "JOB_COMPLETION_INDEX" in environment and bool(importlib.util.find_spec("kubernetes"))
