"""A run that is killed, stopped and damaged ends bit-exactly like an undisturbed one.

The faults affect one run in turn: each process resumes where the last one ended. The others of
`benchmarks/faults.py` are proven in one process by tests/test_training.py.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
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
from lednet.errors import UserError, exit_on_user_error

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds processes and sets limits as Linux does"
)

EPOCHS = 3
ELSEWHERE = (nothing, kill_worker_in_writing)
CHOSEN = [fault for fault in FAULTS if fault.strike not in ELSEWHERE]


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
    for full in (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_7>"),
    ):
        with pytest.raises(UserError, match="/dev/shm is too small"), worker_failures():
            raise full
        with pytest.raises(SystemExit), exit_on_user_error():
            raise full
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    with pytest.raises(RuntimeError, match="Caught"), worker_failures():
        raise error


SCRIPT = """
import os, signal, sys
from lednet.cli.common import print_help_early
print_help_early(None)
if sys.argv[1] == "import":
    signal.raise_signal(signal.SIGINT)
from lednet.errors import exit_on_user_error
with exit_on_user_error():
    if sys.argv[1] == "child":
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
        print(os.waitpid(child, 0)[1], file=sys.stderr, end=" ")
    signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("moment", "text"),
    [("import", "interrupted\n"), ("work", "interrupted\n"), ("child", "0 interrupted\n")],
)
def test_script_interrupted_at_any_moment_ends_in_a_line(moment, text):
    command = [sys.executable, "-c", SCRIPT, moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, text)


def test_script_in_the_background_keeps_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with exit_on_user_error():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_torchrun_restarts_a_killed_process(data, tmp_path):
    site = Site(data, tmp_path / "run", 2)
    fault = Fault("", kill_process, 0, LOST, launcher=TORCHRUN)
    outcome = suffer(site, fault, "--decoder", "--save-steps", 1)
    assert not outcome.problems, outcome.ended.text
    assert "resuming decoder after epoch" in outcome.ended.text
    assert [record["epoch"] for record in site.records()] == [1, 2]
