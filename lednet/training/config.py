"""Recipes: options of a training script in a small file, with their purpose and results.

    about:
      data: Cityscapes, fine annotations
      command: python train/main.py --datadir /data/cityscapes
      hours: 27 on a GTX 1080 Ti (estimate)
      score: not measured here; 69.2 on test in the paper
    options:
      num_epochs: 300
      lr: 0.0005

Options have the names of their flags, with underscores. The paper's values are the defaults.
"""

import argparse
import reprlib
from pathlib import Path
from typing import Any

from lednet.errors import UserError
from lednet.files import expand_home
from lednet.io import read_yaml

ABOUT = ("data", "command", "hours", "score")
"""Entries that `about` must have."""


def recipe_path(name: str, folder: Path) -> Path:
    """The file of the recipe `name`: a path that ends in .yaml, or a name in `folder`.

    Raises:
        UserError: there is no such file.
    """
    is_path = Path(name).suffix in (".yaml", ".yml")
    path = Path(name) if is_path else folder / f"{name}.yaml"
    if path.is_file():
        return path
    if is_path:
        raise UserError(f"no recipe {path}: check the path")
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise UserError(f"no recipe {name!r}: there are {known}; or give a .yaml file")


def read_recipe(path: Path) -> dict[str, Any]:
    """The mappings `about` and `options` of a recipe.

    Raises:
        UserError: it is not YAML, or an entry is missing.
    """
    content = read_yaml(path)
    content = content if isinstance(content, dict) else {}
    about, options = content.get("about"), content.get("options")
    if not isinstance(about, dict) or not isinstance(options, dict):
        raise UserError(f"{path} must hold `about` and `options`, as train/recipes/paper.yaml does")
    if missing := [key for key in ABOUT if key not in about]:
        raise UserError(f"{path} does not say its {missing[0]}: add it below `about`")
    return content


def set_recipe(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make a recipe's options the defaults of `parser`; see `set_options`."""
    set_options(parser, read_recipe(path)["options"], path)


def set_options(parser: argparse.ArgumentParser, options: dict[str, Any], source: Path) -> None:
    """Make `options` the defaults of `parser`, checked as if they had been typed.

    Args:
        options: text as in a recipe, or values of JSON. null or None is no value, and a switch is
            true or false.
        source: the file of the options, for messages.

    Raises:
        UserError: an option is unknown, or the flag does not take its value; names `source`.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of a name
    for name, value in options.items():
        action = actions.get(name)
        if action is None:
            raise UserError(f"{source}: there is no option {reprlib.repr(name)}; --help lists them")
        try:
            parser.set_defaults(**{name: _convert(action, value)})
        except (KeyError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(
                f"{source}: {name} cannot be {reprlib.repr(value)}; see --help"
            ) from error


def _convert(action: argparse.Action, value: Any) -> Any:
    switch = {"true": True, "false": False}
    value = expand_home(value) if isinstance(value, str) else value
    if value in (None, "null", "~", ""):
        return None
    if action.nargs == 0:
        return switch[str(value).lower()]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError
    value = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and value not in action.choices:
        raise ValueError
    return value
