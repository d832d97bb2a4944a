"""How Sphinx builds the site. `make docs` calls it, and every warning is an error there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import frskd_fast

project = "frskd_fast"
version = release = frskd_fast.__version__
html_title = f"{project} {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence"]
# Headings down to this level can be linked to, as on the pages of a repository.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Docstrings write code between single backticks or double ones.
default_role = "code"

# Annotations name types of PyTorch, of Lightning and of modules that have no page; the site is built without a network, so
# these stay plain text. Every other reference must lead somewhere.
nitpick_ignore_regex = [("py:(class|data|exc|obj)", ".*")]

TABLE_RULE = re.compile(r"^\s*\|[\s|:-]+\|\s*$")
FIELD = re.compile(r":(param|ivar) ([\w*]+(?:, [\w*]+)+): (.*)")
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables_as_restructured_text(lines: list[str]) -> list[str]:
    """`lines`, with each Markdown table as reStructuredText's list-table."""
    out: list[str] = []
    for position, line in enumerate(lines):
        if TABLE_RULE.match(line):
            continue
        if not line.lstrip().startswith("|"):
            out.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if position + 1 < len(lines) and TABLE_RULE.match(lines[position + 1]):
            out += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        first, *others = cells(line)
        out += [f"{indent}   * - {first}", *(f"{indent}     - {cell}" for cell in others)]
    return out


def escaped(line: str) -> str:
    """`line` without what reStructuredText takes for markup of its own: |f| outside code, and `code`s."""
    text, *rest = CODE.split(line)
    out = [text.replace("|", r"\|")]
    for code, text in zip(rest[::2], rest[1::2], strict=True):
        out += [code, r"\ " if text[:1].isalnum() else "", text.replace("|", r"\|")]
    return "".join(out)


def one_name_each(lines: list[str]) -> list[str]:
    """`lines`, with a field for each name where one describes several: "mean, std: of images" of `Args:`."""
    out: list[str] = []
    position = 0
    while position < len(lines):
        found = FIELD.match(lines[position])
        end = position + 1
        while found and end < len(lines) and lines[end].startswith(" "):
            end += 1
        if found:
            for name in found[2].split(", "):
                out += [f":{found[1]} {name}: {found[3]}", *lines[position + 1 : end]]
        else:
            out.append(lines[position])
        position = end
    return out


def on_docstring(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read in an editor: tables are Markdown's, formulas are plain."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()  # what Python says of a NamedTuple's field
    lines[:] = one_name_each(lines)
    lines[:] = tables_as_restructured_text([line if line.lstrip().startswith("|") else escaped(line) for line in lines])


def setup(app: object) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", on_docstring)  # type: ignore[attr-defined]
    return {"parallel_read_safe": True}
