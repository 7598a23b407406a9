"""Documentation: the site builds, links are valid, and scripts accept the documented commands."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from fakes import need

PAGES = sorted(
    path
    for pattern in ("*.md", "*/*.md", "docs/*/*.md", "save/released/*/*.md")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in ("build", "dist")
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Warnings are errors, such as links to missing pages or sections."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_site_loads_nothing_from_the_network(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]*)\"", html)
        loaded += re.findall(r"<link[^>]* href=\"([^\"]*)\"", html)
        loaded = [address for address in loaded if not address.startswith("data:")]
        assert not [address for address in loaded if "//" in address], page


def test_site_index_redirects_to_first_page(site):
    target = re.search(r"url=([^\"]+)", (site / "index.html").read_text())[1]
    assert "Training on your own data" in (site / target).read_text(encoding="utf-8")


def test_readme_links_exist(site):
    """README.md is not part of the site, so Sphinx does not check its links."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).is_file(), link
        if anchor:
            html = (site / path).with_suffix(".html").read_text(encoding="utf-8")
            assert f'id="{anchor}"' in html, link


def test_api_reference_contains_every_module(site):
    pages = (site / "docs/api").glob("*.html")
    documented = {
        module
        for page in pages
        for module in re.findall(r'id="module-(\S+?)"', page.read_text(encoding="utf-8"))
    }
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "lednet").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert documented == modules


def code_lines(text: str) -> Iterator[str]:
    """Lines of indented and fenced code blocks, with continued lines joined."""
    fenced, pending = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            pending += line.strip()
            if pending.endswith("\\"):
                pending = pending[:-1]
            else:
                yield pending
                pending = ""


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) for every call of a script of the repository, in blocks and inline code."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = re.findall(r"`((?:python|torchrun) [^`]*)`", text)
        for line in (*code_lines(text), *(" ".join(code.split()) for code in inline)):
            if re.match(r"(python|torchrun|srun torchrun) ", line) and ".py" in line:
                yield str(page.relative_to(ROOT)), line


def replaced(text: str, replacements: dict[str, str]) -> str:
    for long, short in replacements.items():
        assert long in text
        text = text.replace(long, short)
    return text


class Parsed(BaseException):
    """Raised when a script has parsed its arguments."""


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_script_accepts_documented_command(page, command, monkeypatch, capsys):
    words = [word for word in shlex.split(command, comments=True) if not word.startswith("$")]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[at - 1] == "pytest":
        assert (ROOT / words[at]).is_file()
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[at]), *words[at + 1 :]])
    monkeypatch.setattr(sys, "path", [str((ROOT / words[at]).parent), *sys.path])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{words[at]} parses no arguments")


FEWER = {
    '"40"': '"4"', '"8"': '"2"', '"256"': '"128"', '"128",\n    ],': '"64",\n    ],',
    "num_epochs=6": "num_epochs=1", "height=64": "height=32", "width=128": "width=64",
}  # fmt: skip
"""Replacements that make the notebook short enough for a test."""


def test_notebook_runs(tmp_path):
    """Its code in the order of its cells, which write to a temporary folder."""
    need("onnx", "onnxscript", "onnxruntime")
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = replaced("\n".join(code), FEWER)
    (tmp_path / "notebook.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "notebook.py"], cwd=ROOT / "docs", text=True,
        capture_output=True, env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*/street.onnx"))


def test_architecture_page_matches_the_modules(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/draw_architecture.py"))
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert script["tables"]() in page, "run python docs/draw_architecture.py"
    script["draw"](tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


SMALLER = {
    "--out mine/toy": "--out mine/toy --train 5 --val 2 --test 0 --train-extra 0 "
    "--width 128 --height 64 --workers 1",
    "--height 128 --width 256": "--height 64 --width 128 --num-workers 0",
    "--num-epochs 12": "--num-epochs 1",
    "check_dataset.py": "check_dataset.py --fail-on never",  # some classes are absent
}
"""Replacements that make the worked example short enough for a test."""


def test_own_data_page_commands_succeed_in_order(tmp_path):
    for folder in ("lednet", "train", "test", "utils", "save/released", "docs/site/live"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "datasets").mkdir()
    for script in (ROOT / "datasets").glob("*.py"):
        shutil.copy(script, tmp_path / "datasets")
    page = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
    script = replaced("\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)), SMALLER)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "save/mine"
    for name in ("best.pth", "curves.png", "scores.json", "bars.png", "sheet.png", "best.pt2"):
        assert (run / name).is_file(), name
    assert (tmp_path / "save/check-folders/report.html").is_file()
    assert list((tmp_path / "mine/labelled").glob("*_overlay.jpg"))
