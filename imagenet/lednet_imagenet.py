"""Pretrain LEDNet's encoder as a classifier, on ImageNet or any folders of classes.

`--help` lists the flags. The same as `lednet pretrain`; the code is lednet/cli/pretrain.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("pretrain")
