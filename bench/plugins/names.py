"""Names as people type them: without regard to case, with - for _, and nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str | None:
    """Give the known name that was typed: the very one, or the only one that differs by case and by - for _."""
    names = list(known)
    if name in names:
        return name
    alike = [each for each in names if _plain(each) == _plain(name)]
    return alike[0] if len(alike) == 1 else None


def close(name: str, known: Iterable[str]) -> str | None:
    """Ask whether one of the names near a wrong one was meant; None: nothing is near."""
    by_plain = {_plain(each): each for each in known}
    found = difflib.get_close_matches(_plain(name), by_plain, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(by_plain[each] for each in found)}?" if found else None


def near(name: str, known: Iterable[str]) -> str:
    """Say which names are near a wrong one, or else which there are."""
    names = list(dict.fromkeys(known))
    return close(name, names) or (f"there are {', '.join(names)}" if names else "there are none")


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").casefold()
