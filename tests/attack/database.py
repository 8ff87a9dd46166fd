"""MLflow's database, damaged or half made: told, moved away or mended, and no result is lost."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.checkpoints import cut, flipped, hole
from tests.attack.frame import TRIES, Try, copied, made
from tests.attack.verdict import Answer, apart, calm, equal, require

AREA = "damaged mlflow.db, then run and track"
ASKED = (
    "run",
    "--algos",
    "fedavg,fedrep(head_epochs=1)",
    "--rounds",
    2,
    "--epochs",
    1,
    "--ray",
    "off",
    "--json",
    "--out",
    "out",
)


@made
def tracked() -> None:
    """Two runs and their database."""
    Path("wanted.json").write_text(calm(apart(*ASKED)).out)
    require(Path("out/mlflow.db").exists(), "there is no database")


def _digests(answer: Answer) -> dict[str, object]:
    require(answer.out.startswith("{"), f"nothing was printed: {answer.err[-300:]}")
    return {run["id"]: run["digest"] for run in json.loads(answer.out)["runs"]}


def _mended(damage: Callable[[Path], object]) -> None:
    """Whatever is done to it: runs go on, and after at most what the sentence asks for everything is in a database."""
    out = copied("tracked", "kept")
    (out / "out").rename("out")
    damage(Path("out/mlflow.db"))
    again = calm(apart(*ASKED))
    require(again.status == 0, f"exit status {again.status}: {again.err[-300:]}")
    equal(_digests(again), _digests(Answer(0, (out / "wanted.json").read_text(), "")))
    track = calm(apart("track", "--out", "out"))
    require(track.status == 0, f"track never ends well: {track.err[-300:]}")
    last = calm(apart("track", "--out", "out"))
    require(last.status == 0 and "2 there already" in last.text, f"not everything is there: {last.text[-200:]}")


def _bytes(change: Callable[[bytes, int], bytes], share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(change(content, int(share * len(content))))


def _half_made(file: Path) -> None:
    """As a kill while the tables are made leaves it: some are there, the version is not."""
    with sqlite3.connect(file) as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        for name in {"alembic_version", *sorted(tables)[::2]}:
            if name in tables and not name.startswith("sqlite"):
                database.execute(f'drop table "{name}"')
    database.close()


def _no_version(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("delete from alembic_version")
    database.close()


def _replaced(by: Callable[[Path], object], file: Path) -> None:
    file.unlink()
    by(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in half": partial(_bytes, cut, 0.5),
    "cut after its header": partial(_bytes, cut, 0.002),
    "a hole of zeros": partial(_bytes, hole, 0.3),
    "its header overwritten": partial(_bytes, hole, 0),
    "half made": _half_made,
    "without its version": _no_version,
    "empty": partial(_replaced, lambda file: file.write_bytes(b"")),
    "a text": partial(_replaced, lambda file: file.write_text("dear diary\n" * 100)),
    "a folder": partial(_replaced, os.mkdir),
    "a bit changed in its schema": partial(_bytes, flipped, 0.001),
}
for name, damage in DAMAGES.items():
    TRIES.append(Try(area=AREA, name=name, act=partial(_mended, damage), needs=("tracked",), seconds=240, memory=None))
