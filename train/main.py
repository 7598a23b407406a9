"""Train LEDNet: the encoder on labels at 1/8 size, then the full network.

`--help` lists the flags. The same as `lednet train`; the code is lednet/cli/train.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("train")
