"""The counts of right answers in one run's folder: what they are of, and whether they give its metrics and curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pandas.api.types import is_string_dtype

from bench.results import content
from bench.results.curves import curves as computed
from bench.results.record import DOCUMENT, Record
from bench.results.tables import COUNT_COLUMNS, COUNTS, PREDICTION_COLUMNS, PREDICTIONS, ROUNDS, together
from bench.results.tables import curves as laid_out
from bench.training import metrics, open_set
from bench.training.robustness import ROBUST
from bench.validation.expected import Cells, Numbers, countable, evaluations, first_drawn, tested_models
from bench.validation.found import Inspected, brief, close
from bench.validation.rebuilding import Asked

if TYPE_CHECKING:
    import pandas

_CELLS = {
    COUNTS: ["round", "model", "client", "class"],
    PREDICTIONS: ["round", "model", "client", "class", "predicted"],
}
"""What no two rows have in common."""


def look(found: Inspected) -> None:
    """Look at a finished run's counts and curves."""
    record = found.record
    assert record is not None
    frames = {name: frame for name in found.tables if (frame := _frame(found, name)) is not None}
    wanted = {COUNTS, PREDICTIONS} & set(record.companions)
    fit = [name in frames and _rows_fit(found, record, name, frames[name]) for name in sorted(wanted)]
    if all(fit) and _apart(found, frames):
        counts = together(found.tables[COUNTS], found.tables.get(PREDICTIONS)).to_pandas()
        _tests(found, counts)
        _measured(found, record, counts, frames.get(ROUNDS))
        if PREDICTIONS in frames:
            _predicted(found, frames[PREDICTIONS])


def _frame(found: Inspected, name: str) -> pandas.DataFrame | None:
    try:
        frame: pandas.DataFrame = found.tables[name].to_pandas()
        return frame
    except Exception as error:  # whatever a made-up file makes of pyarrow
        found.add(_file(found, name), "", f"is no table that can be read ({type(error).__name__})")
        return None


def _file(found: Inspected, name: str, round: int | None = None) -> str:
    """Name the file of a table; of counts after a round, the one that tells them."""
    assert found.record is not None
    files = found.record.companions
    if name == COUNTS and PREDICTIONS in files and found.asked is not None and round == found.asked.trained_by.rounds:
        return files[PREDICTIONS]
    return files[name]


def _kind(model: str) -> str:
    """Give whose test images a model is tested on: "generic", "personal" or "unseen"."""
    return model.split(":")[0].split(".")[0]


def _tested_on(model: str) -> str:
    """Give which images a model is tested on: those of its kind, or of these the ones that are attacked."""
    return f"{_kind(model)}.{ROBUST}" if model.endswith(f".{ROBUST}") else _kind(model)


def _rows_fit(found: Inspected, record: Record, name: str, frame: pandas.DataFrame) -> bool:
    """Look at each row of counts or predictions; tell whether metrics can be computed of them."""
    file, columns = _file(found, name), COUNT_COLUMNS if name == COUNTS else PREDICTION_COLUMNS
    if tuple(frame.columns) != columns:
        found.add(file, "", f"has the columns {', '.join(frame.columns)}, and must have {', '.join(columns)}")
        return False
    for column in columns:
        texts, cells = column == "model", frame[column]
        if cells.isna().any() or not (is_string_dtype(cells) if texts else cells.dtype.kind in "iu"):
            found.add(file, column, f"holds other things than {'texts' if texts else 'whole numbers'}")
            return False
    codes, models = frame["model"].factorize()
    kinds = [_kind(model) for model in models]
    generic, asks, unseen = (
        np.array([kind == of for kind in kinds], dtype=bool)[codes] for of in ("generic", "personal", "unseen")
    )
    cell = {column: frame[column].to_numpy() for column in columns}
    client, classes = cell["client"], len(record.class_counts)
    low, high = 0, np.inf
    clients = None if found.asked is None else found.clients
    if clients is not None and found.asked is not None:
        low, high = clients - found.asked.setting.unseen, clients
    at_home = (
        (generic & (client == -1))
        | (asks & (client >= 0) & (client < (low or np.inf)))
        | (unseen & (client >= low) & (client < high))
    )
    wrong = {
        "model": (~(generic | asks | unseen), "is of no kind that is tested"),
        "client": (~at_home, "is no client of the model"),
        "class": ((cell["class"] < 0) | (cell["class"] >= classes), f"is none of the {classes} classes"),
        "drawn": (asks != np.isin(cell["drawn"], (0, 1)), "does not say whether the client was drawn"),
        "": (frame.assign(model=codes).duplicated(_CELLS[name]).to_numpy(), "stands there twice"),
    }
    if name == COUNTS:
        right, total = cell["correct"], cell["total"]
        wrong["total"] = total < 1, "is below 1: what has no test images has no row"
        wrong["correct"] = (right < 0) | (right > total), "is not between 0 and total"
    else:
        others = (cell["predicted"] < 0) | (cell["predicted"] >= classes)
        wrong["predicted"] = others, f"is none of the {classes} classes"
        wrong["count"] = cell["count"] < 1, "is below 1: what never happened has no row"
    fits = True
    for key, (rows, what) in wrong.items():
        if rows.any():
            first = frame[rows].iloc[0]
            place = ", ".join(f"{column} {first[column]}" for column in _CELLS[name])
            found.add(file, key, f"{what} in {int(rows.sum())} row(s), the first: {place}")
            fits = fits and key in ("correct", "total", "client", "drawn")
    return fits


def _tests(found: Inspected, frame: pandas.DataFrame) -> None:
    """See that all models were tested, when they should be, on the same images."""
    codes, names = frame["model"].factorize()
    rounds, models = frame["round"].to_numpy(), [str(name) for name in names]
    order = np.lexsort((codes, rounds))  # by client and class they are sorted
    codes, rounds = codes[order], rounds[order]
    cells = np.stack([frame[name].to_numpy(dtype=np.int64)[order] for name in ("client", "class", "total", "correct")])
    changes = np.flatnonzero(np.diff(rounds, prepend=-1) | np.diff(codes, prepend=-1))
    tables = {
        (int(rounds[start]), models[codes[start]]): cells[:, start:stop]
        for start, stop in itertools.pairwise([*changes, len(order)])
    }
    if found.asked is not None:
        _models(found, found.asked, tables)
        if found.clients is not None and countable(found.asked.trained_by, found.clients):
            first, rounds_ = first_drawn(found.asked, found.clients), found.asked.trained_by.rounds
            _drawn(found, frame[frame["drawn"] != -1], first, rounds_)
    _images(found, {place: table[:3] for place, table in tables.items()})
    odd: list[tuple[int, int, int]] = []
    for (round, model), masked in tables.items():
        plain = tables.get((round, "personal"))
        if model == "personal.masked" and plain is not None and np.array_equal(plain[:3], masked[:3]):
            fewer = (masked[3] < plain[3]) & (masked[3] > 0)
            odd += [(round, client, label) for client, label in masked[:2, fewer].T.tolist()]
    if odd:
        round, client, label = odd[0]
        what = "of personal.masked is below that of personal, and leaving classes out takes no right answer away, in"
        place = f"round {round}, client {client}, class {label}"
        found.add(_file(found, COUNTS, round), "correct", f"{what} {len(odd)} row(s), the first: {place}")


def _models(found: Inspected, asked: Asked, tested: Iterable[tuple[int, str]]) -> None:
    """See that the right models were tested after the right rounds."""
    there: dict[int, set[str]] = {}
    for round, model in tested:
        there.setdefault(round, set()).add(model)
    wanted = evaluations(asked.trained_by)
    if sorted(there) != wanted:
        what = f"has {brief(sorted(there))}, and by the setting models are tested after {brief(wanted)}"
        found.add(_file(found, COUNTS), "round", what)
    each, final = tested_models(asked)
    for round, named in there.items():
        names = final if round == asked.trained_by.rounds else each
        if not asked.outdated and named != names:
            what = f"has not the models of {asked.record.algorithm} after round {round}: "
            found.add(_file(found, COUNTS, round), "model", what + ", ".join(sorted(named ^ names)))


def _images(found: Inspected, tested: Mapping[tuple[int, str], Cells]) -> None:
    """See that all models of a kind were tested on the same images, those of the split where it is known."""
    references = {} if found.dealt is None else dict(found.dealt.tested)
    whose = "of the other models" if found.dealt is None else "by the data"
    for (round, model), cells in tested.items():
        reference = references.setdefault(_tested_on(model), cells)
        found.tested.setdefault(_tested_on(model), cells)
        if not np.array_equal(cells, reference):
            what = f"has other test images than those {whose}: round {round}, model {model}"
            found.add(_file(found, COUNTS, round), "total", f"{what}, {apart_at(cells, reference)}")


def _apart(found: Inspected, frames: Mapping[str, pandas.DataFrame]) -> bool:
    """Tell whether predictions are of one evaluation, after those of which there are counts."""
    counts, predictions = frames.get(COUNTS), frames.get(PREDICTIONS)
    if counts is None or predictions is None:
        return True
    last, before = sorted(predictions["round"].unique().tolist()), sorted(counts["round"].unique().tolist())
    if len(last) != 1:
        found.add(_file(found, PREDICTIONS), "round", f"has {brief(last)}, and must be of the last evaluation alone")
        return False
    if before and before[-1] >= last[0]:
        what = f"has {brief(before)}, and the last evaluation, of which predictions are, is after round {last[0]}"
        found.add(_file(found, COUNTS), "round", what)
        return False
    return True


def _predicted(found: Inspected, frame: pandas.DataFrame) -> None:
    """See that no masked prediction is of a class that is left out."""
    held = {} if found.dealt is None else found.dealt.held
    rows = frame[frame["model"].str.endswith(".masked")]
    pairs = zip(rows["client"].tolist(), rows["predicted"].tolist(), strict=True)
    # Of who has no training images all classes would be left out, and the first is what is left.
    odd = [pair for pair in pairs if held.get(pair[0]) and pair[1] not in held[pair[0]]]
    if odd:
        what = "is a class that the client never trained on, which masked models leave out, in"
        place = f"client {odd[0][0]}, predicted {odd[0][1]}"
        found.add(_file(found, PREDICTIONS), "predicted", f"{what} {len(odd)} row(s), the first: {place}")


def _drawn(found: Inspected, frame: pandas.DataFrame, first: Numbers, last: int) -> None:
    """See that the clients that are said to have been drawn are those of the cohorts, by their `first`."""
    rounds, client = frame["round"].to_numpy(), frame["client"].to_numpy()
    inside = (rounds > 0) & (rounds <= last) & (client >= 0) & (client < len(first))
    wanted = inside & (first[np.where(inside, client, 0)] <= rounds)
    others = rounds[(frame["drawn"].to_numpy() == 1) != wanted]
    if len(others):
        found.add(
            _file(found, COUNTS, int(others.min())),
            "drawn",
            f"names others than the clients drawn by round {others.min()}",
        )


def apart_at(cells: Cells, reference: Cells) -> str:
    """Say where two sets of test images differ first."""
    here, there = ({(k, c): n for k, c, n in table.T.tolist()} for table in (cells, reference))
    client, which = min(cell for cell in {*here, *there} if here.get(cell) != there.get(cell))
    numbers = here.get((client, which), 0), there.get((client, which), 0)
    return f"client {client}, class {which}: {numbers[0]} and not {numbers[1]}"


# Its metrics ------------------------------------------------------------------------------------------------


def _measured(found: Inspected, record: Record, counts: pandas.DataFrame, curves: pandas.DataFrame | None) -> None:
    """Compute every metric anew from the counts: of each round, of the last, of the last ten and of the best."""
    classes = len(record.class_counts)
    if any(not 0 <= label < classes for those in record.groups.values() for label in those):
        return  # that they are not the groups of the classes was said
    rows = computed(counts, classes, record.groups)
    if curves is not None:
        _curves(found, rows, curves)
    elif record.pack is not None and content.digest(laid_out(rows)) != record.tables[ROUNDS]:
        found.add(_file(found, ROUNDS), "", "was another when the run was packed than what the stored counts give")
    final = {key: value for key, value in rows[-1].items() if key != "round"}
    for key in metrics.FOLLOWED:
        final |= {f"{key}@last10": metrics.last_mean(rows, key), f"{key}@best": metrics.best(rows, key)}
    if found.asked is not None and found.asked.trained_by.open_classes:
        final |= _open_set(found, record)
    for key in dict.fromkeys((*final, *record.metrics)):
        if key not in final:
            found.add(DOCUMENT, f"metrics.{key}", "is no metric of the stored counts")
        elif key not in record.metrics:
            found.add(DOCUMENT, f"metrics.{key}", "is not there")
        elif not close(record.metrics[key], final[key]):
            found.add(DOCUMENT, f"metrics.{key}", f"is {record.metrics[key]}, and the stored counts give {final[key]}")
    for key, value in record.metrics.items():
        if value is not None and not 0 <= value <= 1:
            found.add(DOCUMENT, f"metrics.{key}", f"is {value}, and must lie between 0 and 1")


def _open_set(found: Inspected, record: Record) -> dict[str, float | None]:
    """Look at the lines of an open-set test, and compute its metrics anew."""
    asked = {client: open_set.asked_of(written) for client, written in record.open_set.items()}
    if odd := [client for client, written in record.open_set.items() if not open_set.is_line(written)]:
        found.add(DOCUMENT, f"open_set.{odd[0]}", "is no line of an open-set test")
        return dict.fromkeys(open_set.METRICS)
    if found.dealt is not None:
        wanted = {str(client): numbers for client, numbers in found.dealt.open_set.items()}
        if asked != wanted:
            client = next(c for c in dict.fromkeys((*asked, *wanted)) if asked.get(c) != wanted.get(c))
            told = f"has {brief(asked.get(client))} images of known and of open classes"
            found.add(DOCUMENT, f"open_set.{client}", f"{told}, and by the data it is {brief(wanted.get(client))}")
    return open_set.measured(record.open_set)


def _curves(found: Inspected, rows: Sequence[Mapping[str, float | int | None]], frame: pandas.DataFrame) -> None:
    """Compare the curves with what the counts give, row by row."""
    columns = dict.fromkeys(key for row in rows for key in row)
    if (
        list(frame.columns[:1]) != ["round"]
        or set(frame.columns) != set(columns)
        or len(set(frame.columns)) < frame.shape[1]
    ):
        apart = ", ".join(sorted(set(columns) ^ set(frame.columns))) or "their order"
        found.add(_file(found, ROUNDS), "", f"has not the columns round and the metrics of the stored counts: {apart}")
        return
    if any(frame[column].dtype.kind not in "iuf" for column in frame.columns if frame[column].notna().any()):
        found.add(_file(found, ROUNDS), "", "holds other things than numbers")
        return
    if frame["round"].tolist() != [row["round"] for row in rows]:
        stored = brief(frame["round"].tolist())
        found.add(
            _file(found, ROUNDS),
            "round",
            f"is {stored}, and the stored counts are of rounds {brief([row['round'] for row in rows])}",
        )
        return
    for column in list(columns)[1:]:
        for row, written in zip(rows, frame[column].tolist(), strict=True):
            there = None if written is None or math.isnan(written) else float(written)
            if not close(there, row.get(column)):
                place = f"is {there} after round {row['round']}"
                found.add(_file(found, ROUNDS), column, f"{place}, and the stored counts give {row.get(column)}")
                break
