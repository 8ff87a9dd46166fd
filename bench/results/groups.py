"""Which runs make one row of a table: of one algorithm, one setting and one submission, and how far it is believed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from bench.results.record import Record
from bench.results.standing import RANKED, ranked_with, weakest
from bench.results.versions import variant
from bench.system.text import plain

Group = list[Record]
"""The runs of a row."""


def groups_of(known: Iterable[Record]) -> Iterator[Group]:
    """Put together the runs of each row: those that differ by seed only, and came with one submission or were all run
    again by the board.
    """
    rows: dict[tuple[str, str], dict[str | None, Group]] = defaultdict(lambda: defaultdict(list))
    for record in known:
        rows[record.protocol, variant(record)][record.submission].append(record)
    for submissions in rows.values():
        again: Group = []
        for group in submissions.values():
            if ranked_with(stands(group)) == RANKED[0]:
                again += group
            else:
                yield group
        if again:
            yield again


def stands(group: Group) -> str:
    """Give the weakest standing of a row's finished runs; of its failed ones, if there are no others."""
    done = [record for record in group if record.status == "done"]
    return weakest(record.stands for record in done or group)


def submission_of(group: Group) -> str | None:
    """Name the submission that a row came with; None for runs of the folder itself, and of several."""
    names = {record.submission for record in group}
    (name,) = names if len(names) == 1 else (None,)
    return None if name is None else plain(name)
