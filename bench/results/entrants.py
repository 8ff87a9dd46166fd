"""Which rows of leaderboards are one algorithm, and which of them a person means by a name or a call."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from bench.plugins.names import meant, near
from bench.protocol.refusal import BadConfig
from bench.protocol.sets import EVERYTHING, PREFIX, unfold
from bench.protocol.words import split_at
from bench.results.leaderboard import Leaderboard, Row


def entrants(boards: Sequence[Leaderboard]) -> dict[str, list[Row]]:
    """Find the rows of each algorithm: same name, hyper-parameters, own learning rate and version, on whichever
    leaderboard.

    Returns:
        Rows by label, in the order of the leaderboards; versions of one algorithm have labels of their own.
    """
    rows: dict[tuple[_Key, str], list[Row]] = {}
    for board in boards:
        for row in board.rows:
            again = any(_key(other) == _key(row) and other is not row for other in board.rows)
            rows.setdefault((_key(row), row.label.removeprefix(row.words) if again else ""), []).append(row)
    plain = {key: members[0].words for key, members in rows.items()}
    found: dict[str, list[Row]] = {}
    for (key, apart), members in rows.items():
        words = members[0].words
        versions = {other[2] for (other, _), label in plain.items() if label == words}
        found[words + f" version {key[2]}" * (len(versions) > 1) + apart] = members
    return found


_Key = tuple[str, str, str, float | None]


def _key(row: Row) -> _Key:
    # with others at the server, or another teacher, it is another one
    given = row.words.partition("auxiliary ")[2] or row.words.partition("teacher ")[2]
    return row.algorithm, row.call + given, row.version, row.lr


def choose(boards: Sequence[Leaderboard], words: Iterable[str]) -> list[str]:
    """Find the algorithms that a person means.

    Args:
        boards: Leaderboards.
        words: Labels, names, or calls with some of the fields: `fedrep` or `fedrep(head_epochs=2)` mean the one row
            that fits, however they are spelt. `set:pfl` means all that there are of a set's algorithms.

    Returns:
        Labels of `entrants`, in the order of the words, without repetition.

    Raises:
        BadConfig: No algorithm fits, or several do.
    """
    known = entrants(boards)
    return list(dict.fromkeys(label for word in words for label in _meant(known, word)))


def _meant(known: Mapping[str, Sequence[Row]], word: str) -> list[str]:
    if not word.startswith(PREFIX):
        return [_choose(known, word)]
    if word == PREFIX + EVERYTHING:
        return list(known)
    found: list[str] = []
    for call, (label, rows) in itertools.product(unfold(word), known.items()):
        with suppress(BadConfig):  # another algorithm, or other fields
            found.append(_choose({label: rows}, call))
    if not found:
        raise BadConfig(f"there are no results of {word}; there are some of {', '.join(known)}")
    return found


def _choose(known: Mapping[str, Sequence[Row]], word: str) -> str:
    if (label := meant(word, known)) is not None:
        return label
    wanted = _call(*unfold(word))
    fitting = [label for label, (row, *_) in known.items() if _fits(wanted, row)]
    if not fitting:
        raise BadConfig(f"there are no results of {word}; {near(word, known)}")
    bare = meant("".join(wanted), fitting)
    if bare is not None and not any(wanted.values()):
        return bare
    if len(fitting) > 1:
        raise BadConfig(f"{word} may be {' or '.join(sorted(fitting))}: write which")
    return fitting[0]


_Pieces = dict[str, dict[str, object]]
"""By the name of a method, and of its parts after a plus, values of fields: text, where one is no literal."""


def _fits(wanted: _Pieces, row: Row) -> bool:
    """Tell whether a row has these pieces, the parts in whatever order, and these values: 0 is 0.0, and not False."""
    names = row.algorithm.lower().replace("+", " +").split()
    if next(iter(wanted)) != names[0] or wanted.keys() != set(names):
        return False
    try:
        stored = dict(zip(names, _call(row.call).values(), strict=True))
    except BadConfig:
        return not any(wanted.values())
    return all(
        field in stored[name] and _same(value, stored[name][field])
        for name, fields in wanted.items()
        for field, value in fields.items()
    )


def _same(one: object, other: object) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def pieces(words: str) -> _Pieces:
    """Take a row's words apart: a method and its parts, each with fields that are not at their defaults. What stands in
    brackets behind them, such as the preset, is left out.
    """
    return _call(words.partition(" [")[0])


def _call(text: str) -> _Pieces:
    """Take `name(field=1)+part` apart."""
    (name, fields), *parts = map(_piece, split_at("+", text))
    return {name: fields, **{f"+{part}": values for part, values in parts}}


def _piece(text: str) -> tuple[str, dict[str, object]]:
    called, bracket, rest = text.partition("(")
    try:
        tree = ast.parse(called.strip().replace("-", "_").lower() + bracket + rest, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise BadConfig(f"{text!r} is not a name or a call such as name(parameter=1)") from error
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise BadConfig(f"{text!r} is not a name or a call such as name(parameter=1)")
    return tree.func.id, {f"{given.arg}".lower(): _value(given.value) for given in tree.keywords}


def _value(written: ast.expr) -> object:
    try:
        return ast.literal_eval(written)
    except (ValueError, TypeError):
        return ast.unparse(written)
