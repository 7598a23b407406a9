"""Output that cannot be written: closed pipes and terminals, encodings, full memory."""

import os
import pty
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lednet.errors import exit_on_user_error
from lednet.io import write_text
from lednet.training.run_dir import RunDir

SCRIPT = """
import os, sys
from lednet.errors import exit_on_user_error
with exit_on_user_error():
    sys.stdin.read()
    for _ in range(3):
        print("first", flush=True)
        print("second", file=sys.stderr)
    print("last")
    os.write(3, b"done")
"""


def run(stdout: int, stderr: int, close=lambda: None, **env) -> tuple[int, bytes]:
    """Status of the script whose output goes to the given files, and what it wrote to a third."""
    ours, theirs = os.pipe()

    def third_file() -> None:
        os.dup2(theirs, 3)

    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
        cwd=ROOT, env={**os.environ, **env}, preexec_fn=third_file, pass_fds=(3,),
    )  # fmt: skip
    os.close(theirs)
    close()
    process.communicate()
    with os.fdopen(ours, "rb") as pipe:
        return process.returncode, pipe.read()


def test_closed_pipe_and_terminal_do_not_end_the_work():
    reader, writer = os.pipe()
    main, terminal = pty.openpty()

    def close() -> None:
        for number in (reader, writer, main, terminal):
            os.close(number)

    assert run(writer, terminal, close) == (0, b"done")


def test_full_disk_is_still_an_error():
    with open("/dev/full", "w") as full:
        assert run(full.fileno(), subprocess.DEVNULL) == (1, b"")


def test_letters_outside_the_encoding_are_codes(tmp_path):
    code = "from lednet.errors import *\nwith exit_on_user_error(): print('é\\udcff')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\\xe9\\udcff\n", "")
    run_dir = RunDir(tmp_path / "run")
    write_text(tmp_path / "a.txt", "é\udcff")
    with exit_on_user_error():
        run_dir.log("é\udcff")
    for path in (tmp_path / "a.txt", tmp_path / "run/log.txt"):
        assert path.read_text(encoding="utf-8").strip() == "é\\udcff"


def fill_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: torch.empty(2**55, dtype=torch.uint8), "the memory is full: reduce --batch-size"),
        (lambda: bytearray(2**60), "the memory is full"),
        (fill_gpu, "the memory of the GPU is full"),
    ],
)
def test_full_memory_is_a_sentence(capsys, work, words):
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        work()
    assert stop.value.code == 2 and words in capsys.readouterr().err
