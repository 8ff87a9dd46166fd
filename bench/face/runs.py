"""Runs that are stored, as one object: tables at a prompt and in a notebook, frames of pandas, statistics, pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.face.comparing import Compared, compare
from bench.face.shown import as_text
from bench.plugins.names import near
from bench.protocol.settings import BadConfig
from bench.results import classes, records, table
from bench.results.columns import main_columns
from bench.results.entrants import choose
from bench.results.leaderboard import RANKS_BY, Leaderboard, leaderboards
from bench.results.record import Record

if TYPE_CHECKING:
    import pandas

    from bench.face.pictures import Picture

_CELL = ("id", "algorithm", "dataset", "imbalance", "alpha", "seed")
"""What tells a run from others, in each frame."""


class Runs(Sequence[Record]):
    """Finished and failed runs, in the order of their leaderboards' rows and of their seeds.

    `runs[0]` is a run, `runs["fedrep", 0]` that of an algorithm and seed; `runs[2:5]` and `runs.where(...)` are some.
    """

    def __init__(self, known: Sequence[Record], all_versions: bool = False) -> None:
        self._all_versions = all_versions
        self._boards = leaderboards(known, all_versions=all_versions)
        by_id = {record.id: record for record in known}
        self._labels = {run: row.label for board in self._boards for row in board.rows for run in row.ids}
        ordered = [by_id[run] for board in self._boards for row in board.rows for run in row.ids]
        place = {run: number for number, run in enumerate(self._labels)}
        rank = {label: number for number, label in enumerate(dict.fromkeys(self._labels.values()))}
        self._records = sorted(
            ordered, key=lambda each: (each.protocol, rank[self._labels[each.id]], each.seed, place[each.id])
        )

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __getitem__(self, key: Any) -> Any:
        """Give a run by its number, or by algorithm and seed; several by a slice.

        Raises:
            BadConfig: There is no such run, or several.
        """
        if isinstance(key, slice):
            return Runs(self._records[key], self._all_versions)
        if isinstance(key, int):
            return self._records[key]
        algorithm, seed = key if isinstance(key, tuple) else (key, None)
        (label,) = choose(self._boards, [algorithm])
        members = [each for each in self if _plain(self._labels[each.id]) == _plain(label)]
        found = [each for each in members if seed in (None, each.seed)]
        if not found:
            seeds = ", ".join(map(str, sorted({each.seed for each in members})))
            raise BadConfig(f"there is no run of {label} with seed {seed}; there are {seeds}")
        if len(found) > 1:
            differ = self._varying(found)
            raise BadConfig(
                f"{len(found)} runs are of {label}{'' if seed is None else f' with seed {seed}'}, and differ in "
                f"{', '.join(differ)}: choose with where({differ[0]}=...)"
            )
        return found[0]

    def where(self, **values: object) -> Runs:
        """Choose runs by columns of `frame()`: where(dataset="digits", imbalance=10); of a list, any of its values.

        Raises:
            BadConfig: There is no such column.
        """
        frame = self.frame().set_index("id", drop=False)
        chosen = frame.index == frame.index
        for column, value in values.items():
            if column not in frame:
                raise BadConfig(f"runs have no {column!r}; {near(column, map(str, frame.columns))}")
            wanted = list(value) if isinstance(value, list | tuple | set) else [value]
            chosen &= frame[column].isin(wanted) | (frame[column].isna() & (None in wanted))
        kept = set(frame.index[chosen])
        return Runs([record for record in self if record.id in kept], self._all_versions)

    # As frames of pandas --------------------------------------------------------------------------

    def frame(self) -> pandas.DataFrame:
        """Give a row a run: what tells it from others, status, the setting's fields (its name as `setting`), the
        metrics of the last round as fractions 0-1, and costs as "cost.bytes_up".
        """
        import pandas

        return pandas.DataFrame([self._row(record) for record in self])

    def curves(self) -> pandas.DataFrame:
        """Give a row an evaluated round of each finished run: the run's cell, "round", and metrics, fractions 0-1."""
        return self._together([(record, record.rounds()) for record in self._finished()])

    def counts(self) -> pandas.DataFrame:
        """Give what each model got right: the run's cell, and the columns of `Record.counts`."""
        return self._together([(record, record.counts()) for record in self._finished()])

    def leaderboard(self, metric: str = "last") -> pandas.DataFrame:
        """Give the table of `bench table --format csv`.

        Args:
            metric: "last" round, "last10" for the mean of the last ten evaluations, or "best" (optimistic).
        """
        import io

        import pandas

        boards = leaderboards(self._records, metric, all_versions=self._all_versions)
        return pandas.read_csv(io.StringIO(table.render(boards, "csv")))

    def _finished(self) -> list[Record]:
        return [record for record in self if record.status == "done"]

    def _cell(self, record: Record) -> dict[str, Any]:
        cell = {key: getattr(record, key) for key in _CELL}
        return {**cell, "algorithm": self._labels[record.id]}

    def _row(self, record: Record) -> dict[str, object]:
        setting = {key: value for key, value in record.setting.items() if key not in ("name", *_CELL)}
        numbers = {**record.metrics, **{f"cost.{key}": value for key, value in record.cost.items()}}
        plain = {key: float("nan") if value is None else value for key, value in numbers.items()}
        return {
            **self._cell(record), "call": record.call, "tier": record.tier, "status": record.status,
            "reason": record.reason, "setting": record.setting["name"], **setting, "protocol": record.protocol,
            "engine": record.engine, "precision": record.precision, "device": record.device,
            "fingerprint": record.fingerprint, "commit": record.commit, "finished": record.finished, **plain,
        }  # fmt: skip

    def _together(self, parts: Sequence[tuple[Record, pandas.DataFrame]]) -> pandas.DataFrame:
        import pandas

        if not parts:
            return pandas.DataFrame(columns=list(_CELL))
        frames = []
        for record, part in parts:
            for place, (column, value) in enumerate(self._cell(record).items()):
                part.insert(place, column, value)
            frames.append(part)
        return pandas.concat(frames, ignore_index=True)

    def _varying(self, some: Sequence[Record]) -> list[str]:
        """Name the columns of `frame()` by which these runs can be told apart; "id" where nothing else does."""
        rows = [self._row(record) for record in some]
        measured = {*some[0].metrics, *(f"cost.{key}" for key in some[0].cost)}
        told = {"id", "finished", "commit", "protocol", "fingerprint", *measured}
        return [key for key in rows[0] if key not in told and len({repr(row.get(key)) for row in rows}) > 1] or ["id"]

    # As the command has it ------------------------------------------------------------------------

    @property
    def boards(self) -> Sequence[Leaderboard]:
        """The leaderboards of the last round."""
        return self._boards

    def compare(self, *algorithms: str, metric: str = RANKS_BY[0]) -> Compared:
        """Test whether algorithms differ, paired by split and seed, as `bench compare`.

        Args:
            *algorithms: Two or more, as on the command line; none for all.
            metric: Key of a metric, such as "generic" or "personal@last10".
        """
        boards = self._boards
        if classes.is_derived(metric):
            boards = leaderboards(classes.with_derived(self._records), all_versions=self._all_versions)
        return compare(boards, algorithms, metric)

    def plot(self, metric: str = RANKS_BY[0]) -> Picture:
        """Draw a metric by round, a panel a leaderboard.

        Args:
            metric: A column of `curves()`.
        """
        from bench.face.pictures import curves

        return curves(self._boards, self._records, metric)

    def __str__(self) -> str:
        return as_text(table.terminal(self._boards))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        main = [replace(board, shown=tuple(each.key for each in main_columns(board))) for board in self._boards]
        return table.fragment(main).replace("<table>", '<table style="white-space: nowrap">')


def _plain(label: str) -> str:
    return label.partition(" #")[0]


def load(out: Path | str = "runs", all_versions: bool = False) -> Runs:
    """Read stored results: a folder of runs, or a pack.

    Args:
        out: Where `bench run` wrote, or what was published: "results".
        all_versions: Whether older versions of what was edited since are there too.

    Raises:
        BadConfig: There is no such folder.
    """
    out = Path(out)
    if not out.is_dir():
        raise BadConfig(f"{out}: there is no such folder, 'bench run' makes one")
    known, damaged = records.read_all(out)
    for sentence in damaged:
        warnings.warn(sentence, stacklevel=2)
    return Runs(known, all_versions)
