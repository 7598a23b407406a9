"""The floors of the library: modules import from their own or a lower floor, never in a circle."""

import ast

from conftest import ROOT

FLOORS = (
    {
        "errors",
        "files",
        "io",
        "device",
        "distributed",
        "fonts",
        "metrics",
        "progress",
        "signals",
        "streams",
    },
    {"checkpoint"},
    {"hub"},
    {"model"},
    {"data"},
    {"visualization", "plots", "html"},
    {"training", "exporting"},
    {"inference", "evaluation", "validation"},
    {"cli"},
    {"api", "__main__"},
)
INDEPENDENT = {"training", "exporting", "inference", "evaluation", "validation"}
"""Packages of one floor that do not import from each other."""


def imports() -> dict[str, set[str]]:
    """Modules of the library by name, each with those that it imports from, anywhere in it."""
    paths = sorted((ROOT / "lednet").rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        modules = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
        found[name] = modules & names.keys()
    return found


def floor(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if module.split(".")[1] in floor)


def test_modules_import_from_their_own_or_a_lower_floor():
    modules = imports()
    modules.pop("lednet.__init__")
    wrong = []
    for module, imported in modules.items():
        for other in imported:
            package, others = module.split(".")[1], other.split(".")[1]
            beside = floor(other) == floor(module) and package != others and others in INDEPENDENT
            if floor(other) > floor(module) or beside:
                wrong.append(f"{module} imports from {other}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    left = imports()
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert not left
