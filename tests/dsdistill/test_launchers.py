"""`--hosts` and the environment variables of launchers."""

import pytest

from dsdistill.harness.errors import UserError
from dsdistill.parallel import launchers


def test_notation():
    assert launchers.parse("none") is None
    assert launchers.parse("10.0.0.1:9876,0/1") is None
    arguments = launchers.parse("[fd00::1]:9876,1/3")
    assert arguments is not None
    assert arguments["coordinator_address"] == "[fd00::1]:9876"
    assert (arguments["process_id"], arguments["num_processes"]) == (1, 3)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # the batch script itself
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_cluster_is_one_that_launched_several_tasks(environment, launched):
    assert launchers._has_several_tasks(environment) is launched


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.1", "ADDRESS:PORT,INDEX/COUNT"),
        ("10.0.0.1:9876", "ADDRESS:PORT,INDEX/COUNT"),
        ("10.0.0.1,0/2", "ADDRESS:PORT,INDEX/COUNT"),
        ("10.0.0.1:9876,-1/2", "ADDRESS:PORT,INDEX/COUNT"),
        ("10.0.0.1:9876,2/2", "COUNT - 1, got 2/2"),
        ("10.0.0.1:9876,0/0", "COUNT - 1, got 0/0"),
        ("10.0.0.1:70000,0/2", "port from 1 to 65535, got 70000"),
        ("", "got ''"),
    ],
)
def test_a_wrong_text_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        launchers.parse(text)
