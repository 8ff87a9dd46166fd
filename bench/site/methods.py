"""The page of a method or part: what its file says of it, and its rows in all comparisons. No plug-in is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.plugins import declared, ledger
from bench.plugins.registry import ALGORITHMS
from bench.protocol.words import split_at

FOLDER = "methods"
_KINDS = {"algorithms": "Method", "parts": "Part"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method or a part that rows are made of."""

    name: str
    kicker: str
    text: declared.Text
    paper: str
    """Who wrote it, its title, venue and year."""
    links: tuple[str, ...]
    """Addresses that its documentation names there."""
    ledger: tuple[tuple[str, str], ...]
    """Title and what stands behind it."""
    family: str | None
    controls: tuple[tuple[str, str], ...]
    """Row, and what it answers."""

    @property
    def page(self) -> str:
        """Within the site."""
        return f"{FOLDER}/{self.name}.html"


def pieces(words: str) -> list[str]:
    """Name the method of a row and its parts: "fedrep(head_epochs=5)+topk" is made of fedrep and topk."""
    return [piece.partition("(")[0] for piece in split_at("+", words)]


def described(rows: Iterable[str]) -> dict[str, Method]:
    """Describe what rows are made of, as far as it is our own: by name, methods before parts."""
    named = [pieces(words) for words in rows]
    methods = sorted({first for first, *_ in named})
    parts = sorted({part for _, *others in named for part in others})
    every = [("algorithms", name) for name in methods] + [("parts", name) for name in parts]
    found = {name: _method(kind, name) for kind, name in every}
    return {name: method for name, method in found.items() if method is not None}


def _method(kind: str, name: str) -> Method | None:
    known = declared.text(kind, name) if name.isidentifier() else None  # a label may hold anything
    if known is None:  # a person's own, or of another distribution
        return None
    said = ledger.sections(known.documentation)
    _, _, rest = known.documentation.partition("\n\n")
    paper = " ".join(rest.partition("\n\n")[0].split())
    return Method(
        name=name,
        kicker=_KINDS[kind],
        text=known,
        paper=re.sub(r"\s*https?://\S+", "", paper),
        links=tuple(address.rstrip(".;,)") for address in re.findall(r"https?://\S+", paper)),
        ledger=tuple((title, said[title]) for title in ledger.TITLES if title in said),
        family=declared.declared(ALGORITHMS, name, "family") if kind == "algorithms" else None,
        controls=tuple(declared.controls(name).items()) if kind == "algorithms" else (),
    )


def facts(method: Method, tiers: Sequence[str]) -> list[tuple[str, str]]:
    """Give what its page says before its ledger.

    Args:
        method: Whose.
        tiers: Of its rows.
    """
    told = [f"{tier}, the server learns or needs {ledger.TIERS.get(tier, 'what no version knows')}" for tier in tiers]
    return [*([("family", method.family)] if method.family else []), ("tier", "; ".join(told))]
