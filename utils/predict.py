"""Predict images, videos and cameras: label maps, visualizations and class shares.

`--help` lists the flags. The same as `lednet predict`; the code is lednet/cli/predict.py.
"""

from lednet.cli.main import run

if __name__ == "__main__":
    run("predict")
