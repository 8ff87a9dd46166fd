"""The methods that have rows, by family and year, and which of them build on which. No plug-in is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.plugins import declared
from bench.plugins.registry import ALGORITHMS
from bench.protocol.sets import FAMILIES
from bench.site.methods import FOLDER, Method, pieces
from bench.site.rendering import render

PAGE = f"{FOLDER}/index.html"
_NOBODYS = "Not one paper's"
"""So begins what is said of the paper where there is none; years that follow are others'."""
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A method of the tree."""

    method: Method
    year: str
    """Of its paper; "" where it has none."""
    extends: tuple[tuple[str, Method | None], ...]
    """Methods that its own first sentence begins with, by title, and their pages."""
    answers: tuple[tuple[str, Method | None], ...]
    """Rows of other methods that it declares as its controls, and their methods' pages."""


def page(methods: Mapping[str, Method]) -> str:
    """Show all methods.

    Args:
        methods: That have a page, by name; parts among them are left out.
    """
    titles = {title: name for name in ALGORITHMS if (title := title_of(name))}
    leaves = [_leaf(method, methods, titles) for method in methods.values() if method.name in ALGORITHMS]
    families = [(name, says, _by_year(leaves, name)) for name, says in FAMILIES.items()]
    others = [leaf for leaf in leaves if leaf.method.family not in FAMILIES]
    families += [("others", "Of no family.", sorted(others, key=_order))] * bool(others)
    return render("family_tree.html", "../", families=[family for family in families if family[2]])


def title_of(name: str) -> str:
    """Give a method's name as its paper writes it: what stands before the colon of its file's first sentence."""
    text = declared.text("algorithms", name)
    return text.summary.partition(":")[0] if text is not None and ":" in text.summary else ""


def year_of(paper: str) -> str:
    """Find the year of a paper; "" where there is no paper."""
    found = _YEAR.search(paper)
    return found[0] if found is not None and not paper.startswith(_NOBODYS) else ""


def _leaf(method: Method, methods: Mapping[str, Method], titles: Mapping[str, str]) -> Leaf:
    _, _, says = method.text.summary.partition(": ")
    extends = [
        (title, methods.get(name))
        for title, name in titles.items()
        if name != method.name and re.match(rf"{re.escape(title)}(?![\w-])", says)
    ]
    rows = [row for row, _ in method.controls if pieces(row)[0] != method.name]
    return Leaf(
        method=method,
        year=year_of(method.paper),
        extends=tuple(extends),
        answers=tuple((row, methods.get(pieces(row)[0])) for row in rows),
    )


def _by_year(leaves: Sequence[Leaf], family: str) -> list[Leaf]:
    return sorted((leaf for leaf in leaves if leaf.method.family == family), key=_order)


def _order(leaf: Leaf) -> tuple[str, str]:
    return leaf.year, leaf.method.name
