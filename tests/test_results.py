"""Metrics, records and tables: from counts of right answers to what is published."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.protocol.identity import canonical, identify
from bench.results import records, table
from bench.results.among import separated_among_best
from bench.results.columns import columns, spell
from bench.results.comparison import compare
from bench.results.footnotes import footnotes
from bench.results.layout import best, details, remarks
from bench.results.leaderboard import Leaderboard, leaderboards
from bench.results.record import check
from bench.results.records import Record
from bench.results.statistics import Estimate, estimate
from bench.training import metrics
from tests.answers import from_rows, parted

GROUPS = {"many": torch.tensor([0]), "medium": torch.tensor([1, 2]), "few": torch.tensor([3])}

# Metrics ----------------------------------------------------------------------------------------------------


def test_generic_is_the_mean_over_classes_and_over_the_classes_of_a_group() -> None:
    correct = torch.tensor([[9, 5, 1, 0]])
    total = torch.tensor([[10, 10, 10, 2]])
    measured = metrics.summarise({"generic": (correct, total)}, GROUPS)
    assert measured["generic"] == pytest.approx((0.9 + 0.5 + 0.1 + 0.0) / 4)  # not 15 / 32
    assert measured["generic.many"] == pytest.approx(0.9)
    assert measured["generic.medium"] == pytest.approx(0.3)
    assert measured["generic.few"] == 0.0


def test_personal_weighs_clients_equally_whatever_their_size() -> None:
    correct = torch.tensor([[1, 2, 0, 0], [0, 0, 0, 0], [30, 0, 10, 0]])
    total = torch.tensor([[2, 2, 0, 0], [0, 0, 0, 0], [40, 0, 40, 0]])
    measured = metrics.summarise({"personal": (correct, total)}, GROUPS)
    assert measured["personal"] == pytest.approx((3 / 4 + 40 / 80) / 2)  # the second client has no test image
    assert measured["personal.weighted"] == pytest.approx(43 / 84)
    assert measured["personal.many"] == pytest.approx((1 / 2 + 30 / 40) / 2)
    assert measured["personal.medium"] == pytest.approx((2 / 2 + 10 / 40) / 2)
    assert measured["personal.few"] is None
    assert measured["personal.std"] == pytest.approx(0.125)
    assert measured["personal.worst_decile"] == pytest.approx(0.5)


def test_the_worst_decile_of_eleven_clients_is_two_of_them() -> None:
    correct = torch.arange(11)[:, None]
    measured = metrics.summarise({"personal": (correct, torch.full((11, 1), 10))}, {})
    assert measured["personal.worst_decile"] == pytest.approx((0.0 + 0.1) / 2)


def test_a_model_that_is_not_there_is_absent_and_not_zero() -> None:
    measured = metrics.summarise({}, GROUPS)
    assert set(measured.values()) == {None}
    assert {"generic.few", "personal.std", "personal.masked.worst_decile", "unseen.masked"} <= set(measured)


def test_further_models_are_reported_by_their_names() -> None:
    pair = (torch.tensor([[1, 0]]), torch.tensor([[2, 2]]))
    measured = metrics.summarise({"generic:etf": pair, "personal:body": pair, "unseen": pair}, {})
    assert measured["generic:etf"] == measured["personal:body"] == measured["unseen"] == 0.25
    assert measured["generic"] is measured["personal"] is None
    with pytest.raises(ValueError, match="'head' begins with neither"):
        metrics.summarise({"head": pair}, {})


def test_the_last_ten_and_the_best_rest_on_every_evaluation_or_are_absent() -> None:
    rows = [{"round": number, "personal": number / 100} for number in range(1, 13)]
    assert metrics.last_mean(rows, "personal") == pytest.approx(7.5 / 100)  # rounds 3 to 12
    assert metrics.last_mean(rows[:2], "personal") == pytest.approx(1.5 / 100)
    assert metrics.best(rows, "personal") == 0.12
    assert metrics.last_mean(rows, "generic") is metrics.best(rows, "generic") is None
    patchy: list[dict[str, float | None]] = [{"personal": None}, {"personal": math.nan}, {"personal": 0.5}]
    assert metrics.last_mean(patchy, "personal") is metrics.best(patchy, "personal") is None
    assert metrics.best([{"personal": math.nan}], "personal") is None


@st.composite
def tallies(draw: st.DrawFn, clients: int | None = None) -> tuple[Tensor, Tensor]:
    """(correct, total), each (K, 4): some clients and classes without images."""
    rows = clients or draw(st.integers(1, 12))
    cell = st.integers(0, 6).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
    cells = draw(st.lists(st.lists(cell, min_size=4, max_size=4), min_size=rows, max_size=rows))
    both = torch.tensor(cells)  # (K, 4, 2)
    return both[..., 0], both[..., 1]


@given(tallies(), tallies(clients=1), st.randoms())
def test_metrics_keep_their_order_and_do_not_depend_on_that_of_the_clients(
    personal: tuple[Tensor, Tensor], generic: tuple[Tensor, Tensor], random: Any
) -> None:
    measured = metrics.summarise({"personal": personal, "generic": generic}, GROUPS)
    assert all(value is None or 0 <= value <= 1 for value in measured.values())
    average, worst = measured["personal"], measured["personal.worst_decile"]
    assert (average is None) == (worst is None) == (int(personal[1].sum()) == 0)
    if average is not None and worst is not None:
        assert worst <= average + 1e-12
        assert measured["personal.weighted"] == int(personal[0].sum()) / int(personal[1].sum())
    order = random.sample(range(len(personal[0])), len(personal[0]))
    shuffled = (personal[0][order], personal[1][order])
    assert metrics.summarise({"personal": shuffled, "generic": generic}, GROUPS) == measured
    assert metrics.summarise({"personal": (personal[1], personal[1])}, {})["personal"] in (None, 1.0)


def rows_of(counts: Mapping[str, tuple[Tensor, Tensor]], completed: int = 1) -> list[dict[str, int | str]]:
    """Spell counts out as they are stored: no row where there is no test image."""
    return [
        {
            "round": completed,
            "model": model,
            "client": -1 if model.startswith("generic") else client,
            "class": label,
            "correct": int(correct[client, label]),
            "total": int(total[client, label]),
            "drawn": -1,
        }
        for model, (correct, total) in counts.items()
        for client, label in torch.nonzero(total).tolist()
    ]


@given(tallies(), tallies(clients=1))
def test_stored_rows_give_the_same_metrics_again(
    personal: tuple[Tensor, Tensor], generic: tuple[Tensor, Tensor]
) -> None:
    counts = {"personal": personal, "generic": generic}
    rows = rows_of(counts)
    expected = metrics.summarise(counts, GROUPS)
    assert metrics.summarise(from_rows(reversed(rows), 4)[0], GROUPS) == expected


# Identity ---------------------------------------------------------------------------------------------------


def test_an_identity_does_not_depend_on_the_order_of_its_keys() -> None:
    assert canonical({"b": [1, 2.0], "a": None}) == '{"a":null,"b":[1,2.0]}'
    # printf '{"a":null,"b":[1,2.0]}' | sha256sum
    assert identify({"b": [1, 2.0], "a": None}) == identify({"a": None, "b": [1, 2.0]}) == "05d3e48ab708"
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"lr": math.nan})


# Records ----------------------------------------------------------------------------------------------------

FILES = ["counts.parquet", "predictions.parquet", "rounds.parquet", "run.json"]
COUNTS = {
    "generic": (torch.tensor([[9, 5, 1, 0]]), torch.tensor([[10, 10, 10, 2]])),
    "personal": (torch.tensor([[1, 2, 0, 0], [3, 0, 1, 0]]), torch.tensor([[2, 2, 0, 0], [4, 0, 4, 0]])),
}
ROUNDS: list[dict[str, float | int | None]] = [
    {"round": 1, "generic": 0.1, "personal": None},
    {"round": 2, "generic": 0.375, "personal": math.nan, "unseen": 0.5},
]


TESTED = {"clients": 20, "images": [4, 23], "worst_decile": 2, "one_class": 0, "drawn": 16, "never": 4}


def document(
    algorithm: str = "fedavg",
    fields: Mapping[str, object] | None = None,
    seed: int = 0,
    values: Mapping[str, float | None] | None = None,
    *,
    setting: Mapping[str, object] | None = None,
    version: int = 1,
    tested: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What a finished run of four classes would say about itself."""
    protocol: dict[str, Any] = {"model": "mlp", "norm": "group", "clients": 20, "participation": 0.4}
    protocol |= {"rounds": 40, "epochs": 2, "batch_size": 16, "lr": 0.05, "partition": "dirichlet"}
    protocol |= {"imbalance": 10.0, "alpha": 0.5, **(setting or {})}
    name = protocol.pop("name", "quick")
    dataset = {"name": "digits", "version": 1, "fields": {}}
    cell: dict[str, Any] = {"engine": "serial", "precision": "fp32", "device": "cpu"}
    cell |= {key: changes.pop(key) for key in list(changes) if key in cell}
    described = {"name": algorithm, "version": version, "fields": dict(fields or {})}
    words = ", ".join(f"{key}={value!r}" for key, value in (fields or {}).items())
    cost = {"bytes_down": 3e6, "bytes_up": 2e6, "train_samples": 12_000.0, "adaptation_samples": 345.0}
    cost |= {"server_samples": 0.0, "train_flops": 4.2e12, "adaptation_flops": 0.6e12, "server_flops": 0.0}
    cost |= {"wall_seconds": 61.25, "peak_memory_bytes": 300 * 2.0**20, "client_state_bytes": 0.0}
    return {
        "protocol": identify({"dataset": dataset, "setting": protocol}),
        "identity": {"algorithm": described, "dataset": dataset, "setting": protocol, "seed": seed, **cell},
        "algorithm": algorithm,
        "call": f"{algorithm.title()}({words})",
        "label": algorithm + (f"({words})" if words else ""),
        "tier": "S",
        "dataset": "digits",
        "imbalance": protocol["imbalance"],
        "alpha": protocol["alpha"],
        "seed": seed,
        "setting": {"name": name, **protocol},
        **cell,
        "fingerprint": f"{seed:016x}",
        "class_counts": [120, 60, 30, 10],
        "groups": {name: classes.tolist() for name, classes in GROUPS.items()},
        "metrics": {**metrics.summarise(COUNTS, GROUPS), **(values or {})},
        "cost": cost,
        "tested": {**TESTED, **(tested or {})},
        "commit": "0123456789abcdef",
        "finished": "2026-02-03T04:05:06+00:00",
        **changes,
    }


def columns_of(rows: Sequence[Mapping[str, int | str]]) -> dict[str, list[int | str]]:
    """The same as columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def store(out: Path, content: dict[str, Any], *, replace: bool = False) -> Path:
    run_id = identify(content["identity"])
    return records.write(out, run_id, content, ROUNDS, *parted(columns_of(rows_of(COUNTS))), replace=replace)


def record(*positional: Any, **named: Any) -> Record:
    """A record that never saw a disk."""
    content = document(*positional, **named)
    digests = dict.fromkeys(("rounds", "counts", "predictions"), "0")
    state = {"status": "done", "tables": digests, "format": 3, "id": identify(content["identity"])}
    return check(Path(), {**content, **state, **({"status": "failed"} if "reason" in content else {})})


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    content = document(values={"unseen": math.nan}, heterogeneity={"classes per client": 2.5})
    folder = store(tmp_path, content)
    found = records.read(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (found.id, found.status, found.seed, found.metrics["unseen"]) == (folder.name, "done", 0, None)
    assert found.document["heterogeneity"] == {"classes per client": 2.5}
    assert "NaN" not in (folder / "run.json").read_text()
    rounds = found.rounds()
    assert list(rounds.columns) == ["round", "generic", "personal", "unseen"]
    assert rounds["round"].tolist() == [1, 2] and rounds["generic"].tolist() == [0.1, 0.375]
    assert rounds["personal"].isna().all() and rounds["unseen"].tolist()[1] == 0.5
    counts = found.counts()
    assert counts.to_dict("records") == [row for row in rows_of(COUNTS) if row["total"]]


def test_the_metrics_can_be_computed_again_from_the_stored_counts(tmp_path: Path) -> None:
    wrong = [{**row, "correct": 0} for row in rows_of(COUNTS, completed=1)]
    content = document()
    run_id = identify(content["identity"])
    folder = records.write(
        tmp_path, run_id, content, ROUNDS, *parted(columns_of([*wrong, *rows_of(COUNTS, completed=2)]))
    )
    found = records.read(folder)
    assert found.recompute() == found.metrics == metrics.summarise(COUNTS, GROUPS)


@pytest.mark.parametrize(
    "tested",
    [
        {key: value for key, value in TESTED.items() if key != "worst_decile"},
        {**TESTED, "images": None},
        {**TESTED, "images": [4]},
        {**TESTED, "drawn": None},
    ],
)
def test_a_run_says_on_what_its_personal_metrics_rest(tested: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say on how many clients and images"):
        store(tmp_path, document() | {"tested": tested})


def test_a_finished_run_is_not_overwritten_unless_asked_for(tmp_path: Path) -> None:
    folder = store(tmp_path, document(digest="first"))
    with pytest.raises(records.AlreadyDone, match="--force"):
        store(tmp_path, document(digest="second"))
    records.fail(tmp_path, folder.name, document(), "out of memory")
    assert records.read(folder).document["digest"] == "first"
    store(tmp_path, document(digest="second"), replace=True)
    assert records.read(folder).document["digest"] == "second"


def test_a_failed_run_gives_way_to_a_finished_one(tmp_path: Path) -> None:
    content = document()
    run_id = identify(content["identity"])
    begun = {key: content[key] for key in content if key not in ("metrics", "cost", "fingerprint", "groups")}
    assert records.status(tmp_path, run_id) == "absent"
    (tmp_path / run_id).mkdir()
    assert records.status(tmp_path, run_id) == "partial"
    records.fail(tmp_path, run_id, begun, "diverged: after round 3 a state is no longer finite")
    assert records.status(tmp_path, run_id) == "failed"
    assert records.read(tmp_path / run_id).reason == "diverged: after round 3 a state is no longer finite"
    store(tmp_path, content)
    assert records.status(tmp_path, run_id) == "done"
    assert records.read(tmp_path / run_id).reason is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": None}, "key 'protocol'"),
        ({"seed": "0"}, "key 'seed'"),
        ({"metrics": {}}, "lacks metrics"),
        ({"metrics": {"generic": "0.5"}}, "key 'metrics.generic'"),
        ({"setting": {}}, "without a name"),
        ({"cost": {"samples": math.inf}}, "JSON"),
        ({"identity": {"seed": 1}}, "identity"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    content = document()
    run_id = identify(content["identity"])
    with pytest.raises(ValueError, match=reason):
        records.write(tmp_path, run_id, {**content, **change}, ROUNDS, *parted(columns_of(rows_of(COUNTS))))
    assert records.status(tmp_path, run_id) == "absent"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", b"", "cannot be read"),
        ("run.json", b"[]", "is not a JSON object"),
        ("run.json", b"\xff\xfe\x00", "cannot be read"),
        ("run.json", b'{"format": "2"}', "has format '2', and must have a whole number from 1 to 3"),
        ("run.json", b'{"format": 2}', "has a bad key"),
        ("run.json", b'{"format": NaN}', "NaN is not a number of JSON"),
        ("run.json", b'{"format": 3, "format": 3}', "key 'format' stands there twice"),
        ("run.json", b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        ("rounds.parquet", b"", "is no Parquet file that can be read"),
        ("counts.parquet", None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_result_names_the_file_and_what_to_do(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    folder = store(tmp_path, document())
    good = store(tmp_path, document(seed=1))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(records.DamagedResult, match=re.escape(reason)) as error:
        records.status(tmp_path, folder.name)
    assert str(folder / name) in str(error.value) and "--force" in str(error.value)
    found, damaged = records.read_all(tmp_path)
    assert [each.folder for each in found] == [good] and damaged == [str(error.value)]
    with pytest.raises(records.DamagedResult):
        store(tmp_path, document())
    store(tmp_path, document(), replace=True)
    assert records.status(tmp_path, folder.name) == "done"


def test_a_result_of_a_later_version_is_not_to_be_deleted(tmp_path: Path) -> None:
    folder = store(tmp_path, document())
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 4}))
    found, told = records.read_all(tmp_path)
    says = "has format 4, and this version reads formats up to 3: a later version of bench wrote it, so update bench"
    assert not found and told == [f"{file} {says}"]
    assert "delete" not in told[0] and "--force" not in told[0]


def test_a_result_of_another_run_is_damaged(tmp_path: Path) -> None:
    first, second = store(tmp_path, document()), store(tmp_path, document(seed=1, digest="x"))
    shutil.copytree(first, tmp_path / "copy")
    with pytest.raises(records.DamagedResult, match="its folder is called copy"):
        records.read(tmp_path / "copy")
    text = (second / "run.json").read_text()
    (second / "run.json").write_text(text.replace('"lr": 0.05', '"lr": 0.06'))
    with pytest.raises(records.DamagedResult, match="its identity's hash is"):
        records.read(second)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(FILES), share=st.floats(0, 1))
def test_a_file_that_was_cut_off_is_damage_and_never_another_result(name: str, share: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = store(Path(place), document())
        before = records.read(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: round(share * len(content))])
        try:
            after = records.read(folder)
        except records.DamagedResult as error:
            assert name in str(error)
        else:
            assert after == before and after.counts().equals(before.counts())


def test_unfinished_folders_and_other_files_are_passed_over(tmp_path: Path) -> None:
    store(tmp_path, document(seed=2))
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / "0123456789ab" / "checkpoint.pt").write_bytes(b"half")
    (tmp_path / "NOTES.md").write_text("Nothing new.")
    store(tmp_path, document(seed=1))
    found, damaged = records.read_all(tmp_path)
    assert [each.id for each in found] == sorted(each.id for each in found) and len(found) == 2
    assert damaged == [] and records.read_all(tmp_path / "nowhere") == ([], [])
    assert records.prose(tmp_path) == "Nothing new." and records.prose(tmp_path / "nowhere") is None


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("earlier", ["nothing", "failed", "done"])
def test_a_write_that_ends_at_any_rename_is_never_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    rename = os.replace
    for last in range(4):
        out = tmp_path / str(last)
        content = document(digest="new")
        run_id = identify(content["identity"])
        if earlier == "failed":
            records.fail(out, run_id, content, "no reason")
        elif earlier == "done":
            store(out, document(digest="old"))
        calls = itertools.count()

        def replace(source: Path, target: Path, last: int = last, calls: Any = calls) -> None:
            if next(calls) == last:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                store(out, content, replace=True)
            except Killed:
                assert records.status(out, run_id) == "partial"
                assert records.read_all(out) == ([], [])
            else:
                assert last == 3 and records.read(out / run_id).document["digest"] == "new"
        store(out, content, replace=True)
        assert records.status(out, run_id) == "done"


_KILLED = """
import json, os, signal, sys
from pathlib import Path
import pyarrow.parquet, pydantic
from bench.results import records

out, run_id, given = sys.argv[1:]
content, *written = json.loads(given)
last = 0
while True:
    child = os.fork()
    if child == 0:
        calls = 0
        def deadly(function):
            def call(*positional):
                global calls
                calls += 1
                if calls > last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*positional)
            return call
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        records.write(Path(out) / str(last), run_id, content, *written)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    last += 1
print(last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be copied")
def test_a_process_killed_at_any_system_call_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    run_id = identify(document()["identity"])
    given = json.dumps([document(), ROUNDS[:1], *parted(columns_of(rows_of(COUNTS)))])
    command = [sys.executable, "-c", _KILLED, str(tmp_path), run_id, given]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    deaths = int(printed.stdout)
    assert deaths >= 9  # three files flushed and renamed, and their folders flushed
    states = [records.status(tmp_path / str(last), run_id) for last in range(deaths + 1)]
    finished = states.index("done")
    assert set(states[:finished]) == {"partial"} and set(states[finished:]) == {"done"}
    for last in range(finished):  # the next process takes over, and cleans up
        folder = store(tmp_path / str(last), document())
        names = sorted(path.name for path in folder.iterdir())
        assert names == FILES


def test_a_folder_that_cannot_be_written_is_said_so_in_a_sentence(tmp_path: Path) -> None:
    assert records.prepare(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("a\0b"), Path("/proc/nothing")):
        with pytest.raises(records.OutputUnwritable, match=r"cannot be written to .*: .*--out"):
            records.prepare(out)
    with pytest.raises(records.OutputUnwritable, match="--out"):
        store(tmp_path / "file", document())


def test_a_full_disk_leaves_the_old_result_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(tmp_path, document(digest="old"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(records.OutputUnwritable, match="No space left on device"):
            store(tmp_path, document(digest="new"), replace=True)
    assert records.read(folder).document["digest"] == "old"
    assert len(list(folder.iterdir())) == 4


# Statistics -------------------------------------------------------------------------------------------------


def test_the_interval_of_five_values_is_that_of_the_textbook() -> None:
    # 1, 2, 3, 4, 5: mean 3, sample variance 10 / 4; t at 97.5 % with 4 degrees of freedom is 2.776445
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.mean, found.n, found.kind) == (3.0, 5, "student")
    assert [found.low, found.high] == pytest.approx([3 - half, 3 + half], rel=1e-6)


def test_below_five_values_there_is_a_range_and_no_interval() -> None:
    assert estimate([]) == estimate([None, math.nan]) == Estimate(None, 0)
    assert estimate([0.5, None]) == Estimate(0.5, 1)
    assert estimate([0.0, 1.0]) == Estimate(0.5, 2, 0.0, 1.0, "range")
    assert estimate([0.375, 0.125, 0.25, 0.25]) == Estimate(0.25, 4, 0.125, 0.375, "range")
    kinds = [estimate([0.1 * k for k in range(n)]).kind for n in range(8)]
    assert kinds == [None, None, "range", "range", "range", "student", "bootstrap", "bootstrap"]


def test_an_interval_ends_where_the_scale_does() -> None:
    values = [0.2, 1.0, 1.0, 1.0, 1.0]
    free, cut = estimate(values), estimate(values, scale=(0.0, 1.0))
    assert free.high is not None and free.high > 1.0
    assert (cut.low, cut.high, cut.mean) == (free.low, 1.0, free.mean)
    assert spell(cut) == f"84.0 [{100 * (free.low or 0):.1f}, 100.0]" and spell(free).startswith("84.0 ± 44.4")
    low = estimate([0.8, 0.0, 0.0, 0.0, 0.0], scale=(0.0, 1.0))
    assert low.low == 0.0 and spell(low).startswith("16.0 [0.0, ")
    wide = [record(seed=seed, values={"personal": value}) for seed, value in enumerate(values)]
    assert leaderboards(wide)[0].rows[0].metrics["personal"] == cut
    assert spell(estimate([0.54, 0.582])) == "56.1 (54.0–58.2)" and spell(estimate([0.5])) == "50.0"
    assert spell(estimate([])) == "–" and spell(estimate([0.5] * 7)) == "50.0 [50.0, 50.0]"


# Tables -----------------------------------------------------------------------------------------------------


def three_seeds() -> list[Record]:
    """fedrep with an unusual field, fedavg without a personal model, local without a generic one."""
    found = []
    for seed, value in enumerate((0.80, 0.82, 0.84)):
        absent = [key for key in metrics.summarise({}, GROUPS) if key.startswith("personal")]
        generic: dict[str, float | None] = {**dict.fromkeys(absent), "generic": value}
        found.append(record("fedavg", seed=seed, values=generic))
        personal: dict[str, float | None] = {"generic": None, "personal.balanced": value - 0.2}
        personal |= {f"generic.{group}": None for group in GROUPS}
        found.append(record("local", seed=seed, values=personal))
        values = {"personal.balanced": value, "personal:after": value + 0.1}
        found.append(record("fed_rep", {"head_epochs": 5}, seed=seed, values=values))
    return found


def cells_of(text: str) -> list[list[str]]:
    """Take the tables of a Markdown text apart, backslashes included."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|:")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_row_shows_mean_range_and_dashes() -> None:
    (board,) = leaderboards(three_seeds())
    heading, *rows = cells_of(table.render([board], "md"))
    assert heading[:12] == [
        "algorithm", "tier", "seeds", "generic", "many", "medium", "few", "balanced", "personal", "worst decile",
        "after", "k samples",
    ]  # fmt: skip
    assert heading[12:] == [
        "k training samples", "k adaptation samples", "k server samples", "MB",
        "TFLOP", "training TFLOP", "adaptation TFLOP", "server TFLOP", "seconds", "peak MiB", "state MiB",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["`fed_rep(head_epochs=5)`", "`local`", "`fedavg`"]
    rep, local, average = rows
    assert rep[1:4] == ["S", "3", "37.5 (37.5–37.5)"] and rep[7] == "82.0 (80.0–84.0)"
    assert rep[10] == "92.0 (90.0–94.0)"
    assert local[3:8] == ["–", "–", "–", "–", "62.0 (60.0–64.0)"]
    assert average[3] == "82.0 (80.0–84.0)" and average[7:11] == ["–"] * 4
    assert rep[11:] == ["12.3", "12.0", "0.34", "0", "5.0", "4.8", "4.2", "0.60", "0", "61.2", "300", "0"]


def test_one_seed_has_nothing_beside_its_mean() -> None:
    boards = leaderboards([record(values={"generic": 0.5})])
    assert cells_of(table.render(boards, "md"))[1][2:4] == ["1", "50.0"]
    (line,) = [line for line in parsed_csv(boards) if line["metric"] == "generic"]
    assert [line[key] for key in ("mean", "n", "low", "high", "kind")] == ["0.5", "1", "", "", ""]


@pytest.mark.parametrize("form", ["md", "html", "latex"])
def test_a_column_that_is_a_dash_in_every_row_is_not_printed(form: str) -> None:
    there = record("fedavg", values={"personal.masked": 0.5, "unseen": 0.5, "personal.never": 0.5, "unseen@best": 0.1})
    boards = [leaderboards([there, record("local")])[0], leaderboards([record("fedavg"), record("local")])[0]]
    titles = [{column.title for column in columns(board)} for board in boards]
    assert titles[0] - titles[1] == {"masked", "unseen", "never"} and not titles[1] - titles[0]
    assert "tail" not in titles[1] and "drawn" not in titles[1]
    for word in ("masked", "never"):
        assert [f"{word}</th>" in table.render([board], "html") for board in boards] == [True, False]
    assert table.render(boards[1:], form).count("peak MiB") == 1
    unknown = record("fedavg", cost={"train_samples": 1.0, "peak_memory_bytes": None})
    assert [column.key for column in columns(leaderboards([unknown])[0]) if column.unit] == ["train_samples"]
    lines = {line["metric"] for line in parsed_csv(boards[1:])}
    assert {"personal.masked", "unseen", "personal.never"} <= lines


def test_costs_add_up_and_a_sum_with_an_absent_part_is_absent() -> None:
    (board,) = leaderboards([record("fedavg"), record("pooled", cost={"bytes_down": None, "bytes_up": 1.0})])
    costs = {row.label: row.cost for row in board.rows}
    assert costs["fedavg"]["bytes"].mean == 5e6 and costs["fedavg"]["samples"].mean == 12_345.0
    assert costs["fedavg"]["flops"].mean == pytest.approx(4.8e12)
    assert costs["pooled"]["bytes"].mean is costs["pooled"]["flops"].mean is None


def test_rows_are_ordered_by_balanced_then_generic_and_the_board_says_so() -> None:
    prior = record("prior", values={"personal": 0.99, "personal.balanced": 0.4, "generic": 0.9})
    tied = record("tied", values={"personal": 0.1, "personal.balanced": 0.6, "generic": 0.1})
    above = record("above", values={"personal": 0.2, "personal.balanced": 0.6, "generic": 0.2})
    (board,) = leaderboards([prior, tied, above])
    assert [row.label for row in board.rows] == ["above", "tied", "prior"]
    said = remarks(board)[0]
    assert said.startswith("Rows are ordered by balanced, then generic.") and "counts each class alike" in said
    best_rounds = remarks(leaderboards([prior], "best")[0])[0]
    assert best_rounds.startswith("Rows are ordered by balanced of the last round, then generic.")


def test_a_method_that_is_tuned_only_at_the_end_has_no_mean_of_ten_and_ranks_last_there() -> None:
    tuned = {"personal": 0.9, "personal.balanced": 0.9, "generic": 0.9, "generic@last10": 0.9, "generic@best": 0.95}
    tuned_keys: dict[str, float | None] = {**tuned, "personal@last10": None, "personal.balanced@last10": None}
    followed = {f"{key}@last10": 0.2 for key in ("generic", "personal", "personal.balanced")}
    found = [record("tuned", values=tuned_keys), record("usual", values=followed)]
    assert [row.label for row in leaderboards(found)[0].rows] == ["tuned", "usual"]
    boards = leaderboards(found, "last10")
    assert [row.label for row in boards[0].rows] == ["usual", "tuned"]
    heading, first, second = cells_of(table.render(boards, "md"))
    assert heading[3:6] == ["generic", "balanced", "personal"]
    assert first[3:6] == ["20.0"] * 3 and second[3:6] == ["90.0", "–", "–"]
    best_heading, *best_rows = cells_of(table.render(leaderboards(found, "best"), "md"))
    assert best_heading[3:4] == ["generic"] and "balanced" not in best_heading  # which no row has
    assert [row[3] for row in best_rows] == ["95.0", "–"]


def test_a_board_says_on_what_its_personal_numbers_rest() -> None:
    found = [record("fedavg"), record("fedavg", seed=1, tested={"images": [1, 9], "drawn": 15, "never": 5})]
    (board,) = leaderboards(found)
    expected = "Personal numbers rest on 20 clients with 1 to 23 test images each, the worst decile on 2 of them"
    assert f"{expected}; 15 to 16 of them were drawn for the cohort of any round, 4 to 5 never." in remarks(board)
    single = {"one_class": 3}
    masked = leaderboards([record("pooled", tested=single, values={"personal.masked": 0.5})])[0]
    unmasked = leaderboards([record("pooled", tested=single)])[0]
    ending = "; 3 trained on a single class, and masked is 100 % for them by construction."
    plain = f"{expected.replace('1 to 23', '4 to 23')}; 16 of them were drawn for the cohort of any round, 4 never"
    assert plain + ending in remarks(masked)
    assert f"{plain}; 3 trained on a single class." in remarks(unmasked)
    nobody = {"clients": 0, "images": None, "worst_decile": 0, "drawn": 0, "never": 0}
    assert not any("rest on" in line for line in remarks(leaderboards([record("x", tested=nobody)])[0]))
    assert not any("rest on" in line for line in remarks(leaderboards([record("x", reason="broken")])[0]))


def test_screened_rows_stand_below_those_that_have_an_interval_and_change_none_of_their_findings() -> None:
    def seeds(name: str, mean: float, number: int, first: int = 0) -> list[Record]:
        those = range(first, first + number)
        return [record(name, seed=seed, values={"personal.balanced": mean + seed / 1000}) for seed in those]

    full = [*seeds("good", 0.8, 8), *seeds("fair", 0.5, 8)]
    (alone,), (both,) = (
        leaderboards(full),
        leaderboards([*full, *seeds("few", 0.9, 4), *seeds("odd", 0.95, 4, first=3)]),
    )
    assert [row.label for row in both.rows] == ["good", "fair", "few", "odd"]
    assert [(row.ranks, row.screened, row.chosen) for row in both.rows[1:]] == [
        (True, False, False), (False, True, False), (False, True, True)
    ]  # fmt: skip
    assert best(both) == best(alone) != {}
    assert separated_among_best(both) == separated_among_best(alone)
    notes = footnotes(both)[1]
    assert "2 rows: screening, not ranked: fewer than 5 seeds have no interval, and separate nothing." in notes
    assert not any("screening" in note for note in footnotes(alone)[1])
    (few,) = leaderboards(seeds("few", 0.9, 4))  # where nobody has more, they are what there is
    assert few.rows[0].ranks
    found = compare([both], "personal.balanced")
    assert found.parts == compare([alone], "personal.balanced").parts
    assert found.labels == ("good", "fair") and found.left_out[0].endswith(": 2 screened rows, unless named.")
    assert compare([both], "personal.balanced", ["few", "good"]).labels == ("few", "good")


def test_seeds_hold_for_one_subsample_and_one_test_set() -> None:
    said = "conditional on this dataset's one long-tailed subsample and its one test set"
    assert any(said in line for line in remarks(leaderboards(three_seeds())[0]))
    assert not any(said in line for line in remarks(leaderboards([record("fedavg")])[0]))


def test_a_front_page_shows_the_main_columns_of_rows_with_five_seeds() -> None:
    page = "\n".join(("# Title", *table.FRONT, "end", ""))
    many = [record("fedavg", seed=seed, values={"personal.balanced": 0.5}) for seed in range(5)]
    many += [record("local", seed=seed, values={"personal.few": 0.5}) for seed in range(4)]
    few = [record("fedavg", seed=seed, setting={"imbalance": 50.0}) for seed in range(4)]
    failed = [record("fedavg", seed=4, setting={"imbalance": 50.0}, reason="broken")]
    shown = table.front_page(page, leaderboards([*many, *few, *failed]))
    assert shown.startswith(f"# Title\n{table.FRONT[0]}\n\n") and shown.endswith(f"\n\n{table.FRONT[1]}\nend\n")
    heading, *rows = cells_of(shown)
    assert heading == [
        "algorithm", "generic", "few", "balanced", "personal", "worst decile", "k samples", "MB", "seconds"
    ]  # fmt: skip
    assert [row[:4] for row in rows] == [["`fedavg`", "37.5 ± 0.0", "0.0 ± 0.0", "50.0 ± 0.0"]]
    assert "imbalance 10, alpha 0.5, setting quick**, 5 seeds" in shown and "Rows are ordered by balanced" in shown
    assert "1 more comparison has fewer than 5 seeds, and no table here." in shown
    assert table.front_page(shown, leaderboards([*many, *few, *failed])) == shown
    none = table.front_page(page, leaderboards([*few, *many[5:]]))
    assert "\n2 comparisons have fewer than 5 seeds, and no table here." in none and not cells_of(none)
    for lines in (table.FRONT[:1], table.FRONT[::-1], table.FRONT * 2):
        with pytest.raises(ValueError, match="once, in this order"):
            table.front_page("\n".join((*lines, "")), [])
    table.front_page((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), [])


@pytest.mark.parametrize(
    "change",
    [
        {"setting": {"lr": 0.1}},
        {"setting": {"imbalance": 50.0}},
        {"setting": {"alpha": 0.1}},
        {"engine": "stacked"},
        {"precision": "bf16"},
        {"device": "cuda"},
    ],
)
def test_runs_of_different_protocol_are_never_in_one_table(change: dict[str, Any]) -> None:
    boards = leaderboards([record("fedavg"), record("local", **change), record("ditto")])
    assert sorted([[row.label for row in board.rows] for board in boards]) == [["ditto", "fedavg"], ["local"]]
    assert len(cells_of(table.render(boards, "md"))) == 5


def test_one_protocol_under_two_names_is_one_table() -> None:
    given_by_hand = record("local", setting={"name": "own"}, overrides={"lr": 0.05, "alpha": 0.5})
    (board,) = leaderboards([record("fedavg"), given_by_hand])
    assert board.names == ("own", "quick") and board.overrides == {"lr": 0.05}
    assert "departs from own: lr = 0.05" in details(board)


def test_the_order_of_the_records_does_not_matter() -> None:
    found = [*three_seeds(), record("fedavg", setting={"imbalance": 100.0}), record("x", reason="broken")]
    for format in table.FORMATS:
        backwards = table.render(leaderboards(reversed(found)), format)
        assert table.render(leaderboards(found), format) == backwards
    assert [board.imbalance for board in leaderboards(found)] == [10.0, 100.0]


def test_versions_of_one_algorithm_are_rows_of_their_own() -> None:
    found = [record("fedavg", version=1), record("fedavg", version=2), record("local")]
    (board,) = leaderboards(found, all_versions=True)
    labels = [row.label for row in board.rows]
    assert len(set(labels)) == 3 and sum(label.startswith("fedavg #") for label in labels) == 2
    assert {row.version for row in board.rows if row.algorithm == "fedavg"} == {"1", "2"}
    older, newest = sorted(footnotes(board)[1], key=lambda note: "the newest version" in note)
    assert older.endswith(": version 1 of Fedavg(), run 2026-02-03 04:05 UTC; a newer version is in these results.")
    assert newest.endswith(": version 2 of Fedavg(), run 2026-02-03 04:05 UTC; the newest version in these results.")


def test_failed_and_missing_seeds_are_footnotes() -> None:
    found = [record("fedavg", seed=seed) for seed in range(3)] + [record("local", seed=1)]
    found += [
        record("ditto", seed=0),
        record("ditto", seed=1),
        record("ditto", seed=2, reason="out of\nmemory"),
    ]
    found += [record("scaffold", seed=0, reason="diverged", metrics={}, cost={})]
    (board,) = leaderboards(found)
    marks, notes = footnotes(board)
    assert marks == {"ditto": " [1]", "fedavg": "", "scaffold": " [2] [3]", "local": " [4] [5]"}
    assert notes == [
        "ditto: seed 2 failed (out of memory).",
        "scaffold: seed 0 failed (diverged).",
        "scaffold: none of seeds 0, 1, 2.",
        "local: seed 1 of seeds 0, 1, 2.",
        "local: not ranked: its seeds may have been chosen, and those of rows that rank are 0 to n - 1.",
    ]
    text = table.render([board], "md")
    assert "* \\[4\\] local: seed 1 of seeds 0" in text and "`scaffold` [2] [3]" in text
    assert cells_of(text)[-2][2:] == ["0", *["–"] * 19]


def test_runs_that_saw_other_splits_are_called_not_comparable() -> None:
    (board,) = leaderboards([record("fedavg"), record("local", fingerprint="other"), record("local", seed=1)])
    warnings = [line for line in remarks(board) if line.startswith("Not comparable")]
    assert warnings == ["Not comparable: the runs of seed 0 saw different splits (0000000000000000, other)."]
    assert "Not comparable" in table.render([board], "md")


def test_an_accuracy_of_zero_ranks_above_none_at_all() -> None:
    found = [record("nothing", values={"personal.balanced": 0.0, "generic": 0.0})]
    found += [record("absent", values={"personal.balanced": None, "generic": 0.9})]
    assert [row.label for row in leaderboards(found)[0].rows] == ["nothing", "absent"]


def test_the_best_round_never_ranks() -> None:
    key = "personal.balanced"
    lucky = {key: 0.5, f"{key}@best": 0.9, f"{key}@last10": 0.7}
    steady = {key: 0.6, f"{key}@best": 0.6, f"{key}@last10": 0.6}
    found = [record("lucky", values=lucky), record("steady", values=steady)]
    order = {metric: [row.label for row in leaderboards(found, metric)[0].rows] for metric in table.METRICS}
    assert order == {
        "last": ["steady", "lucky"], "last10": ["lucky", "steady"], "best": ["steady", "lucky"]
    }  # fmt: skip
    text = table.render(leaderboards(found, "best"), "md")
    assert "optimistic" in text and [row[3] for row in cells_of(text)] == ["balanced", "60.0", "90.0"]
    with pytest.raises(ValueError, match="must be one of last, last10, best"):
        leaderboards(found, "first")


def test_unseen_clients_have_a_column_where_there_are_any() -> None:
    (board,) = leaderboards([record("fedavg"), record("local", values={"unseen": 0.25})])
    assert "unseen" in [column.title for column in columns(board)]
    assert "unseen" not in [column.title for column in columns(leaderboards([record("fedavg")])[0])]


def parsed_csv(boards: list[Leaderboard], form: str = "long") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.render(boards, form))))


def test_long_csv_holds_every_metric_and_cost_as_exact_fractions() -> None:
    boards = leaderboards(three_seeds())
    lines = parsed_csv(boards)
    for row in boards[0].rows:
        of_row = {line["metric"]: line for line in lines if line["algorithm"] == row.label}
        assert len(of_row) == len(row.metrics) + len(row.cost)
        for key, expected in row.metrics.items():
            line = of_row[key]
            mean, low, high = (float(line[name]) if line[name] else None for name in ("mean", "low", "high"))
            assert (mean, int(line["n"]), low, high) == (expected.mean, expected.n, expected.low, expected.high)
            assert line["kind"] == (expected.kind or "")
        assert float(of_row["cost.bytes"]["mean"]) == 5e6
    assert {line["call"] for line in lines} == {"Fedavg()", "Local()", "Fed_Rep(head_epochs=5)"}


def test_json_holds_all_that_a_leaderboard_does() -> None:
    boards = leaderboards(three_seeds())
    (found,) = json.loads(table.render(boards, "json"))["leaderboards"]
    assert found["protocol"] == boards[0].protocol and found["seeds"] == [0, 1, 2]
    for row, expected in zip(found["rows"], boards[0].rows, strict=True):
        assert row["label"] == expected.label and row["ids"] == list(expected.ids)
        assert {key: Estimate(**value) for key, value in row["metrics"].items()} == expected.metrics


def test_latex_escapes_what_it_would_read_as_its_own() -> None:
    text = table.render(leaderboards([*three_seeds(), record("a_b", {"x": "5%&{y}"})]), "latex")
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)&", line)] for line in body.split("\\\\")]
    rows = [row for row in rows if len(row) > 1]
    assert all(len(row) == 23 for row in rows)
    labels = [row[0].removeprefix(r"\midrule").strip() for row in rows]
    assert labels == [r"fed\_rep(head\_epochs=5)", r"a\_b(x='5\%\&\{y\}') [1]", "local", "fedavg"]
    assert rows[0][7] == "82.0 (80.0--84.0)" and rows[2][3] == "--"
    assert not re.search(r"(?<!\\)[_#%&]", text.replace(body, "").split("\n", 1)[1].split(r"\toprule")[0])
    assert text.count("{") == text.count("}") and "–" not in text and "±" not in text


class Cells(html.parser.HTMLParser):
    """Collects the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.inside = tag in ("td", "th")
        self.cells += [""] * self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def test_html_shows_names_as_they_are() -> None:
    label = "tag(name='<b>|`')"
    boards = leaderboards([record("tag", {"name": "<b>|`"}), record("local", reason="<script>")])
    text = table.render(boards, "html")
    assert Cells(text).cells[len(columns(boards[0])) + 3].strip() == label
    assert "<b>" not in text and "<script>" not in text
    assert cells_of(table.render(boards, "md"))[1][0] == "`tag(name='<b>\\|'')`"


def test_no_runs_are_a_sentence_and_an_unknown_format_an_error() -> None:
    assert table.render([], "md") == "There are no finished runs.\n"
    assert json.loads(table.render([], "json"))["leaderboards"] == []
    assert len(table.render([], "csv").splitlines()) == 1
    assert "no finished runs" in table.render([], "latex") and "no finished runs" in table.render([], "html")
    assert len(table.terminal([])) == 1
    with pytest.raises(ValueError, match="must be one of md, csv, long, latex, json, html"):
        table.render([], "docx")


def test_the_readme_of_results_has_the_prose_above_the_tables(tmp_path: Path) -> None:
    boards = leaderboards(three_seeds())
    text = table.results_readme(boards, "It is all noise.\n", "bench table --out there")
    assert text.startswith("# Results\n\nGenerated from the folders beside this file by `bench table --out there`")
    assert text.index("It is all noise.") < text.index("## digits, imbalance 10, alpha 0.5, setting quick")
    assert f"protocol {boards[0].protocol}; commit 0123456789; runs of 2026-02-03." in text
    assert table.results_readme(boards, None).count("\n\n\n") == 0
    assert records.publish(tmp_path / "there", text).read_text() == text


def test_the_terminal_shows_the_main_columns_within_eighty_characters() -> None:
    from rich.console import Console

    prior = {key: 1.0 for key in ("generic", "generic.few", "personal", "personal.balanced", "personal.few")}
    found = [*three_seeds(), record("ditto", reason="[red]broken")]
    found += [record("fedavg_prior", {"against": "uniform"}, seed=seed, values=prior) for seed in range(3)]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(*table.terminal(leaderboards(found)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "80.0–84.0" in text and "100.0–100.0" in text and "…" not in text and "[red]broken" in text
    heading, *lines = text.split("─\n")
    for word in ("generic", "few", "balanced", "personal", "tail", "worst", "samples", "MB", "seconds"):
        assert word in heading
    assert "TFLOP" not in heading and "masked" not in heading
    names = "".join(re.findall(r"^(\S{1,8}) *(?: 100.0.*)?$", lines[0], re.MULTILINE))
    assert names.startswith("fedavg_prior(against='uniform')")
