"""The documentation site: `make docs` builds it into docs/_build/html, without a network.

The source is the whole repository, so that the links of its Markdown files lead to the same
places here and where the files are read as they are.
"""

import re

from sphinx.application import Sphinx

import lednet

project = "LEDNet"
author = "The LEDNet contributors"
copyright = f"{author}. MIT licence"
release = version = lednet.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "*/README.md",
    "save/released/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
# Folders that hold no pages are not even searched.
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
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
highlight_language = "sh"


def write_as_rest(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """A docstring is plain text with `names`: escape what reStructuredText takes for markup."""
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
    """Fields of a NamedTuple that say no more than their number."""
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_generated)
    app.connect("autodoc-process-docstring", write_as_rest, priority=400)  # before napoleon's
