"""Sphinx configuration: `make docs` builds the site into docs/_build/html, without a network.

The source folder is the repository, so links in Markdown files work both on the site and in the
repository.
"""

import json
import re
from pathlib import Path

from sphinx.application import Sphinx

import lednet

project = "LEDNet"
author = "The LEDNet contributors"
copyright = f"{author}. MIT licence"
release = version = lednet.__version__

root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = [
    "docs/**.md",
    "docs/quickstart.ipynb",
    "*/README.md",
    "save/released/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [
    ".*", "build", "dist", "docs/_build", "datasets/*/**", "save/demo*", "third_party", "tests",
]  # fmt: skip
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_default_options = {"members": True, "special-members": "__call__"}
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
default_role = "literal"  # docstrings write `names` as Markdown does
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "LEDNet"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
HAS_LIVE = (Path(__file__).parent / "_build/site/live/models.json").is_file()
"""Whether `make live` has built the live page."""
if HAS_LIVE:
    html_extra_path.append("_build/site")
else:
    exclude_patterns.append("**/live")
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
highlight_language = "sh"


def list_modules(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the list of modules of a page in docs/api by their documentation.

    A listed package adds all its modules that the page does not list themselves.
    """
    if not page.startswith("docs/api/"):
        return
    root = Path(app.srcdir)
    listed = re.findall(r"^- `(lednet\S+)`\n", source[0], re.MULTILINE)
    modules = [name for name in listed if (root / f"{name.replace('.', '/')}.py").is_file()]
    for package in listed:
        for path in sorted((root / package.replace(".", "/")).rglob("[!_]*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if name not in modules:
                modules.append(name)
    source[0] = re.sub(r"^- `lednet\S+`\n", "", source[0], flags=re.MULTILINE)
    for name in modules:
        source[0] += f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n\n"


def read_notebook(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn a notebook into Markdown, with the outputs that it holds."""
    if not (Path(app.srcdir) / f"{page}.ipynb").is_file():
        return
    parts = []
    for cell in json.loads(source[0])["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if png := data.get("image/png"):
                parts.append(f'<img alt="output" src="data:image/png;base64,{png.strip()}">')
            else:
                shown = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{shown.rstrip()}\n```")
    source[0] = "\n\n".join(parts)


def escape_rest(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Escape reStructuredText markup in docstrings, which are plain text with `names`."""
    for i, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
        line = "`".join(parts)
        following = lines[i + 1 : i + 3]
        if line.endswith(":") and following[:1] == [""] and following[1][:1] == " ":
            line += ":"  # an indented block is an example
        lines[i] = line


def skip_generated(
    app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object
) -> bool | None:
    """Skip the generated docstrings of the fields of a NamedTuple."""
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    if HAS_LIVE:
        app.tags.add("live")
    app.connect("autodoc-skip-member", skip_generated)
    app.connect("autodoc-process-docstring", escape_rest, priority=400)  # before napoleon's
    app.connect("source-read", list_modules)
    app.connect("source-read", read_notebook)
