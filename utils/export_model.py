"""Export a network to a file that runs without this repository, and check its outputs.

`--help` lists the flags. The same as `lednet export`; the code is lednet/cli/export.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("export")
