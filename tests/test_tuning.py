"""Tuning: an equal budget, chosen on training data, continued where it was, and shown beside the defaults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bench.algorithm import Algorithm
from bench.command.main import main
from bench.dataset import Labels, Splits
from bench.files import source
from bench.plugins.registry import ALGORITHMS, label
from bench.protocol import presets
from bench.protocol.presets import Choice, Preset
from bench.protocol.settings import BadConfig, Setting
from bench.results import records
from bench.results.claims import claim
from bench.splits import selection
from bench.splits.dealing import PartitionFailed
from bench.splits.split import make_split
from bench.sweep.config import Sweep, parse_algorithms, parse_dataset
from bench.sweep.resolving import resolve_setting
from bench.training.job import Job
from bench.training.rounds import Diverged
from bench.tuning import search as searching
from bench.tuning import trial as trialling
from bench.tuning.book import Book, DamagedStudy, check
from bench.tuning.choice import best, kept, preset, scored_by
from bench.tuning.search import search
from bench.tuning.space import space
from bench.tuning.study import Study, Trial

SMALL = {"rounds": 2, "clients": 6, "participation": 0.5}


def study(algorithm: str = "fedavg", chosen: tuple[str, ...] | None = None, **more: Any) -> Study:
    setting = {**SMALL, **more.pop("setting", {})}
    asked = Sweep(
        algorithms=tuple(parse_algorithms(algorithm)),
        datasets=(parse_dataset("digits"),),
        overrides=setting,
        data_root=Path("data"),
        plugins=more.pop("plugins", ()),
    )
    (run,) = asked.expand()
    return Study(run=run, seeds=(0,), space=space(run.algorithm, run.setting.lr, chosen), **more)


def searched(out: Path, *studies: Study, trials: int = 3) -> dict[str, list[Trial]]:
    """Search, and give all but what it cost in time."""
    book = Book(studies, trials, out, lambda *_: None)
    search(book)
    return {each.id: [timeless(trial) for trial in book.within(each)] for each in studies}


def timeless(trial: Trial) -> Trial:
    """Take away what no two runs have in common."""
    kept = ("train_samples", "bytes_up", "bytes_down")
    return replace(trial, cost=[{key: each[key] for key in kept} for each in trial.cost])


# What is set aside


def labels(truth: list[int], users: list[int] | None = None) -> Labels:
    owners = None if users is None else torch.tensor(users)
    return Labels(torch.tensor(truth), torch.zeros(0, dtype=torch.int64), owners)


def by_users(**more: Any) -> Setting:
    plain = {"partition": "users", "clients": None, "imbalance": 1.0, "client_test": "matched", **more}
    return replace(resolve_setting("quick", parse_dataset("digits"), {}), **plain)


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=80),
    st.floats(0.01, 0.5),
    st.integers(0, 9),
)
def test_what_is_set_aside_is_a_share_of_each_class_of_each_client(
    images: list[tuple[int, int]], share: float, seed: int
) -> None:
    users, truth = zip(*images, strict=True)
    known = labels(list(truth), list(users))
    setting = by_users(imbalance=None)
    whole = make_split(known, 4, setting, seed)
    try:
        split = selection.set_aside(known, 4, setting, seed, share)
    except PartitionFailed:
        assert all(len(known.train[mine].unique()) == len(mine) for mine in whole.clients)
        return
    assert len(split.clients) == len(split.tests) == len(whole.clients)
    for mine, fit, aside in zip(whole.clients, split.clients, split.tests, strict=True):
        assert torch.cat([fit, aside]).sort().values.equal(mine)
        for each in known.train[mine].unique():
            n, taken = int((known.train[mine] == each).sum()), int((known.train[aside] == each).sum())
            assert (np.floor(n * share) if n > 1 else 0) <= taken <= (np.ceil(n * share) if n > 1 else 0)
            assert taken < n
    held = torch.stack([torch.bincount(known.train[mine], minlength=4) for mine in whole.clients])
    seen = torch.stack([torch.bincount(known.train[aside], minlength=4) for aside in split.tests])
    assert ((seen.sum(0) > 0) == (held.max(0).values > 1)).all()
    left = torch.nonzero((held.sum(0) > 0) & (seen.sum(0) == 0)).flatten()
    assert selection.without_validation(known, split) == left.tolist()
    fit_rows = torch.cat(split.clients)
    assert split.class_counts.equal(torch.bincount(known.train[fit_rows], minlength=4))


def test_a_share_of_many_images_is_set_aside_whatever_their_number_at_a_client() -> None:
    users = [k for k in range(2000) for _ in range(1 + k % 3)]  # clients of one, two and three images
    known = labels([0] * len(users), users)
    split = selection.set_aside(known, 2, by_users(imbalance=None), 0, 0.2)
    sizes = np.array([len(fit) + len(aside) for fit, aside in zip(split.clients, split.tests, strict=True)])
    aside = np.array([len(rows) for rows in split.tests])
    assert aside[sizes == 1].sum() == 0
    assert aside[sizes == 2].sum() / sizes[sizes == 2].sum() == pytest.approx(0.2, abs=0.03)
    assert aside[sizes == 3].sum() / sizes[sizes == 3].sum() == pytest.approx(0.2, abs=0.03)


def test_a_class_that_nobody_drew_gives_an_image_where_most_of_it_is() -> None:
    truth, users = [0] * 60 + [1] * 2 + [1] * 3 + [2, 2], [0] * 30 + [1] * 30 + [0] * 2 + [1] * 3 + [0, 1]
    known = labels(truth, users)
    found = set()
    for seed in range(40):
        split = selection.set_aside(known, 3, by_users(imbalance=None), seed, 0.02)
        owners = {users[int(row)] for rows in split.tests for row in rows if truth[int(row)] == 1}
        assert owners and selection.without_validation(known, split) == [2]
        found |= {int(row) for row in split.tests[0 if owners == {0} else 1] if truth[int(row)] == 1}
    assert {62, 63, 64} <= found  # any of the three, at the client that has them


def test_classes_without_an_image_to_choose_by_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    one = study()
    check([one])
    assert capsys.readouterr().err == ""
    check([replace(one, run=replace(one.run, setting=replace(one.run.setting, clients=60, imbalance=100.0)))])
    said = capsys.readouterr().err
    assert said.startswith("digits, seed 0: ") and said.count("\n") == 1
    assert "5 of 10 classes (5, 6, 7, 8, 9) have no validation image, as no client has two of one;" in said


def test_the_seed_decides_what_is_set_aside_and_the_test_part_does_not() -> None:
    digits, setting = parse_dataset("digits"), study().run.setting
    known = digits.labels(Path("data"))
    first, again = (selection.set_aside(known, 10, setting, 0, 0.2) for _ in range(2))
    garbage = replace(known, test=torch.full((3,), 99), test_users=None)
    assert selection.set_aside(garbage, 10, setting, 0, 0.2).fingerprint == first.fingerprint
    for split in (again, selection.set_aside(garbage, 10, setting, 0, 0.2)):
        assert all(a.equal(b) for a, b in zip(first.tests, split.tests, strict=True))
    mine = labels([0, 1] * 50, [0] * 60 + [1] * 40)  # clients that no seed changes
    aside = [selection.set_aside(mine, 2, by_users(imbalance=None), seed, 0.2).tests for seed in (0, 0, 1)]
    assert torch.cat(aside[0]).equal(torch.cat(aside[1]))
    assert not torch.cat(aside[0]).equal(torch.cat(aside[2]))


def test_clients_held_out_of_training_take_no_part_in_tuning() -> None:
    known = parse_dataset("digits").labels(Path("data"))
    setting = replace(study().run.setting, unseen=2)
    whole, split = make_split(known, 10, setting, 0), selection.set_aside(known, 10, setting, 0, 0.2)
    assert len(split.clients) == len(whole.clients) - 2
    held_out = torch.cat(whole.clients[-2:])
    assert not torch.isin(torch.cat([*split.clients, *split.tests]), held_out).any()


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6, 1.0])
def test_a_share_beyond_reason_is_refused(share: float) -> None:
    with pytest.raises(BadConfig, match=r"in \(0, 0.5\] is wanted"):
        selection.set_aside(labels([0, 0, 1, 1], [0, 0, 0, 0]), 2, by_users(imbalance=None), 0, share)


def test_clients_without_two_images_of_a_class_are_told_what_to_do() -> None:
    with pytest.raises(PartitionFailed, match="no client can set an image aside"):
        selection.set_aside(labels([0, 1, 0, 1], [0, 0, 1, 1]), 2, by_users(imbalance=None), 0, 0.5)


@dataclass
class InAFile:
    """Images that are read by rows."""

    images: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.images.dtype
        return found

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.images[rows]
        return found

    def prefetch(self, rows: torch.Tensor) -> None:
        assert int(rows.max()) < len(self.images)


@pytest.mark.parametrize("kind", ["in memory", "in a file", "held in part"])
def test_what_is_set_aside_takes_the_place_of_the_test_part(kind: str) -> None:
    digits = parse_dataset("digits").load(Path("data"))
    whole = digits.train_x
    assert isinstance(whole, torch.Tensor)
    split = selection.set_aside(digits.labels, 10, study().run.setting, 0, 0.2)
    used = torch.cat([*split.clients, *split.tests]).sort().values
    splits = {
        "in memory": digits,
        "in a file": replace(digits, train_x=InAFile(whole)),
        "held in part": replace(digits, train_x=whole[used], held=used),
    }[kind]
    seen, numbered = selection.view(splits, split)
    assert seen.test_y.equal(digits.train_y[torch.cat(split.tests)])
    assert len(seen.test_x) == len(seen.test_y) == sum(map(len, split.tests))
    assert tuple(seen.test_x.shape) == (len(seen.test_y), *whole.shape[1:])
    assert seen.test_x.dtype == whole.dtype
    for rows, places in zip(split.tests, numbered.tests, strict=True):
        assert seen.test_x[places].equal(whole[rows])
    if not isinstance(seen.test_x, torch.Tensor):
        seen.test_x.prefetch(numbered.tests[0])


def test_images_in_a_file_give_the_trials_that_they_give_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = study("fedper", setting={"rounds": 1})
    in_memory = searched(tmp_path / "memory", each, trials=1)
    load = source.load
    monkeypatch.setattr(source, "load", lambda *where: replace(load(*where), train_x=InAFile(load(*where).train_x)))
    trialling._images.cache_clear()
    assert searched(tmp_path / "file", each, trials=1) == in_memory
    trialling._images.cache_clear()


# What is tuned


def test_fields_are_searched_around_their_defaults_and_the_learning_rate_too() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Many(type(parse_algorithms("fedavg")[0])):  # type: ignore[misc]
        share: float = 0.3
        steps: int = 5
        one: int = 1
        none: float = 0.0
        flag: bool = True
        text: str = "x"

    assert space(Many(), 0.05) == {
        "share": FloatDistribution(0.03, 3.0, log=True),
        "steps": IntDistribution(2, 10, log=True),
        "one": IntDistribution(1, 2, log=True),
        "flag": CategoricalDistribution((False, True)),
        "lr": FloatDistribution(0.005, 0.5, log=True),
    }
    assert set(space(Many(), 0.05, {"lr", "steps"})) == {"lr", "steps"}
    assert "steps" not in space(Many(steps=7), 0.05), "a field that is given is not tuned"


def test_an_algorithm_may_declare_what_is_tuned() -> None:
    (fedloge,) = parse_algorithms("fedloge")
    assert space(fedloge, 0.1) == {
        "sparsity": FloatDistribution(0.1, 0.9, log=True),
        "etf_norm": FloatDistribution(0.01, 1.0, log=True),
        "scale": FloatDistribution(0.17, 17.0, log=True),
        "lr": FloatDistribution(0.01, 1.0, log=True),
    }


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"absent": (1, 2)}, "which is none of its fields"),
        ({"head_epochs": 3}, "or a list of values is wanted"),
        ({"head_epochs": (5, 1)}, "or a list of values is wanted"),
        ({"head_epochs": []}, "or a list of values is wanted"),
    ],
)
def test_a_wrong_space_is_answered_in_a_sentence(declared: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (fedrep,) = parse_algorithms("fedrep")
    monkeypatch.setattr(type(fedrep), "space", declared)
    with pytest.raises(BadConfig, match=said):
        space(fedrep, 0.1)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_accepts_the_bounds_of_its_own_space(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    for field, values in space(algorithm, 0.1).items():
        known: Any = values
        ends = known.choices if isinstance(values, CategoricalDistribution) else (known.low, known.high)
        for end in ends if field != "lr" else ():
            assert getattr(replace(algorithm, **{field: end}), field) == end


# The search


def test_every_algorithm_has_the_same_number_of_trials_and_the_first_is_as_it_was_asked(tmp_path: Path) -> None:
    fedavg, fedrep = study(), study("fedrep(body_epochs=2)")
    found = searched(tmp_path, fedavg, fedrep, trials=3)
    assert [len(trials) for trials in found.values()] == [3, 3]
    for each in (fedavg, fedrep):
        first, *others = found[each.id]
        assert first.values == {} and first.lr == 0.05
        assert all(set(trial.values) == set(each.space) for trial in others)
    assert all("body_epochs=2" in trial.call for trial in found[fedrep.id])
    stored = [json.loads(line) for line in (tmp_path / "tuning" / fedrep.id / "trials.jsonl").read_text().splitlines()]
    assert [each["number"] for each in stored] == [0, 1, 2]
    assert all(
        each["score"] == each["metrics"][0]["personal.balanced"] and each["cost"][0]["train_samples"] > 0
        for each in stored
    )


def test_an_algorithm_with_nothing_to_tune_has_one_trial(tmp_path: Path) -> None:
    nothing = study(chosen=("mu",))
    assert nothing.space == {}
    assert len(searched(tmp_path, nothing, trials=5)[nothing.id]) == 1


def test_choices_do_not_change_if_the_test_set_is_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = study("fedavg_ft(finetune_epochs=1)"), study("fedrep(head_epochs=2)")
    honest = searched(tmp_path / "honest", *studies)
    load, read = source.load, source.labels
    noise = torch.Generator().manual_seed(0)

    def garbage(splits: Splits) -> Splits:
        x = torch.randint(0, 17, (50, *splits.train_x.shape[1:]), generator=noise, dtype=torch.uint8)
        return replace(splits, test_x=x, test_y=torch.randint(-5, 99, (50,), generator=noise))

    monkeypatch.setattr(source, "load", lambda *where: garbage(load(*where)))
    monkeypatch.setattr(source, "labels", lambda *where: replace(read(*where), test=torch.tensor([-1, 99])))
    trialling._images.cache_clear()
    check(studies)
    assert searched(tmp_path / "garbage", *studies) == honest
    trialling._images.cache_clear()
    for each in studies:
        assert any(trial.score != honest[each.id][0].score for trial in honest[each.id]), "there was nothing to choose"


def test_a_trial_is_given_training_images_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = parse_dataset("digits").load(Path("data"))
    given: list[Any] = []
    train = trialling.train

    def spy(job: Job, **how: Any) -> Any:
        given.append(job)
        return train(job, **how)

    monkeypatch.setattr(trialling, "train", spy)
    searched(tmp_path, study(), trials=1)
    (job,) = given
    rows = torch.cat(selection.set_aside(digits.labels, 10, study().run.setting, 0, 0.2).tests)
    assert job.splits.test_x.equal(digits.train_x[rows])
    assert not torch.isin(torch.cat(job.split.clients), rows).any()
    assert job.setting.eval_every == job.setting.rounds
    kept = trialling._images(study().run.dataset, study().run.data_root)
    assert len(kept.test_x) == len(kept.test_y) == 0, "the official test part is not even kept"


def test_a_trial_trains_with_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    train = trialling.train
    monkeypatch.setattr(trialling, "train", lambda job, **how: given.append(job) or train(job, **how))  # type: ignore[func-returns-value]
    each = study("fedprox", setting={"rounds": 1})
    trials = searched(tmp_path, each, trials=3)[each.id]
    assert [(label(job.algorithm), job.setting.lr) for job in given] == [(t.call, t.lr) for t in trials]
    assert len({job.algorithm.mu for job in given}) == 3


def test_the_mean_over_seeds_is_what_counts(tmp_path: Path) -> None:
    both = replace(study(), seeds=(0, 1))
    (first,) = searched(tmp_path, both, trials=1)[both.id]
    alone = [searched(tmp_path, replace(study(), seeds=(seed,)), trials=1) for seed in (0, 1)]
    scores = [trials[0].score for found in alone for trials in found.values()]
    assert first.score == pytest.approx(np.mean(scores))  # type: ignore[arg-type]
    assert len(first.metrics) == len(first.digests) == 2


@pytest.mark.parametrize(
    ("algorithm", "target", "model"),
    [
        ("fedavg", "personal", "personal"),
        ("fedavg", "balanced", "personal.balanced"),
        ("fedavg", "generic", "generic"),
        ("fedrep", "generic", "personal.balanced"),
    ],
)
def test_the_model_that_is_asked_for_is_scored_if_there_is_one(
    algorithm: str, target: str, model: str, tmp_path: Path
) -> None:
    each = study(algorithm, target=target)
    trials = searched(tmp_path, each, trials=1)[each.id]
    assert scored_by(each, trials) == model
    assert trials[0].score == trials[0].metrics[0][model]


def test_an_interrupted_search_makes_the_same_choices_and_repeats_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = study(), study("fedprox")
    undisturbed = searched(tmp_path / "undisturbed", *studies, trials=4)
    attempts, attempt = [], searching.attempt

    def counted(of: Study, trial: Trial, folder: Path, say: Callable[[str], None]) -> Trial:
        attempts.append((of.id, trial.number))
        if len(attempts) in (3, 6):
            raise KeyboardInterrupt
        return attempt(of, trial, folder, say)

    monkeypatch.setattr(searching, "attempt", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "disturbed", *studies, trials=4)
    assert searched(tmp_path / "disturbed", *studies, trials=4) == undisturbed
    assert len(attempts) == 8 + 2, "the two that were interrupted, and no other, are begun twice"
    assert searched(tmp_path / "disturbed", *studies, trials=4) == undisturbed
    assert len(attempts) == 10


def test_more_trials_go_on_from_fewer_and_fewer_are_a_part_of_more(tmp_path: Path) -> None:
    each = study("ditto")
    few = searched(tmp_path, each, trials=2)[each.id]
    many = searched(tmp_path, each, trials=5)[each.id]
    assert many[:2] == few
    assert many == searched(tmp_path / "at once", each, trials=5)[each.id]
    assert searched(tmp_path, each, trials=2)[each.id] == few


def test_a_trial_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = study(setting={"rounds": 3})
    (undisturbed,) = searched(tmp_path / "undisturbed", each, trials=1)[each.id]
    from bench.training.rounds import Run

    monkeypatch.setattr(Run, "_is_due", lambda _: True)
    step, steps = Run.step, []

    def counted(run: Run) -> Any:
        steps.append(run.progress.round)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "disturbed", each, trials=1)
    assert [timeless(trial) for trial in searched(tmp_path / "disturbed", each, trials=1)[each.id]] == [undisturbed]
    assert steps == [0, 1, 2, 2]
    assert not list((tmp_path / "disturbed").rglob("*.pt")), "checkpoints go when a trial ends"


def test_a_damaged_checkpoint_of_a_trial_begins_it_anew_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = study(setting={"rounds": 2})
    (undisturbed,) = searched(tmp_path / "undisturbed", each, trials=1)[each.id]
    folder = tmp_path / "disturbed" / "tuning" / each.id
    folder.mkdir(parents=True)
    (folder / "trial-0-seed-0.pt").write_bytes(b"half")
    assert [timeless(trial) for trial in searched(tmp_path / "disturbed", each, trials=1)[each.id]] == [undisturbed]
    sentence = f"a checkpoint of trial 0 of {undisturbed.call} is damaged; it begins anew"
    assert capsys.readouterr().err == f"bench: {sentence}\n"
    (folder / "trial-0-seed-0.pt").write_bytes(b"half")
    monkeypatch.setattr("bench.tuning.search.unpacked", lambda payload: nullcontext(payload))
    answer = searching._on_worker({"payload": (each, each.begun({}, 0)), "folder": str(folder)})
    assert answer["said"] == [sentence], "standard error of a worker on Ray is not heard"


def fails_above(lr: float) -> Callable[..., Any]:
    train = trialling.train

    def wrapped(job: Job, **how: Any) -> Any:
        if job.setting.lr > lr:
            raise Diverged(f"diverged: a learning rate above {lr}")
        return train(job, **how)

    return wrapped


def test_a_trial_that_diverges_counts_as_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trialling, "train", fails_above(0.03))
    each = study()
    trials = searched(tmp_path, each, trials=6)[each.id]
    failed = [trial for trial in trials if trial.lr > 0.03]
    assert trials[0] in failed and 0 < len(failed) < 6
    assert all(trial.score is None and "diverged" in str(trial.reason) for trial in failed)
    chosen = best(trials)
    assert chosen is not None and chosen.lr < 0.03
    assert best(failed) is None


def test_the_sampler_is_told_that_failures_are_the_worst() -> None:
    each = study()

    def trials(failure: float | None) -> list[Trial]:
        rates = [0.05, *(0.006 * 1.3**n for n in range(15))]
        return [
            Trial(
                number=n, values={"lr": lr} if n else {}, call="fedavg", lr=lr, score=failure if lr > 0.03 else 0.5 + lr
            )
            for n, lr in enumerate(rates)
        ]

    unknown, zero, one = ([each.propose(trials(failure)[:n]) for n in range(11, 17)] for failure in (None, 0.0, 1.0))
    assert unknown == zero != one


def test_the_first_of_equals_is_chosen() -> None:
    trials = [Trial(number=n, values={}, call="fedavg", lr=0.1, score=score) for n, score in enumerate((0.5, 0.7, 0.7))]
    chosen = best(trials)
    assert chosen is not None and chosen.number == 1


def test_values_that_were_tried_are_not_run_again_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, attempt = [], searching.attempt
    monkeypatch.setattr(searching, "attempt", lambda *what: ran.append(what[1].call) or attempt(*what))  # type: ignore[func-returns-value]
    (fedrep,) = parse_algorithms("fedrep")
    monkeypatch.setattr(type(fedrep), "space", {"head_epochs": [1, 10]})
    each = study("fedrep", chosen=("head_epochs",))
    trials = searched(tmp_path, each, trials=6)[each.id]
    assert len(trials) == 6
    assert len(ran) == len(set(ran)) == len({trial.call for trial in trials}) <= 2
    for trial in trials:
        first = next(each for each in trials if each.call == trial.call)
        assert trial.score == first.score and trial.same_as == (None if trial is first else first.number)


def test_values_that_an_algorithm_refuses_cost_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fedloge,) = parse_algorithms("fedloge")
    monkeypatch.setattr(type(fedloge), "space", {"sparsity": [2.0]})
    each = study("fedloge(etf_steps=2)", chosen=("sparsity",))
    _, refused = searched(tmp_path, each, trials=2)[each.id]
    assert refused.score is None and "sparsity must be a number from 0 to below 1" in str(refused.reason)


def test_a_study_is_told_by_all_that_decides_its_choices() -> None:
    plain = study()
    others = [
        study("fedprox"),
        study(chosen=()),
        study(share=0.3),
        study(target="generic"),
        study(setting={"rounds": 3}),
        replace(plain, seeds=(0, 1)),
    ]
    assert len({plain.id, *(other.id for other in others)}) == 1 + len(others)
    assert study().id == plain.id
    assert replace(plain, run=replace(plain.run, seed=7)).id == plain.id


def test_a_damaged_file_of_trials_is_named(tmp_path: Path) -> None:
    each = study()
    searched(tmp_path, each, trials=2)
    file = tmp_path / "tuning" / each.id / "trials.jsonl"
    whole = file.read_text()
    for damaged in (whole[:-20], whole.splitlines()[1] + "\n", whole.replace('"score": 0', '"score": "0')):
        file.write_text(damaged)
        with pytest.raises(DamagedStudy, match="delete the folder"):
            Book([each], 2, tmp_path, lambda *_: None)


# Presets


TUNED = Preset(
    name="tuned",
    dataset="digits",
    protocol="0123456789ab",
    trials=4,
    validation=0.2,
    seeds=[0, 1],
    target="personal",
    tuned=["lr", "mu"],
    algorithms={
        "fedavg": Choice(call="fedavg", lr=0.02, score=0.5, untuned=None, study="00"),
        'fedloge(personal_rule="P1")': Choice(call="fedloge(personal_rule='P1', scale=1.5)"),
    },
)


def test_a_preset_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text(presets.spell(TUNED, "Two lines\nof comment"))
    assert presets.read(file) == TUNED
    assert file.read_text().startswith("# Two lines\n# of comment\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "cannot be read as a preset"),
        ("trials = 3", "name: "),
        ('name = "x"\ntrial = 3', "trial: "),
        ('name = "x"\ntrials = "3"', "trials: "),
        ('name = "x"\n[algorithms.fedavg]\nlr = 0.1', "algorithms.fedavg.call: "),
        ('name = "x"\n[algorithms.fedavg]\ncall = "fedavg"\nlr = nan', "cannot be read|lr: "),
        ('name = "x"\ntrials = 2026-01-01', "cannot be read"),
        ('name = "paper"', "cannot be called 'paper'"),
    ],
)
def test_a_wrong_preset_is_answered_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(BadConfig, match=said):
        presets.parse_presets(str(tmp_path / "x.toml"), tmp_path)


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), (" , ", "is empty"), ("nothing", "no such file, nor")])
def test_a_preset_that_is_not_there_is_answered_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=said):
        presets.parse_presets(text, tmp_path)


def test_a_preset_of_the_folder_of_results_is_called_by_its_name(tmp_path: Path) -> None:
    file = presets.file_of("tuned", tmp_path)
    file.parent.mkdir()
    file.write_text(presets.spell(TUNED, ""))
    found = presets.parse_presets("default,paper,tuned", tmp_path)
    assert [each.name for each in found] == ["default", "paper", "tuned"]


def test_what_is_not_in_a_preset_is_not_guessed() -> None:
    with pytest.raises(BadConfig, match=r"preset tuned has no fedavg_ft; it has fedavg, fedloge"):
        TUNED.choose(parse_algorithms("fedavg_ft")[0])
    wrong = replace(TUNED, algorithms={"fedavg": Choice(call="fedrep")})
    with pytest.raises(BadConfig, match="a call of that algorithm is wanted"):
        wrong.choose(parse_algorithms("fedavg")[0])


def test_the_papers_values_replace_defaults_and_not_what_was_asked_for() -> None:
    plain, given = parse_algorithms("fedloge,fedloge(scale=2.0)")
    assert presets.PAPER.choose(plain)[0].scale == 1.0  # type: ignore[attr-defined]
    assert presets.PAPER.choose(given)[0].scale == 2.0  # type: ignore[attr-defined]
    (fedavg,) = parse_algorithms("fedavg")
    assert presets.PAPER.choose(fedavg) == (fedavg, None)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_papers_values_are_fields(name: str) -> None:
    chosen, lr = presets.PAPER.choose(ALGORITHMS[name]())
    assert isinstance(chosen, Algorithm) and lr is None


def test_choices_with_another_budget_never_stand_in_one_preset(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    same = replace(TUNED, algorithms={})
    assert kept(same, TUNED, file, ["fedrep"]) == TUNED.algorithms
    for other in ({"trials": 8}, {"validation": 0.3}, {"target": "generic"}, {"seeds": [0]}, {"tuned": None}):
        with pytest.raises(BadConfig, match="tuned on another budget"):
            kept(replace(same, **other), TUNED, file, ["fedavg"])
        assert kept(replace(same, **other), TUNED, file, list(TUNED.algorithms)) == {}
    with pytest.raises(BadConfig, match="tuned for another protocol"):
        kept(replace(same, protocol="x"), TUNED, file, list(TUNED.algorithms))


def test_a_preset_holds_what_was_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = study(), study("fedprox")
    trials = {
        good.id: [
            Trial(number=0, values={}, call="fedavg", lr=0.05, score=0.5),
            Trial(number=1, values={"lr": 0.1}, call="fedavg", lr=0.1, score=0.8),
        ],
        bad.id: [Trial(number=n, values={}, call="fedprox", lr=0.05, reason="x") for n in range(2)],
    }
    book = Book([good, bad], 2, tmp_path, lambda *_: None)
    book.trials = trials
    found = preset(book, 2, "mine", None)
    assert found.algorithms == {"fedavg": Choice(call="fedavg", lr=0.1, score=0.8, untuned=0.5, study=good.id)}
    assert (found.name, found.protocol, found.trials) == ("mine", good.run.protocol, 2)


def test_a_preset_for_another_protocol_is_remarked_on() -> None:
    (sentence,) = presets.remarks([presets.DEFAULT, presets.PAPER, TUNED], {"0123456789ab", "ffffffffffff"})
    assert "preset tuned was tuned for another protocol" in sentence
    assert presets.remarks([TUNED], {"0123456789ab"}) == []


# The command


@dataclass(frozen=True)
class Answer:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Call the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        printed = capsys.readouterr()
        return Answer(int(str(ended.value.code)), printed.out, printed.err)

    return call


OPTIONS = ("--rounds", 2, "--clients", 6, "--ray", "off")


def test_what_was_tuned_stands_in_the_table_beside_the_default(bench: Callable[..., Answer], tmp_path: Path) -> None:
    tuned = bench("tune", "--algos", "fedavg,fedrep(head_epochs=2)", "--trials", 3, *OPTIONS)
    assert tuned.status == 0, tuned.err
    assert "as written" in tuned.out and "preset: runs/presets/tuned.toml" in tuned.out
    assert not set("┏┃┡│") & set(tuned.out) and "─" * 20 in tuned.out, "a table like all others"
    preset = presets.read(tmp_path / "runs/presets/tuned.toml")
    assert set(preset.algorithms) == {"fedavg", "fedrep(head_epochs=2)"}
    changed = [choice for asked, choice in preset.algorithms.items() if (choice.call, choice.lr) != (asked, None)]
    assert changed, "the test is of no use if the defaults are the best"
    ran = bench(
        "run", "--algos", "fedavg,fedrep(head_epochs=2)", "--preset", "default,tuned", *OPTIONS,
        "--tracking-uri", "off", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    found, damaged = records.read_all(tmp_path / "runs")
    assert len(found) == 2 + len(changed) and not damaged
    assert len({record.protocol for record in found}) == 1, "one table"
    assert {record.setting["lr"] for record in found} == {0.05}
    for change in changed:
        (record,) = [
            each for each in found if each.document["preset"] == "tuned" and str(each.label).startswith(change.call)
        ]
        assert record.label == change.call + (" [tuned]" if change.lr is None else f" [tuned, lr {change.lr:g}]")
        algorithm: Any = record.identity["algorithm"]
        assert algorithm.get("lr") == change.lr
    table = json.loads(bench("table", "--format", "json").out)
    text = json.dumps(table)
    assert "[tuned" in text
    assert "another protocol" not in ran.err
    assert "another protocol" in bench(
        "run", "--algos", "fedavg", "--preset", "tuned", "--ray", "off", "--rounds", 1, "--tracking-uri", "off"
    ).err  # fmt: skip


def test_a_tuned_learning_rate_is_what_is_trained_with(bench: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('name = "x"\n[algorithms.fedavg]\ncall = "fedavg"\nlr = 0.2\n')
    run = ("run", "--algos", "fedavg", *OPTIONS, "--tracking-uri", "off", "--json")
    preset, setting = bench(*run, "--preset", "x.toml"), bench(*run, "--lr", 0.2)
    (first,), (second,) = (json.loads(answer.out)["runs"] for answer in (preset, setting))
    assert first["digest"] == second["digest"]
    assert first["id"] != second["id"]


def test_tuning_goes_on_and_prints_one_document(bench: Callable[..., Answer], tmp_path: Path) -> None:
    command = ("tune", "--algos", "fedavg", "--fields", "lr", "--name", "mine", *OPTIONS)
    assert bench(*command, "--trials", 2).status == 0
    again = bench(*command, "--trials", 3, "--json")
    assert again.status == 0 and "2 trials are there" in again.err
    (only,) = json.loads(again.out)["studies"]
    assert [trial["number"] for trial in only["trials"]] == [0, 1, 2]
    assert json.loads(again.out)["preset"] == "runs/presets/mine.toml"
    assert presets.read(tmp_path / "runs/presets/mine.toml").trials == 3


def test_two_processes_never_search_one_study(bench: Callable[..., Answer], tmp_path: Path) -> None:
    command = ("tune", "--algos", "fedavg", "--trials", 1, "--tracking-uri", "off", *OPTIONS)
    assert bench(*command).status == 0
    (folder,) = (tmp_path / "runs/tuning").iterdir()
    with claim(folder):
        refused = bench(*command)
    assert refused.status == 2 and "another process is tuning fedavg" in refused.err
    assert bench(*command).status == 0


def test_a_search_in_which_every_trial_fails_writes_no_preset(
    bench: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trialling, "train", fails_above(0.0))
    answer = bench("tune", "--algos", "fedavg", "--trials", 2, *OPTIONS)
    assert answer.status == 1
    assert "every trial of fedavg failed" in answer.err and "diverged" in answer.err
    assert not (tmp_path / "runs/presets").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--imbalance", "10,50"), "one imbalance"),
        (("--fields", "mu"), "--fields mu: these can be tuned: lr"),
        (("--fields", ""), "--fields is empty"),
        (("--name", "default"), "--name default"),
        (("--name", "../x"), "--name ../x"),
        (("--trials", "0"), "0 is not in the range"),
        (("--validation", "0.9"), "--validation 0.9: a share"),
        (("--for", "best"), "personal"),
        (("--algos", "fedavgg"), "fedavg"),
    ],
)
def test_wrong_words_are_answered_in_a_sentence(
    words: tuple[str, ...], said: str, bench: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = bench("tune", "--algos", "fedavg", *OPTIONS, *words)
    assert answer.status == 2
    assert said in answer.err and answer.err.startswith("bench: ") and len(answer.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_preset_of_another_budget_is_refused_before_any_work(bench: Callable[..., Answer], tmp_path: Path) -> None:
    assert bench("tune", "--algos", "fedavg,fedprox", "--trials", 1, *OPTIONS).status == 0
    refused = bench("tune", "--algos", "fedavg", "--trials", 2, *OPTIONS)
    assert refused.status == 2 and "holds fedprox, tuned on another budget" in refused.err
    assert "2/2" not in refused.err
    joined = bench("tune", "--algos", "local", "--trials", 1, *OPTIONS)
    assert joined.status == 0, joined.err
    assert set(presets.read(tmp_path / "runs/presets/tuned.toml").algorithms) == {"fedavg", "fedprox", "local"}


# On Ray


FRAIL = '''
"""Frail: FedAvg whose process dies, once."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from bench import Algorithm, register


@register("frail")
@dataclass(frozen=True, kw_only=True)
class Frail(Algorithm):
    pull: float = 0.5

    def local_update(self, task, shared, private, data):
        marker = Path(os.environ["FRAIL"])
        if task.round == 1 and self.pull != 0.5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
'''


def command(cwd: Path, *words: object, **environment: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "bench", *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=cwd, env={**os.environ, **environment}, **pipes)


def trials_of(out: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(out.glob("tuning/*/trials.jsonl")) for line in file.read_text().splitlines()]
    return [asdict(timeless(Trial(**json.loads(line)))) for line in lines]


def test_ray_tune_makes_the_same_choices_though_a_worker_dies(tmp_path: Path) -> None:
    (tmp_path / "frail.py").write_text(FRAIL)
    marker = tmp_path / "died"
    line = ("tune", "--algos", "fedavg,frail", "--plugin", "frail.py", "--trials", 3, "--rounds", 2, "--clients", 6)
    on_ray = command(tmp_path, *line, "--ray", "local", "--jobs", 2, "--out", "ray", "--json", FRAIL=str(marker))
    out, err = on_ray.communicate(timeout=240)
    assert on_ray.returncode == 0, err
    assert marker.exists()
    assert len(json.loads(out)["studies"]) == 2, "standard output is one document"
    alone = command(tmp_path, *line, "--ray", "off", "--out", "alone", FRAIL=str(marker))
    _, err = alone.communicate(timeout=240)
    assert alone.returncode == 0, err
    assert trials_of(tmp_path / "ray") == trials_of(tmp_path / "alone")
    assert len(trials_of(tmp_path / "ray")) == 6


def test_an_interruption_keeps_what_was_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    line = ("tune", "--algos", "fedavg,fedprox", "--trials", 6, "--rounds", 60, "--clients", 6, "--jobs", 2)
    running = command(tmp_path, *line, "--ray", "local")  # trials so long that it cannot be through before the signal
    patience = time.monotonic() + 120
    while len(trials_of(tmp_path / "runs")) < 3:
        assert time.monotonic() < patience and running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "trials are left" in err and "bench tune --algos fedavg,fedprox --trials 6" in err
    done = trials_of(tmp_path / "runs")
    assert 3 <= len(done) < 12
    again = command(tmp_path, *line, "--ray", "off")
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert len(trials_of(tmp_path / "runs")) == 12
    assert all(trial in trials_of(tmp_path / "runs") for trial in done)
