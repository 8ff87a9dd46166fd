"""What MLflow is told of a run: the same words whether it is watched live or read from its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.protocol.identity import identify
from bench.protocol.words import spell_imbalance
from bench.results.record import DOCUMENT, Record
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.sweep.run import Run

RUN_TAG, PROTOCOL_TAG, RECORD_TAG, FOLDER_TAG = "bench.run_id", "bench.protocol", "bench.record", "bench.folder"
"""RECORD_TAG is logged last: an MLflow run that has it shows all of the record with that key."""
PARENT_TAG = "mlflow.parentRunId"


class Point(NamedTuple):
    """A value of a metric."""

    metric: str
    """As MLflow spells it."""
    value: float
    milliseconds: int
    """Since 1970."""
    step: int
    """Rounds completed."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A run, as it is created in MLflow."""

    id: str
    title: str
    tags: dict[str, str]
    params: dict[str, str]


def metric_name(key: str) -> str:
    """Spell a metric with the characters that MLflow allows: `generic@last10` becomes `generic_last10`."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


def points(values: Mapping[str, float | None], milliseconds: int, step: int) -> list[Point]:
    """Turn metrics of a round into points; what is absent has none."""
    there = ((metric_name(key), value) for key, value in values.items() if value is not None)
    return [Point(key, float(value), milliseconds, step) for key, value in there if math.isfinite(value)]


def places(points: Iterable[Point]) -> set[tuple[str, int]]:
    """Give metric and step of points: what an MLflow run needs once."""
    return {(point.metric, point.step) for point in points}


def of_run(run: Run) -> Described:
    """Describe a run that is to be done."""
    return _describe(run.id, run.protocol, run.identity(), run.fields(), run.label)


def of_record(record: Record) -> Described:
    """Describe a finished or failed run."""
    algorithm = record.label or record.call
    return _describe(record.id, record.protocol, record.identity, record.setting, algorithm)


def _describe(
    run_id: str, protocol: str, identity: Mapping[str, Any], setting: Mapping[str, Any], algorithm: str
) -> Described:
    dataset, seed = identity["dataset"]["name"], str(identity["seed"])
    imbalance, alpha = spell_imbalance(setting["imbalance"]), setting["alpha"]
    method = identity["algorithm"]
    pieces = [method, *method.get("parts", ())]
    called = "+".join(piece["name"] for piece in pieces)
    cell = {"algorithm": plain(called), "dataset": plain(dataset), "setting": plain(setting["name"]), "seed": seed}
    cell |= {"imbalance": imbalance} | ({} if alpha is None else {"alpha": f"{alpha:g}"})
    parts = {"algorithm": method["fields"], "dataset": identity["dataset"]["fields"], "setting": setting}
    parts |= {f"algorithm.{piece['name']}": piece["fields"] for piece in pieces[1:]}
    params = {
        metric_name(f"{part}.{key}"): _text(value) for part, values in parts.items() for key, value in values.items()
    }
    params |= {key: _text(identity[key]) for key in ("engine", "precision", "device", "weights") if key in identity}
    for key in ("lr", "auxiliary", "teacher"):  # of a preset; images at the server; the digest of features
        if key in method:
            params[f"algorithm.{key}"] = _text(method[key])
    concentration = "" if alpha is None else f" alpha {alpha:g}"
    return Described(
        id=run_id,
        title=plain(f"{algorithm} {dataset} imbalance {imbalance}{concentration} seed {seed}"),
        tags={RUN_TAG: run_id, PROTOCOL_TAG: protocol, **cell, "protocol": protocol},
        params={**params, **cell, "protocol": protocol},
    )


def _text(value: object) -> str:
    """Write a value alike whether it has been JSON or not."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else plain(value)


# Of a record ------------------------------------------------------------------------------------------------


def record_key(record: Record) -> str:
    """Give 12 hexadecimal digits that tell this outcome of a run from another one, of `--force` or a later try."""
    known = record.document.get
    outcome = {key: known(key) for key in ("status", "started", "finished", "digest", "reason")}
    return identify({"id": record.id, **outcome})


def record_tags(record: Record) -> dict[str, str]:
    """Give what is known of a run only at its end."""
    recorded = record.document.get("versions")
    versions = recorded if isinstance(recorded, dict) else {}
    tags = {
        "bench.fingerprint": record.fingerprint,
        "bench.digest": record.document.get("digest"),
        "bench.commit": record.commit,
        "reason": record.reason,
        **{metric_name(f"version.{key}"): value for key, value in versions.items()},
    }
    return {key: plain(value) for key, value in tags.items() if value is not None} | {RECORD_TAG: record_key(record)}


def record_times(record: Record) -> tuple[int, int]:
    """Give when a run began and ended, in milliseconds since 1970.

    A record that does not know, because the run's worker died, was written when it ended.
    """
    ended = _milliseconds(record.finished) or int((record.folder / DOCUMENT).stat().st_mtime * 1000)
    return min(_milliseconds(record.document.get("started")) or ended, ended), ended


def record_points(record: Record) -> list[Point]:
    """Give a finished run's curves, the means and bests of its last round, and its cost; nothing of a failed one.

    Raises:
        DamagedResult: The curves' file is not what was written.
    """
    if record.status != "done":
        return []
    _, ended = record_times(record)
    frame = record.rounds()
    metrics = [metric_name(str(column)) for column in frame.columns]
    curves = [
        Point(metric, value, ended, int(row[0]))
        for row in frame.astype(float).to_numpy().tolist()
        for metric, value in zip(metrics, row, strict=True)
        if metric != "round" and math.isfinite(value)
    ]
    last = int(frame["round"].max())
    final = {key: value for key, value in record.metrics.items() if "@" in key}
    return curves + points(final | {f"cost.{key}": value for key, value in record.cost.items()}, ended, last)


def _milliseconds(moment: object) -> int | None:
    try:
        return int(datetime.fromisoformat(str(moment)).timestamp() * 1000)
    except ValueError:
        return None
