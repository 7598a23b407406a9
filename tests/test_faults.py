"""A run that is killed, stopped and damaged ends bit-exactly like an undisturbed one.

The faults affect one run in turn: each process resumes where the last one ended. The others of
`benchmarks/faults.py` are proven in one process by tests/test_training.py.
"""

import sys
from pathlib import Path

import pytest
from fault_injection import (
    FAULTS,
    LOST,
    TORCHRUN,
    Fault,
    Site,
    complete,
    differences,
    kill_process,
    kill_worker_in_writing,
    nothing,
    suffer,
)
from make_toy_cityscapes import write_toy_cityscapes

from lednet.data.loaders import worker_failures
from lednet.errors import UserError

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds processes and sets limits as Linux does"
)

EPOCHS = 3
CHOSEN = [fault for fault in FAULTS if fault.strike not in (nothing, kill_worker_in_writing)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 training and 8 validation scenes."""
    root = tmp_path_factory.mktemp("faults") / "cityscapes"
    write_toy_cityscapes(root, 16, 8, 0, 0, width=128, height=64)
    return root


@pytest.fixture(scope="module")
def site(data, tmp_path_factory) -> Site:
    """The run that all faults affect."""
    return Site(data, tmp_path_factory.mktemp("faults") / "run", EPOCHS)


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: fault.name)
def test_run_with_a_fault_ends_as_documented(fault, site):
    outcome = suffer(site, fault, "--save-steps", 1)
    assert not outcome.problems, outcome.ended.text


def test_run_after_all_faults_equals_an_undisturbed_one(site, data, tmp_path):
    reference = Site(data, tmp_path / "reference", EPOCHS)
    complete(reference)
    complete(site)
    assert differences(site, reference) == []


def test_worker_failures_reports_only_dead_processes():
    for dead in (RuntimeError("DataLoader worker (pid 7) is killed"), ConnectionResetError()):
        with pytest.raises(UserError, match="a loading process died"), worker_failures():
            raise dead
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    with pytest.raises(RuntimeError, match="Caught"), worker_failures():
        raise error


def test_torchrun_restarts_a_killed_process(data, tmp_path):
    site = Site(data, tmp_path / "run", 2)
    fault = Fault("", kill_process, 0, LOST, launcher=TORCHRUN)
    outcome = suffer(site, fault, "--decoder", "--save-steps", 1)
    assert not outcome.problems, outcome.ended.text
    assert "resuming decoder after epoch" in outcome.ended.text
    assert [record["epoch"] for record in site.records()] == [1, 2]
