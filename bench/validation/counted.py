"""The counts of right answers in one run's folder: what they are of, and whether they give its metrics and curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bench.results.curves import curves as computed
from bench.results.record import DOCUMENT, DamagedResult, Record
from bench.results.tables import COUNT_COLUMNS, COUNTS, PREDICTION_COLUMNS, PREDICTIONS, ROUNDS
from bench.training import metrics
from bench.validation.expected import Cells, drawn_by, evaluations, tested_models
from bench.validation.found import Inspected, brief, close

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
    names = (COUNTS, PREDICTIONS) if PREDICTIONS in record.companions else (COUNTS,)
    frames = {name: _frame(found, name, partial(_raw, record, name)) for name in names}
    rounds = _frame(found, ROUNDS, record.rounds)
    fit = [frame is not None and _rows_fit(found, record, name, frame) for name, frame in frames.items()]
    if all(fit) and _apart(found, frames) and (counts := _frame(found, COUNTS, record.counts)) is not None:
        _tests(found, counts)
        _measured(found, record, counts, rounds)
        if (predictions := frames.get(PREDICTIONS)) is not None:
            _predicted(found, predictions)


def _raw(record: Record, name: str) -> pandas.DataFrame:
    frame: pandas.DataFrame = record.table(name).to_pandas()
    return frame


def _frame(found: Inspected, name: str, read: Callable[[], pandas.DataFrame]) -> pandas.DataFrame | None:
    try:
        return read()
    except DamagedResult:  # that was said
        return None
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


def _rows_fit(found: Inspected, record: Record, name: str, frame: pandas.DataFrame) -> bool:
    """Look at each row of counts or predictions; tell whether metrics can be computed of them."""
    file, columns = _file(found, name), COUNT_COLUMNS if name == COUNTS else PREDICTION_COLUMNS
    if tuple(frame.columns) != columns:
        found.add(file, "", f"has the columns {', '.join(frame.columns)}, and must have {', '.join(columns)}")
        return False
    for column in columns:
        texts = column == "model"
        kinds = {type(cell) for cell in frame[column]} if texts else {frame[column].dtype.kind}
        if not kinds <= ({str} if texts else {"i", "u"}):
            found.add(file, column, f"holds other things than {'texts' if texts else 'whole numbers'}")
            return False
    kind = frame["model"].map({model: _kind(model) for model in frame["model"].unique()})
    client, classes = frame["client"], len(record.class_counts)
    low, high = 0, np.inf
    clients = None if found.asked is None else found.clients
    if clients is not None and found.asked is not None:
        low, high = clients - found.asked.setting.unseen, clients
    at_home = (
        ((kind == "generic") & (client == -1))
        | ((kind == "personal") & (client >= 0) & (client < (low or np.inf)))
        | ((kind == "unseen") & (client >= low) & (client < high))
    )
    asks = kind == "personal"
    wrong = {
        "model": (~kind.isin(("generic", "personal", "unseen")), "is of no kind that is tested"),
        "client": (~at_home, "is no client of the model"),
        "class": ((frame["class"] < 0) | (frame["class"] >= classes), f"is none of the {classes} classes"),
        "drawn": (asks != frame["drawn"].isin((0, 1)), "does not say whether the client was drawn"),
        "": (frame.duplicated(_CELLS[name]), "stands there twice"),
    }
    if name == COUNTS:
        wrong["total"] = frame["total"] < 1, "is below 1: what has no test images has no row"
        wrong["correct"] = (frame["correct"] < 0) | (frame["correct"] > frame["total"]), "is not between 0 and total"
    else:
        others = (frame["predicted"] < 0) | (frame["predicted"] >= classes)
        wrong["predicted"] = others, f"is none of the {classes} classes"
        wrong["count"] = frame["count"] < 1, "is below 1: what never happened has no row"
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
    asked, dealt = found.asked, found.dealt
    if asked is not None:
        rounds, wanted = sorted(frame["round"].unique().tolist()), evaluations(asked.trained_by)
        if rounds != wanted:
            found.add(
                _file(found, COUNTS),
                "round",
                f"has {brief(rounds)}, and by the setting models are tested after {brief(wanted)}",
            )
        each, final = tested_models(asked)
        there: dict[int, set[str]] = {}
        for round, model in frame[["round", "model"]].drop_duplicates().itertuples(index=False):
            there.setdefault(round, set()).add(model)
        for round, named in sorted(there.items()):
            names = final if round == asked.trained_by.rounds else each
            if not asked.outdated and named != names:
                apart = ", ".join(sorted(named ^ names))
                found.add(
                    _file(found, COUNTS, round),
                    "model",
                    f"has not the models of {asked.record.algorithm} after round {round}: {apart}",
                )
        if found.clients is not None:
            _drawn(found, frame[frame["drawn"] != -1], drawn_by(asked, found.clients), found.clients)
    references = dict(dealt.tested) if dealt is not None else {}
    codes, names_ = frame["model"].factorize()
    columns = [frame[column].to_numpy() for column in ("class", "client", "round")]
    order = np.lexsort((columns[0], columns[1], codes, columns[2]))
    rounds_, codes = columns[2][order], codes[order]
    changes = np.flatnonzero(np.diff(rounds_, prepend=-1) | np.diff(codes, prepend=-1))
    cells_ = np.stack([frame[column].to_numpy(dtype=np.int64)[order] for column in ("client", "class", "total")])
    for start, stop in itertools.pairwise([*changes, len(order)]):
        cells, model = cells_[:, start:stop], str(names_[codes[start]])
        kind = _kind(model)
        reference = references.setdefault(kind, cells)
        found.tested.setdefault(kind, cells)
        if not np.array_equal(cells, reference):
            whose = "by the data" if dealt is not None else "of the other models"
            place = f"round {rounds_[start]}, model {model}"
            found.add(
                _file(found, COUNTS, int(rounds_[start])),
                "total",
                f"has other test images than those {whose}: {place}, {apart_at(cells, reference)}",
            )
    plain, masked = (frame[frame["model"] == model] for model in ("personal", "personal.masked"))
    both = plain.merge(masked, on=["round", "client", "class"], suffixes=("", "_masked"))
    odd = both[(both["correct_masked"] < both["correct"]) & (both["correct_masked"] > 0)]
    if len(odd):
        first = ", ".join(f"{column} {odd.iloc[0][column]}" for column in ("round", "client", "class"))
        what = "of personal.masked is below that of personal, and leaving classes out takes no right answer away, in"
        file = _file(found, COUNTS, int(odd.iloc[0]["round"]))
        found.add(file, "correct", f"{what} {len(odd)} row(s), the first: {first}")


def _apart(found: Inspected, frames: Mapping[str, pandas.DataFrame | None]) -> bool:
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


def _drawn(found: Inspected, frame: pandas.DataFrame, known: Sequence[frozenset[int]], clients: int) -> None:
    """See that the clients that are said to have been drawn are those of the cohorts."""
    by_then = np.zeros((len(known) + 1, clients), dtype=bool)
    for round, those in enumerate(known, start=1):
        by_then[round, list(those)] = True
    rounds, client = frame["round"].to_numpy(), frame["client"].to_numpy()
    inside = (rounds > 0) & (rounds <= len(known)) & (client >= 0) & (client < clients)
    wanted = inside & by_then[np.where(inside, rounds, 0), np.where(inside, client, 0)]
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
    final = {key: value for key, value in rows[-1].items() if key != "round"}
    for key in metrics.FOLLOWED:
        final |= {f"{key}@last10": metrics.last_mean(rows, key), f"{key}@best": metrics.best(rows, key)}
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
