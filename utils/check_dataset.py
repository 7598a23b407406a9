"""Inspect every file of a data set and report what is wrong with it.

`--help` lists the flags. The same as `lednet check`; the code is lednet/cli/check.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("check")
