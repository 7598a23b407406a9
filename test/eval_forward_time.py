"""Measure the speed of a network, alone and from image to label map. No data needed.

`--help` lists the flags. The same as `lednet benchmark`; the code is lednet/cli/benchmark.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("benchmark")
