"""Find the hosts that work together: from `--hosts`, or from the launcher of this command."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from dsdistill.harness.errors import UserError


def parse(hosts: str | None) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None for a single host.

    Args:
        hosts: `10.0.0.1:9876,0/2` for the first of two hosts, which listens at this address;
            `none` for a single host; None: JAX detects the hosts if several tasks were launched.

    Raises:
        UserError: If the text has another form.
    """
    if hosts is None:
        return {} if _has_several_tasks(os.environ) else None
    if hosts == "none":
        return None
    match = re.fullmatch(r"(\S+):([0-9]+),([0-9]+)/([0-9]+)", hosts)
    if not match:
        raise UserError(
            "--hosts must be ADDRESS:PORT,INDEX/COUNT, such as 10.0.0.1:9876,0/2 on the first of "
            f"two hosts, or none, got {hosts!r}"
        )
    port, index, count = map(int, match.groups()[1:])
    if not 0 < port < 2**16:
        raise UserError(f"--hosts needs a port from 1 to 65535, got {port}")
    if index >= count:
        raise UserError(f"--hosts: INDEX must be from 0 to COUNT - 1, got {index}/{count}")
    if count == 1:
        return None
    return {
        "coordinator_address": f"{match[1]}:{port}",
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _has_several_tasks(environment: Mapping[str, str]) -> bool:
    """Whether several tasks of this command were launched, judged only by the environment.

    Where this is True, JAX's own detection follows. That one asks the network in some places and
    takes a single task for a cluster, so a plain container could not run anything.
    """
    counts = (environment.get(n) for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if any(count not in (None, "1") for count in counts):
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    # A Kubernetes Job; without this package JAX cannot ask it for its pods.
    return "JOB_COMPLETION_INDEX" in environment and bool(importlib.util.find_spec("kubernetes"))
