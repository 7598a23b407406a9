"""Recipes: what they may hold, and what wins over what."""

import argparse
import json
from pathlib import Path

import pytest
from conftest import ROOT

from lednet import UserError
from lednet.cli.train_args import add_recipe_flags, parse_flags
from lednet.training.config import recipe_path, set_recipe

SHIPPED = sorted(ROOT.glob("*/recipes/*.yaml"))
ABOUT = "about: {data: d, command: c, hours: h, score: s}\n"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--num-epochs", type=int)
    parser.add_argument("--augment", choices=("paper", "modern"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser


def write(path: Path, options: str, about: str = ABOUT) -> Path:
    path.write_text(f"{about}options: {options}\n")
    return path


def test_options_become_defaults_that_flags_override(tmp_path):
    mine = parser()
    options = "{lr: 5e-4, num_epochs: 7, augment: modern, compile: true, out: here}"
    set_recipe(mine, write(tmp_path / "r.yaml", options))
    args = mine.parse_args(["--num-epochs", "9"])
    assert vars(args) == {
        "lr": 5e-4, "num_epochs": 9, "augment": "modern", "compile": True, "out": Path("here"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{speed: 3}", "no option 'speed'"),
        ("{lr: fast}", "lr cannot be 'fast'"),
        ("{num_epochs: [1]}", "num_epochs cannot be"),
        ("{augment: wild}", "augment cannot be 'wild'"),
        ("{compile: 1}", "compile cannot be 1"),
        ("7", "must hold `about` and `options`"),
        ("{lr: [}", "is neither YAML nor JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, options, words):
    path = write(tmp_path / "r.yaml", options)
    with pytest.raises(UserError, match=words) as caught:
        set_recipe(parser(), path)
    assert "r.yaml" in str(caught.value)


def test_recipe_must_say_what_it_is_for(tmp_path):
    path = write(tmp_path / "r.yaml", "{lr: 1}", "about: {data: d, command: c, score: s}\n")
    with pytest.raises(UserError, match="does not say its hours"):
        set_recipe(parser(), path)


def test_unknown_names_list_the_known(tmp_path):
    write(tmp_path / "calm.yaml", "{}")
    assert recipe_path("calm", tmp_path) == tmp_path / "calm.yaml"
    with pytest.raises(UserError, match="no recipe 'wild': there are calm"):
        recipe_path("wild", tmp_path)
    with pytest.raises(UserError, match=r"no recipe \S*gone.yaml"):
        recipe_path(str(tmp_path / "gone.yaml"), tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_shipped_recipes_are_read_by_their_scripts(run_inside, path, tmp_path):
    script = {"train": "train/main.py", "imagenet": "imagenet/lednet_imagenet.py"}[path.parts[-3]]
    result = run_inside(script, "--recipe", path.stem, "--datadir", tmp_path / "nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr, result.stderr


def test_own_recipe_stands_on_the_papers(run_inside, camvid, tmp_path):
    recipe = write(tmp_path / "mine.yaml", "{num_epochs: 1, lr: 0.002, clip_norm: 5}")
    flags = ("--dataset", "camvid", "--datadir", camvid, "--height", 24, "--width", 32,
             "--num-workers", 0, "--device", "cpu", "--decoder", "--batch-size", 2,
             "--savedir", tmp_path / "run")  # fmt: skip
    result = run_inside("train/main.py", *flags, "--recipe", recipe)
    assert result.returncode == 0, result.stderr
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    wanted = {"lr": 0.002, "clip_norm": 5, "num_epochs": 1, "batch_size": 2,
              "weight_decay": 1e-4, "augment": "paper", "recipe": str(recipe)}  # fmt: skip
    assert {key: options[key] for key in wanted} == wanted
    resumed = run_inside(
        "train/main.py", "--savedir", tmp_path / "run", "--resume", "--recipe", "paper"
    )
    assert resumed.returncode == 2 and "resume it without --recipe" in resumed.stderr
    recipe.unlink()  # the run has its own options
    assert run_inside("train/main.py", "--savedir", tmp_path / "run", "--resume").returncode == 0


def test_recipe_has_its_say_in_where_the_run_lies(monkeypatch, tmp_path):
    """--resume looks for the run of the recipe's data set, not of the paper's."""
    write(tmp_path / "paper.yaml", "{dataset: cityscapes}")
    write(tmp_path / "camvid.yaml", "{dataset: camvid}")
    mine = argparse.ArgumentParser()
    for flag in ("--dataset", "--resume"):
        mine.add_argument(flag)
    add_recipe_flags(mine.add_argument_group(), "Adam")
    monkeypatch.setattr("sys.argv", ["main.py", "--recipe", "camvid", "--resume", "auto"])
    asked = []
    args = parse_flags(mine, lambda args: asked.append(args.dataset) or tmp_path / "none", tmp_path)
    assert asked == ["camvid"] and args.resume is None
