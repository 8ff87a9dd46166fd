"""What a reader of a leaderboard must know about single rows: notes with numbers, and the marks that point to them."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results.leaderboard import Leaderboard, Row
from bench.results.statistics import FEWEST


def footnotes(board: Leaderboard) -> tuple[dict[str, str], list[str]]:
    """Give what a reader must know about single rows.

    Returns:
        The marks of each row by its label (" [1]", or nothing), and the notes in the order of their numbers; what holds
        for several rows is one note.
    """
    own = {row.label: _notes(board, row) for row in board.rows}
    whose: dict[str, list[str]] = {}
    for label, notes in own.items():
        for note in notes:
            whose.setdefault(note, []).append(label)
    numbers = {note: f" [{number}]" for number, note in enumerate(whose, start=1)}
    marks = {label: "".join(numbers[note] for note in notes) for label, notes in own.items()}
    return marks, [
        f"{labels[0] if len(labels) == 1 else f'{len(labels)} rows'}: {note}." for note, labels in whose.items()
    ]


def _notes(board: Leaderboard, row: Row) -> list[str]:
    failed = {seed for seed, _ in row.failures}
    notes = [f"seed {seed} failed ({reason})" for seed, reason in row.failures]
    if set(board.seeds) - set(row.seeds) - failed:
        notes.append(f"{spell_seeds(row.seeds) or 'none'} of {spell_seeds(board.seeds)}")
    if row.screened:
        notes.append(f"screening, not ranked: fewer than {FEWEST} seeds have no interval, and separate nothing")
    if row.chosen:
        notes.append("not ranked: its seeds may have been chosen, and those of rows that rank are 0 to n - 1")
    if row.standing == "self-reported" and (again := sum(kind != row.standing for kind in row.standings)):
        notes.append(f"{again} of its {len(row.seeds)} runs were looked at by the board")
    if " @" in row.label.removeprefix(row.words):
        notes.append(f"handed in as {row.submission}: no row is made of the runs of several")
    if " #" in row.label.removeprefix(row.words):
        when = f", run {moment(row.finished)}" if row.finished else ""
        known = "a newer version is in these results" if row.stale else "the newest version in these results"
        notes.append(f"version {row.version} of {row.call}{when}; {known}")
    return notes


def moment(written: str) -> str:
    """Write the moment of an ISO 8601 text, which runs note in UTC, to the minute."""
    return f"{written[:16].replace('T', ' ')} UTC"


def spell_seeds(seeds: Sequence[int]) -> str:
    """Name seeds; nothing if there are none."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
