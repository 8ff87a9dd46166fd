"""Text that leaves: whatever somebody wrote is shown as text, on a terminal, in a table, in LaTeX and on a page.

Labels, reasons, names of files and of hardware come from strangers' results and plug-ins. Each medium has its one
function here; `plain` is the terminal's, and the others begin with it.
"""

from __future__ import annotations

import html
import re

_FORMULA = tuple("=+-@＝＋－＠")
"""A cell that begins so is computed by spreadsheets."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_MARKDOWN = re.compile(r"[\\`*_<>\[\]#|~$&]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])(?!https?://[^\s<>]*>)")
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "–": "--",
}


def plain(text: object) -> str:
    r"""Write on one line, and spell out what has no sign of its own: `\x1b`, `\n`, `\u202e`.

    That is what `str.isprintable` calls so: control characters, line ends, marks of direction and of no width, halves
    of pairs, and what belongs to no alphabet.
    """
    written = str(text)
    return written if written.isprintable() else "".join(map(_spelt, written))


def lines(text: object) -> str:
    """Write as `plain` does, and keep the line ends and tabs: of what has several lines by itself."""
    return "".join(part if part in "\n\t" else plain(part) for part in re.split(r"([\n\t])", str(text)))


def _spelt(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def cell(value: object) -> object:
    """Write a cell of a CSV file: text that a spreadsheet would compute gets an apostrophe; numbers stay numbers."""
    if value is None or isinstance(value, bool | int | float):
        return value
    written = plain(value)
    computed = written.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(written)
    return f"'{written}" if computed else written


def html_text(text: object) -> str:
    """Write for HTML, within an element or an attribute in quotes."""
    return html.escape(plain(text))


def markdown(text: object) -> str:
    """Write for Markdown, within a line: no character is read as Markdown's own."""
    return _MARKDOWN.sub(r"\\\g<0>", plain(text))


def code(text: object) -> str:
    """Write for Markdown as code, in a cell of a table."""
    return "`" + plain(text).replace("|", "\\|").replace("`", "'") + "`"


def notes(text: str) -> str:
    """Keep the Markdown that a person wrote, without HTML of its own."""
    return _TAG.sub("&lt;", lines(text))


def latex(text: object) -> str:
    """Write for LaTeX: nothing is read as a command, nor what comes first as an option of the row above."""
    written = "".join(_LATEX.get(character, character) for character in plain(text))
    return f"{{}}{written}" if written.startswith(("[", "*")) else written


def picture(text: object) -> str:
    """Write for matplotlib, to which a dollar would begin a formula."""
    return plain(text).replace("$", r"\$")
