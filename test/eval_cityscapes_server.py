"""Score a network as the Cityscapes benchmark does, and write the upload.

`--help` lists the flags. The same as `lednet evaluate-cityscapes`; the code is
lednet/cli/evaluate_cityscapes.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("evaluate_cityscapes")
