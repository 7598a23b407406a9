"""Score weights on a data set: IoU of each class, mIoU, pixel accuracy.

`--help` lists the flags. The same as `lednet evaluate`; the code is lednet/cli/evaluate.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("evaluate")
