"""A run that is killed, stopped, starved and damaged ends as one that was left alone.

The faults strike one run in turn: each process goes on where the last one was struck down, and
the end is compared. `benchmarks/faults.py` tries them one by one, and more of them.
"""

import sys
from pathlib import Path

import pytest
from fault_injection import (
    FAULTS,
    LOST,
    SABOTAGE,
    TORCHRUN,
    Fault,
    Site,
    complete,
    cut_image,
    differences,
    kill_process,
    suffer,
)
from make_toy_cityscapes import write_toy_cityscapes

from lednet.data.loaders import worker_failures
from lednet.errors import UserError

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds processes and sets limits as Linux does"
)

EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 training and 8 validation scenes."""
    root = tmp_path_factory.mktemp("faults") / "cityscapes"
    write_toy_cityscapes(root, 16, 8, 0, 0, width=128, height=64)
    return root


@pytest.fixture(scope="module")
def site(data, tmp_path_factory) -> Site:
    """Where the run takes place that all faults strike."""
    return Site(data, tmp_path_factory.mktemp("faults") / "run", EPOCHS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_run_ends_as_it_should(fault, site):
    outcome = suffer(site, fault, "--save-steps", 1)
    assert not outcome.problems, outcome.ended.text


def test_end_is_as_if_nothing_had_happened(site, data, tmp_path):
    reference = Site(data, tmp_path / "reference", EPOCHS)
    complete(reference)
    complete(site)
    assert differences(site, reference) == []


def test_only_dead_loading_processes_are_called_dead():
    for dead in (RuntimeError("DataLoader worker (pid 7) is killed"), ConnectionResetError()):
        with pytest.raises(UserError, match="a loading process died"), worker_failures():
            raise dead
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    with pytest.raises(RuntimeError, match="Caught"), worker_failures():
        raise error


def test_what_may_be_skipped_is_skipped_and_counted(data, tmp_path):
    site = Site(data, tmp_path / "run", 2)
    flags = ("--decoder", "--save-steps", 1, "--skip-bad-steps", "--skip-corrupt")
    fault = Fault("", cut_image, 0, script=(SABOTAGE, "nan", 2))
    outcome = suffer(site, fault, *flags)
    assert not outcome.problems, outcome.ended.text
    first, second = site.records()
    assert first["skipped"] == 1 and "skipped" not in second
    assert second["damaged"] == 1
    assert "damaged and replaced by others: " in outcome.ended.text


def test_torchrun_starts_killed_processes_again(data, tmp_path):
    site = Site(data, tmp_path / "run", 2)
    fault = Fault("", kill_process, 0, LOST, launcher=TORCHRUN)
    outcome = suffer(site, fault, "--decoder", "--save-steps", 1)
    assert not outcome.problems, outcome.ended.text
    assert "resuming decoder after epoch" in outcome.ended.text
    assert [record["epoch"] for record in site.records()] == [1, 2]
