"""What a run takes along, and what is left of it at home; without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.plugins.registry import ALGORITHMS
from bench.results.claims import Claimed, claim, is_claimed
from bench.sweep import away, freight, scratch
from bench.sweep.away import Home, Letter, Postbox, Returned, contents, place
from bench.sweep.config import Sweep, parse_dataset
from bench.sweep.freight import Lacks, located
from bench.sweep.pool import Failure
from bench.sweep.run import Run
from bench.training.outcome import Report


@pytest.fixture
def run() -> Run:
    method, data = ALGORITHMS["fedavg"](), parse_dataset("digits")
    return Sweep(algorithms=(method,), datasets=(data,), overrides={"rounds": 1}, data_root=Path("nowhere")).expand()[0]


@dataclass
class Here:
    """Ray, as far as a driver needs it, in this process."""

    actors: list[Any] = field(default_factory=list)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "0" * 56)

    def remote(self, **options: Any) -> Any:
        def made(kind: Any) -> Any:
            actor = kind()
            handle = SimpleNamespace(put=SimpleNamespace(remote=actor.put), take=SimpleNamespace(remote=actor.take))
            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: handle))

        return made

    def get(self, value: Any) -> Any:
        return value

    def put(self, value: Any) -> Any:
        return value


def report(round: int) -> Report:
    return Report(round, 4, 1.0, None)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_takes_its_folder_along_claimed_meanwhile_and_comes_home_whole(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / run.id
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"one")
    (folder / "progress.jsonl").write_text("old\n")
    home = Home(Here(), tmp_path)
    taken, along = home.sends(run)
    assert taken == {"checkpoint.pt": b"one"} and along is None and not (folder / "progress.jsonl").exists()
    assert is_claimed(folder)
    with pytest.raises(Claimed):
        Home(Here(), tmp_path).sends(run)
    home.postbox.put.remote(Letter(run.id, report(1), {"checkpoint.pt": b"two", "checkpoint.states": b"s"}))
    home.postbox.put.remote(Letter("another", report(1), {"checkpoint.pt": b"lost"}))
    home.collect()
    assert (folder / "checkpoint.pt").read_bytes() == b"two" and (folder / "checkpoint.states").read_bytes() == b"s"
    assert len((folder / "progress.jsonl").read_text().splitlines()) == 1 and not (tmp_path / "another").exists()
    files = {"run.json": b"{}", "rounds.parquet": b"r", "models/a.safetensors": b"m"}
    assert home.receives(run, Returned(None, files, fetched=7)) is None
    assert names(folder) == {"run.json", "rounds.parquet", "models/a.safetensors", "progress.jsonl"}
    assert not is_claimed(folder) and home.travelled == {"results": 3 + 3 + 1 + 2 + 1 + 1, "data": 7}
    home.postbox.put.remote(Letter(run.id, report(4), {"checkpoint.pt": b"late"}))
    home.collect()
    assert not (folder / "checkpoint.pt").exists(), "a letter that comes after the run is not opened"


def test_a_run_that_stops_brings_its_checkpoint_and_one_whose_folder_is_full_says_so(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, none = Home(Here(), tmp_path), Failure("no memory", "alone")
    home.sends(run)
    assert home.receives(run, Returned(none, {"run.json": b"{}", "checkpoint.pt": b"c"})) is none
    assert names(tmp_path / run.id) == {"run.json", "checkpoint.pt"}
    assert contents(tmp_path / run.id) == {"run.json": b"{}", "checkpoint.pt": b"c"}

    def full(*_: Any) -> None:
        raise OSError("no space")

    home.sends(run)
    monkeypatch.setattr(away, "place", full)
    failure = home.receives(run, Returned(None, {"run.json": b"{}"}))
    assert failure is not None and failure.reason == "no space" and not is_claimed(tmp_path / run.id)


def test_what_nobody_else_needs_stays_where_it_is(tmp_path: Path) -> None:
    for name in (
        "run.json",
        "claim",
        "progress.jsonl",
        "models/x",
        "checkpoint.models/y",
        ".rounds.part",
        "checkpoint.pt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert set(contents(tmp_path)) == {"run.json", "models/x", "checkpoint.pt"}
    assert set(contents(tmp_path, models=False)) == {"run.json", "checkpoint.pt"}
    place(tmp_path, {"run.json": b"2"})
    assert not [*tmp_path.glob("checkpoint*")] and (tmp_path / "run.json").read_bytes() == b"2"


def test_letters_come_in_their_order_and_once() -> None:
    box = Postbox()
    for k in range(3):
        box.put(Letter("a", report(k), {}))
    assert [letter.report.round for letter in box.take()] == [0, 1, 2] and box.take() == []


# Data --------------------------------------------------------------------------------------------------------


def test_data_are_found_sent_for_once_and_refused_if_damaged(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", cast(Any, Here()))
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    assert located(run, None) == (replace(run, data_root=tmp_path), 0), "digits are everywhere"
    monkeypatch.setattr(freight, "_PIECE", 1 << 14)
    along = freight.packed(Here(), run)
    assert len(along.pieces) > 2 and sum(map(len, along.pieces)) == along.nbytes
    monkeypatch.setattr(freight, "_has", lambda run, root: False)
    with pytest.raises(Lacks):
        located(run, None)
    here, sent = located(run, along)
    assert here.data_root == tmp_path / "packs" / f"{along.fingerprint}.npz" and sent == along.nbytes
    assert located(run, along) == (here, 0), "the next run finds it"
    here.data_root.unlink()
    torn = replace(along, pieces=(*along.pieces[:1], bytes(len(along.pieces[1])), *along.pieces[2:]))
    with pytest.raises(Exception, match=r"npz|damaged|written"):
        located(run, torn)
    assert not [*(tmp_path / "packs").iterdir()], "what is damaged does not stay"
    monkeypatch.setattr(freight, "MOST_BYTES", 1000)
    home = Home(Here(), tmp_path / "out")
    home.sends(run)
    failure = home.receives(run, Returned(None, {}, lacks=True))
    assert failure is not None and failure.again == "never" and "GiB that a run reads are too much" in failure.reason


def test_a_machine_that_lacks_data_is_sent_them_with_the_next_attempt(tmp_path: Path, run: Run) -> None:
    home = Home(Here(), tmp_path)
    home.sends(run)
    failure = home.receives(run, Returned(None, {}, lacks=True))
    assert failure is not None and failure.again == "sent" and "they go along now" in failure.reason
    home.loses(run)
    _, along = home.sends(run)
    assert along is not None and along.nbytes > 0


# Folders -----------------------------------------------------------------------------------------------------


def test_a_folder_goes_with_its_process_and_what_was_left_goes_with_the_next(tmp_path: Path) -> None:
    left, alive, other = tmp_path / "mine-left", tmp_path / "mine-alive", tmp_path / "yours"
    for each in (left, alive, other):
        each.mkdir()
    with claim(alive), scratch.folder(tmp_path, "mine-") as made:
        assert made.name.startswith("mine-") and made.stat().st_mode & 0o777 == 0o700
        assert not left.exists() and alive.exists() and other.exists()
    assert not made.exists()
