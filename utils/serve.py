"""Serve the live page on this machine: the network in a browser tab.

`--help` lists the flags. The same as `lednet serve`; the code is lednet/cli/serve.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("serve")
