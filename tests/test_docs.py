"""The documentation: the site builds, links lead somewhere, commands are ones that scripts take."""

import argparse
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

PAGES = sorted(
    path
    for pattern in ("*.md", "*/*.md", "docs/*/*.md", "save/released/*/*.md")
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] not in ("build", "dist")
)
API = (
    "lednet.cli",
    "lednet.data",
    "lednet.data.prepare",
    "lednet.training",
    "lednet.evaluation",
    "lednet.export",
    "lednet.inference",
    "lednet.validation",
    "lednet.demo",
)
"""Packages whose own module holds nothing to document."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Every warning is an error: a link or an anchor that is not there, for one."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]*)\"", html)
        loaded += re.findall(r"<link[^>]* href=\"([^\"]*)\"", html)
        assert not [address for address in loaded if "//" in address], page


def test_the_first_page_leads_to_the_site(site):
    target = re.search(r"url=([^\"]+)", (site / "index.html").read_text())[1]
    assert "Training on your own data" in (site / target).read_text(encoding="utf-8")


def test_readme_links_lead_somewhere(site):
    """README.md is no page of the site, so that the build does not see its links."""
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


def test_every_module_is_in_the_api():
    named = set()
    for page in (ROOT / "docs/api").glob("*.md"):
        named.update(re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8")))
    modules = set()
    for path in (ROOT / "lednet").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert named == modules - {"lednet", *API}


def code_lines(text: str) -> Iterator[str]:
    """Lines of the code blocks of Markdown, indented or fenced, continued lines joined."""
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


def inline_commands(text: str) -> Iterator[str]:
    """Commands in running text, such as `python x.py --flag`; they may go over a line's end."""
    for code in re.findall(r"`((?:python|torchrun) [^`]*)`", text):
        yield " ".join(code.split())


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of everything in the docs that calls a script of the repository."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in (*code_lines(text), *inline_commands(text)):
            if re.match(r"(python|torchrun|srun torchrun) ", line) and ".py" in line:
                yield str(page.relative_to(ROOT)), line


class Parsed(BaseException):
    """The script took its arguments."""


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_scripts_take_the_commands_of_the_docs(page, command, monkeypatch, capsys):
    words = [word for word in shlex.split(command, comments=True) if not word.startswith("$")]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[at - 1] == "pytest":
        assert (ROOT / words[at]).is_file()
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[at]), *words[at + 1 :]])
    monkeypatch.setattr(sys, "path", [str((ROOT / words[at]).parent), *sys.path])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Parsed:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{words[at]} reads no arguments")


def test_the_architecture_page_is_that_of_the_code(tmp_path):
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
    "check_dataset.py": "check_dataset.py --fail-on never",  # few images lack some classes
}
"""What makes the worked example short enough for a test."""


def test_own_data_in_ten_minutes(tmp_path):
    """The page's commands, one after the other, in a copy of the repository."""
    for folder in ("lednet", "train", "test", "utils", "save/released"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "datasets").mkdir()
    for script in (ROOT / "datasets").glob("*.py"):
        shutil.copy(script, tmp_path / "datasets")
    page = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    for long, short in SMALLER.items():
        assert long in script
        script = script.replace(long, short)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "save/mine"
    for name in ("best.pth", "curves.png", "scores.json", "bars.png", "sheet.png", "best.pt2"):
        assert (run / name).is_file(), name
    assert (tmp_path / "save/check-folders/report.html").is_file()
    assert list((tmp_path / "mine/labelled").glob("*_overlay.jpg"))
