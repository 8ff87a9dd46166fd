"""Damaged checkpoints and states, and a loss of power: the numbers of an undisturbed run, or the same anew."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contract import toy
from bench.face.progress import Display
from bench.plugins.registry import ALGORITHMS
from bench.results import records
from bench.sweep import config, driver, execution, watch
from bench.sweep.config import parse_algorithms, parse_datasets
from bench.sweep.pool import InProcess
from bench.sweep.run import Run as Cell
from bench.system import durable
from bench.training import checkpoint, rounds, states
from bench.training.job import Job
from bench.training.outcome import Outcome, Report
from bench.training.rounds import Run, train
from bench.training.states import InFile, StatesDamaged
from tests.power import Disk, restore

ROUNDS = 3


class Stopped(BaseException):
    """The process is killed."""


def job(algorithm: str = "fedper") -> Job:
    setting = replace(toy.SETTING, rounds=ROUNDS, epochs=1, participation=0.5)
    return toy.run(ALGORITHMS[algorithm](), setting=setting).job


def after(stop: int) -> Callable[[Report], None]:
    def report(news: Report) -> None:
        if news.round == stop:
            raise Stopped

    return report


def taken_up(of: Job, file: Path) -> tuple[Outcome, int, str | None]:
    """Do what is left of a run: its outcome, the rounds that were not done again, and why it began anew."""
    news: list[Report] = []
    outcome = train(of, checkpoint=file, report=news.append)
    anew = next((report.anew for report in news if report.anew is not None), None)
    done = [report.round for report in news if report.anew is None]
    return outcome, ROUNDS - len(done) if anew is None else 0, anew


@pytest.fixture(params=["in memory", "in a file"])
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(rounds.Run, "_is_due", lambda run: True)
    if request.param == "in a file":
        monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    return str(request.param)


@pytest.fixture
def left(stored: str, tmp_path: Path) -> dict[str, bytes]:
    """What a run that was killed after two rounds has left."""
    with pytest.raises(Stopped):
        train(job(), checkpoint=tmp_path / "left" / "checkpoint.pt", report=after(2))
    return {path.name: path.read_bytes() for path in (tmp_path / "left").iterdir()}


@pytest.fixture(scope="module")
def wanted() -> Outcome:
    return train(job())


def same(found: Outcome, wanted: Outcome) -> bool:
    known = ("digest", "metrics", "rounds", "tested")
    spent = [{key: each.cost[key] for key in (*rounds.WORK, "bytes_up", "bytes_down")} for each in (found, wanted)]
    counts = [[(tally.round, tally.model, tally.rows.tolist()) for tally in each.counts] for each in (found, wanted)]
    alike = all(str(getattr(found, key)) == str(getattr(wanted, key)) for key in known)  # a NaN is no NaN
    return alike and spent[0] == spent[1] and counts[0] == counts[1]


# Damage -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on(left: dict[str, bytes], tmp_path: Path, wanted: Outcome) -> None:
    outcome, kept, anew = taken_up(job(), tmp_path / "left" / "checkpoint.pt")
    assert same(outcome, wanted) and (kept, anew) == (2, None)


def flipped(content: bytes, place: int) -> bytes:
    bit = 1 << place % 8
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def cut(content: bytes, place: int) -> bytes:
    return content[:place]


def hole(content: bytes, place: int) -> bytes:
    start = place - place % 4096
    size = len(content[start : start + 4096])
    return content[:start] + bytes(size) + content[start + 4096 :]


@pytest.mark.parametrize("damage", [flipped, cut, hole])
def test_damage_anywhere_changes_no_number_and_is_said(
    damage: Callable[[bytes, int], bytes], left: dict[str, bytes], tmp_path: Path, wanted: Outcome
) -> None:
    chosen = random.Random(damage.__name__)
    for file, content in left.items():
        edges = [0, 25, len(content) - 1] if file == "checkpoint.pt" else [0]
        for number, place in enumerate([*edges, *(chosen.randrange(len(content)) for _ in range(3))]):
            damaged = damage(content, place)
            folder = tmp_path / f"{file}-{number}"
            restore({**left, file: damaged}, folder)
            outcome, kept, anew = taken_up(job(), folder / "checkpoint.pt")
            assert same(outcome, wanted), f"{file} at byte {place}"
            if file == "checkpoint.pt" and damaged != content:
                assert (kept, anew) == (0, "is damaged"), f"{file} at byte {place}"
            else:  # a slot that the checkpoint does not need, or the space between leaves
                assert anew in (None, "is damaged")


def test_states_that_were_lost_are_said(tmp_path: Path, wanted: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds.Run, "_is_due", lambda run: True)
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        train(job(), checkpoint=file, report=after(2))
    kept = file.with_suffix(".states")
    kept.write_bytes(bytes(kept.stat().st_size))
    outcome, _, anew = taken_up(job(), file)
    assert same(outcome, wanted) and anew == "is damaged"


def test_each_state_that_a_checkpoint_needs_is_compared_when_it_is_read(tmp_path: Path) -> None:
    store = InFile({"head": torch.zeros(3)}, "cpu", tmp_path / "states")
    for client in range(4):
        store[client] = {"head": torch.full((3,), float(client))}
    snapshot = store.snapshot()
    content = (tmp_path / "states").read_bytes()
    for place in range(len(content)):
        (tmp_path / "states").write_bytes(flipped(content, place))
        assert store.restore(snapshot)
        of = place // store.row
        with pytest.raises(StatesDamaged, match=rf"the state of client {of} in .*states is not what was written there"):
            store[of]
        assert all(float(store[client]["head"][0]) == client for client in set(range(4)) - {of})


def test_an_older_state_is_not_taken_for_the_one_that_was_written(tmp_path: Path) -> None:
    store = InFile({"head": torch.zeros(3)}, "cpu", tmp_path / "states")
    store[0] = {"head": torch.ones(3)}
    older = (tmp_path / "states").read_bytes()
    store[0] = {"head": torch.full((3,), 2.0)}
    snapshot = store.snapshot()
    (tmp_path / "states").write_bytes(older)
    assert store.restore(snapshot)
    with pytest.raises(StatesDamaged):
        store[0]


def test_a_disk_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = InFile({"head": torch.zeros(3)}, "cpu", tmp_path / "states")
    store[0] = {"head": torch.ones(3)}

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", broken)
    with pytest.raises(StatesDamaged):
        store[0]


def test_a_disk_that_loses_what_this_process_wrote_ends_the_run_in_a_sentence_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    read = os.pread
    monkeypatch.setattr("os.pread", lambda file, size, place: bytes(len(read(file, size, place))))
    news: list[Report] = []
    with pytest.raises(StatesDamaged, match="the disk may be failing, and the same command begins the run anew"):
        train(job(), checkpoint=tmp_path / "checkpoint.pt", report=news.append)
    assert not [report for report in news if report.anew is not None]


# What is no checkpoint of ours --------------------------------------------------------------------------------


def put_link(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def put_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inner").write_bytes(b"")


def put_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def put_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("change", [put_link, put_folder, put_pipe, put_loop])
def test_what_is_no_regular_file_is_not_gone_on_from(
    change: Callable[[Path], None], left: dict[str, bytes], tmp_path: Path, wanted: Outcome
) -> None:
    for name in left:
        restore(dict(left), folder := tmp_path / f"changed {name}")
        change(folder / name)
        outcome, kept, anew = taken_up(job(), folder / "checkpoint.pt")
        assert same(outcome, wanted) and (kept, anew) == (0, "is damaged")
        assert (folder / name).is_file() and not (folder / name).is_symlink()
        if change is put_link:
            assert (folder / "elsewhere").read_bytes() == left[name], "what a link leads to is left alone"


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: {name: value for name, value in saved.items() if name != key}


def with_(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: {**saved, **changed}


def grown(saved: dict[str, Any]) -> Any:
    body = {**saved["server"]["body"], "more": torch.zeros(1)}
    return {**saved, "server": {**saved["server"], "body": body}}


def as_float64(saved: dict[str, Any]) -> Any:
    return {**saved, "server": {key: _each(leaf, torch.Tensor.double) for key, leaf in saved["server"].items()}}


def reshaped(saved: dict[str, Any]) -> Any:
    return {**saved, "server": {key: _each(leaf, lambda x: x[None]) for key, leaf in saved["server"].items()}}


def _each(node: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return {key: _each(leaf, change) for key, leaf in node.items()} if isinstance(node, dict) else change(node)


def stored_changed(saved: dict[str, Any]) -> Any:
    (name, kept), *rest = saved["store"].items()
    client = next(iter(kept))
    changed = {**kept, client: {"head": torch.zeros(1)} if name == "states" else (-1, "0" * 64)}
    return {**saved, "store": {name: changed, **dict(rest)}}


def with_a_later_tally(saved: dict[str, Any]) -> Any:
    return {**saved, "counts": [*saved["counts"], {**saved["counts"][-1], "round": ROUNDS}]}


def with_early_predictions(saved: dict[str, Any]) -> Any:
    return {**saved, "predictions": [{**saved["counts"][-1], "round": ROUNDS}]}


def narrow_tallies(saved: dict[str, Any]) -> Any:
    return {**saved, "counts": [{**tally, "rows": tally["rows"][:4]} for tally in saved["counts"]]}


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: [1, 2], lambda saved: None, lambda saved: {}, with_(more=1), with_(round=10**9), with_(round=-1),
        with_(round=0), with_(round="2"), with_(round=1), with_(round=3), with_(rows=[]),
        with_(cost={"wall_seconds": float("nan")}), with_(cost={"wall_seconds": "1"}), with_(server={}),
        with_(server=None), with_(store={}), with_(store=7), with_(counts=[{}]), with_(predictions=[{"round": 9}]),
        grown, as_float64, reshaped, stored_changed, narrow_tallies,
        with_(round=0, rows=[], counts=[]), with_(round=2.0), with_a_later_tally, with_early_predictions,
        *map(without, ("fingerprint", "round", "server", "rows", "counts", "predictions", "cost", "models", "store")),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_form_is_not_gone_on_from(
    change: Callable[[dict[str, Any]], Any], left: dict[str, bytes], tmp_path: Path
) -> None:
    file = tmp_path / "left" / "checkpoint.pt"
    checkpoint.save(file, change(checkpoint.load(file, "cpu")))
    run = Run(job(), file)
    assert (run.anew, run.resumed, run.progress.round) == ("is damaged", False, 0)
    assert run.store.clients() == [] and not file.exists()


def test_checkpoints_of_earlier_versions_and_of_other_runs_are_named(tmp_path: Path, stored: str) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"round": 1}, file)
    assert Run(job(), file).anew == "is of an earlier version"
    with pytest.raises(Stopped):
        train(job(), checkpoint=file, report=after(1))
    assert Run(job("fedrep"), file).anew == "is of another run"
    assert Run(job(), file).anew is None, "it went with the doubt"


def test_a_checkpoint_for_which_there_is_no_memory_is_kept(
    left: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        Run(job(), tmp_path / "left" / "checkpoint.pt")
    assert (tmp_path / "left" / "checkpoint.pt").read_bytes() == left["checkpoint.pt"]


def test_what_a_killed_process_left_of_a_checkpoint_goes(left: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "left" / ".checkpoint.pt.123").write_bytes(b"half")
    (tmp_path / "left" / ".another.pt.123").write_bytes(b"half")
    Run(job(), tmp_path / "left" / "checkpoint.pt")
    assert {path.name for path in (tmp_path / "left").iterdir()} == left.keys() | {".another.pt.123"}


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    left: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(states.StatesUnwritable, match=r"checkpoint.pt cannot be written \(.*No space left"):
        train(job(), checkpoint=tmp_path / "left" / "checkpoint.pt")
    assert (tmp_path / "left" / "checkpoint.pt").read_bytes() == left["checkpoint.pt"]
    assert {path.name for path in (tmp_path / "left").iterdir()} == left.keys()


# Power ------------------------------------------------------------------------------------------------------


def test_a_loss_of_power_at_any_moment_changes_no_number_and_costs_no_round_that_was_saved(
    stored: str, tmp_path: Path, wanted: Outcome
) -> None:
    folder = tmp_path / "powered"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(folder, patch)

        def saved(news: Report) -> None:
            disk.safe = news.round

        train(job(), checkpoint=folder / "checkpoint.pt", report=saved)
    disk.close()
    assert len(disk.moments) > 15 and disk.moments[-1].safe == ROUNDS - 1
    chosen = random.Random(stored).sample(disk.moments, min(24, len(disk.moments)))
    for number, moment in enumerate(chosen):
        restore(moment.files, tmp_path / f"after-{number}")
        outcome, kept, anew = taken_up(job(), tmp_path / f"after-{number}" / "checkpoint.pt")
        assert same(outcome, wanted)
        assert anew is None and kept >= moment.safe


# A sweep ----------------------------------------------------------------------------------------------------


def asked(rounds: int = 2) -> Cell:
    [run] = config.Sweep(
        algorithms=tuple(parse_algorithms("fedper")), datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": rounds, "epochs": 1}, data_root=Path("data"),
    ).expand()  # fmt: skip
    return run


@pytest.mark.parametrize("content", [b"", b"bench checkpoint 2\n", bytes(5000)])
def test_a_damaged_checkpoint_is_never_a_failure_of_the_algorithm(content: bytes, tmp_path: Path) -> None:
    said, run = io.StringIO(), asked()
    (tmp_path / "a" / run.id).mkdir(parents=True)
    (tmp_path / "a" / run.id / "checkpoint.pt").write_bytes(content)
    for out in ("a", "b"):
        with Display(stream=said) as display:
            assert driver.run([run], tmp_path / out, pool=InProcess(), watchers=[display])[0].status == "done"
    a, b = (records.read(tmp_path / out / run.id).document for out in "ab")
    assert a["digest"] == b["digest"] and a["metrics"] == b["metrics"]
    sentence = f"bench: the checkpoint of {run} is damaged; it begins anew\n"
    assert said.getvalue().count(sentence) == 1 and "failed" not in said.getvalue()


def test_a_finished_run_with_its_models_survives_a_loss_of_power_at_any_moment(tmp_path: Path) -> None:
    out, run = tmp_path / "powered", asked(1)
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(out, patch)
        assert execution.execute(run, out, keep_models=True) is None
        disk.safe = 1
        disk.note()
    disk.close()
    digest = records.read(out / run.id).document["digest"]
    last = [moment for moment in disk.moments if moment.safe]
    middle = [moment for moment in disk.moments if not moment.safe]
    for number, moment in enumerate([*last, *random.Random(0).sample(middle, 12)]):
        restore(moment.files, after := tmp_path / f"after-{number}")
        if moment.safe:
            assert execution.finished(run, after, models=True)
        else:
            failure = execution.execute(run, after, keep_models=True)
            assert failure is None or failure.again == "found"
        record = records.read(after / run.id)
        assert record.document["digest"] == digest and record.has_models


def test_lines_of_progress_that_a_loss_of_power_has_made_tell_nothing(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    watch.append(file, Report(1, 3, 0.5, None))
    with file.open("ab") as stream:
        stream.write(bytes(20) + b'\n{"round": 2\n[]\n{"rounds": 2}\n')
    watch.append(file, Report(2, 3, 1.0, None))
    assert [report.round for report in watch.Tail(file).read()] == [1, 2]


def test_a_name_may_be_removed_whatever_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"")
    for name in ("link", "folder", "kept/file", "nothing"):
        durable.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
