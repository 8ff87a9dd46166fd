"""Many clients, and images that stay in a file: the same numbers as in memory, and little of it."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import keys, tree
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.data import AUGMENTATIONS, Images
from bench.dataset import Labels, Splits, Streamed
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.splits.split import PartitionFailed, make_split
from bench.training import population, states
from bench.training.job import Job
from bench.training.rounds import Run
from bench.training.states import InFile, InMemory, StatesUnwritable, Store


class Lent:
    """Images that are given out by rows and counted, as those of a file are."""

    def __init__(self, x: Tensor | Streamed) -> None:
        self.x, self.read, self.announced = x, 0, [torch.empty(0, dtype=torch.int64)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.read += len(rows)
        return self.x[rows]

    def prefetch(self, rows: Tensor) -> None:
        self.announced.append(rows)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy problem's images are few, and would be read into memory."""
    monkeypatch.setattr(population, "RESIDENT", 0)


def stepped(algorithm: str, engine: str = "serial", *, lent: bool = False, **changes: Any) -> Run:
    """A run of the toy problem, two rounds on, with images in memory or lent."""
    setting = replace(toy.SETTING, rounds=2, **changes)
    dataset = toy.Toy()
    splits = dataset.load()
    if lent:
        splits = replace(splits, train_x=Lent(splits.train_x), test_x=Lent(splits.test_x))
    plugin: Algorithm = ALGORITHMS[algorithm]()
    return toy.finish(Run(Job(plugin, dataset, splits, toy.split(dataset.load()), setting, 0, engine)))


# Images in a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_from_a_file_are_those_from_memory(augment: str) -> None:
    key = keys.key(3)
    x = keys.integers(key, 256, 40, 3, 12, 12).to(torch.uint8)
    rows = torch.tensor([5, 39, 0, 17, 18, 20])
    y = torch.arange(6)
    look = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), augment)
    memory, file = Images(x, y, *look, rows=rows), Images(Lent(x), y, *look, rows=rows)
    index = torch.tensor([3, 3, 1, 0, 5])
    example = torch.arange(5)
    assert torch.equal(memory.plain(index), file.plain(index))
    assert torch.equal(memory.augmented(index, key, example), file.augmented(index, key, example))
    resident, places = file.gather(index.view(1, 5))
    assert resident.x is not None and len(resident) == 4
    assert torch.equal(resident.augmented(places[0], key, example), memory.augmented(index, key, example))
    assert torch.equal(resident.y[places[0]], y[index])


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedloge", "creff", "centralised"])
def test_a_run_from_a_file_is_the_run_from_memory(algorithm: str, engine: str) -> None:
    memory, file = stepped(algorithm, engine), stepped(algorithm, engine, lent=True)
    assert tree.digest([toy.states(memory)]) == tree.digest([toy.states(file)])
    assert memory.outcome().metrics == file.outcome().metrics


def test_few_images_in_a_file_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    file = stepped("fedavg", lent=True)
    assert file.population.images.streamed is not None and file.population.test.streamed is not None
    bytes_of_training, bytes_of_test = (
        len(images) * math.prod(images.shape) for images in (file.population.images, file.population.test)
    )
    monkeypatch.setattr(population, "RESIDENT", min(bytes_of_training, bytes_of_test))
    assert bytes_of_test < bytes_of_training  # so that the limit is seen from both sides
    once = stepped("fedavg", lent=True)
    assert once.population.images.streamed is not None and once.population.test.streamed is None
    monkeypatch.setattr(population, "RESIDENT", bytes_of_training)
    both = stepped("fedavg", lent=True)
    assert both.population.images.streamed is None
    assert isinstance(both.job.splits.train_x, Lent) and both.job.splits.train_x.read == len(both.population.images)
    assert tree.digest([toy.states(file)]) == tree.digest([toy.states(once)]) == tree.digest([toy.states(both)])


def test_a_cohorts_images_and_the_next_ones_are_announced_and_no_others_are_read() -> None:
    run = stepped("fedavg", lent=True, participation=0.25)
    images = run.population.images.streamed
    assert isinstance(images, Lent)
    first, second = (set(run.population.images._rows(rows).tolist()) for rows in cohort_rows(run))
    assert [set(rows.tolist()) for rows in images.announced[1:]] == [first | second, second]
    once_more = sum(toy.SIZES)  # all clients, for the test of models right after local work
    assert images.read == toy.SETTING.epochs * (sum(len(rows) for rows in cohort_rows(run)) + once_more)


def cohort_rows(run: Run) -> list[Tensor]:
    return [torch.cat([run.population.index[k] for k in run.population.cohort(r)]) for r in range(2)]


def test_float16_features_are_images_too() -> None:
    features = torch.linspace(-2, 2, 12).to(torch.float16).view(3, 4, 1, 1)
    images = Images(features, torch.zeros(3, dtype=torch.int64), (0.0,) * 4, (1.0,) * 4, scale=1.0)
    assert torch.equal(images.plain(torch.tensor([2, 0])), features[[2, 0]].float())


def test_a_part_of_the_training_images_gives_the_run_of_all_of_them() -> None:
    dataset, split = toy.Toy(), toy.split(toy.Toy().load())
    splits = dataset.load()
    held = torch.cat(split.clients).sort().values
    part = replace(splits, train_x=splits.train_x[held], held=held)
    setting = replace(toy.SETTING, rounds=1)
    runs = [
        toy.finish(Run(Job(ALGORITHMS["fedavg"](), dataset, s, split, setting, 0, "serial"))) for s in (splits, part)
    ]
    assert tree.digest([toy.states(runs[0])]) == tree.digest([toy.states(runs[1])])


# States of many clients -------------------------------------------------------------------------------------

INITIAL = {
    "own": {},
    "head": {"weight": torch.zeros(3, 2), "n": torch.zeros((), dtype=torch.int64)},
    "empty": torch.ones(0),
}


def state(number: int) -> tree.Tree:
    return {**INITIAL, "head": {"weight": torch.full((3, 2), float(number)), "n": torch.tensor(number)}}


def same(a: tree.Tree, b: tree.Tree) -> bool:
    return tree.digest([a]) == tree.digest([b]) and a.keys() == b.keys()


@given(st.lists(st.tuples(st.sampled_from(["write", "save", "return"]), st.integers(0, 5), st.integers(0, 99))))
def test_a_file_of_states_is_a_dictionary_that_returns_to_its_checkpoint(
    steps: list[tuple[str, int, int]],
) -> None:
    store, kept, saved = InFile(INITIAL, "cpu", None), dict[int, int](), dict[int, int]()
    snapshot = store.snapshot()
    store.release()
    for what, client, number in steps:
        if what == "write":
            store[client] = state(number)
            kept[client] = number
        elif what == "save":
            snapshot, saved = store.snapshot(), dict(kept)
            store.release()
        else:  # the process died and another one goes on
            assert store.restore(snapshot)
            kept = dict(saved)
        assert store.clients() == sorted(kept)
        assert all(same(store[k], state(kept[k]) if k in kept else INITIAL) for k in range(6))
    assert store.end <= len(kept) + 6 + len(saved), "slots are used again"


def test_a_checkpoint_that_was_not_finished_leaves_the_one_before_valid() -> None:
    store = InFile(INITIAL, "cpu", None)
    store[0] = state(1)
    snapshot = store.snapshot()
    store.release()
    store[0] = state(2)
    store.snapshot()  # and the process dies before it is saved, later rounds having been written
    store[0] = state(3)
    store[0] = state(4)
    assert store.restore(snapshot)
    assert same(store[0], state(1))


def test_what_is_written_while_a_checkpoint_is_saved_is_kept() -> None:
    store = InFile(INITIAL, "cpu", None)
    store[0] = state(1)
    snapshot = store.snapshot()
    store[0] = state(2)
    store.release()
    store[1] = state(3)
    assert same(store[0], state(2)) and same(store[1], state(3))
    assert store.restore(snapshot) and same(store[0], state(1))


def test_a_store_that_returned_to_its_checkpoint_uses_slots_again() -> None:
    store = InFile(INITIAL, "cpu", None)
    store[0] = state(0)
    store.snapshot()
    store.release()
    store[0] = state(1)
    snapshot = store.snapshot()
    store.release()
    end = store.end
    for _ in range(3):  # killed again and again
        assert store.restore(snapshot)
        store[0] = state(2)
    assert store.end == end


def test_states_are_written_whole_by_a_system_that_writes_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, content, where: write(file, content[:5], where))
    store = InFile(INITIAL, "cpu", None)
    for client in (0, 1):
        store[client] = {**INITIAL, "head": {"weight": torch.randn(3, 2), "n": torch.tensor(client)}}
        kept = store[client]
        store[client] = kept
        assert same(store[client], kept) and int(store[client]["head"]["n"]) == client


def test_states_in_memory_do_not_keep_a_whole_stack_alive() -> None:
    store = InMemory({"head": torch.zeros(10)}, "cpu")
    store[0] = {"head": torch.zeros(1000, 10)[3]}
    assert store.states[0]["head"].untyped_storage().nbytes() == 40


def test_a_state_that_was_never_kept_takes_no_space(tmp_path: Path) -> None:
    store = InFile({"head": torch.zeros(1_000_000)}, "cpu", tmp_path / "states")
    store[9_000] = {"head": torch.ones(1_000_000)}
    assert (tmp_path / "states").stat().st_blocks * 512 < 5_000_000
    assert store.nbytes() == 4_000_000 and float(store[8_999]["head"].sum()) == 0


def test_a_shorter_file_of_states_or_one_of_another_layout_is_not_taken_for_a_checkpoints(tmp_path: Path) -> None:
    store = InFile(INITIAL, "cpu", tmp_path / "states")
    store[0], store[1] = state(1), state(2)
    snapshot = store.snapshot()
    assert InFile(INITIAL, "cpu", tmp_path / "states").restore(snapshot)
    assert not InFile({"head": torch.zeros(2)}, "cpu", tmp_path / "states").restore(snapshot)
    assert not InMemory(INITIAL, "cpu").restore(snapshot)
    assert not InFile(INITIAL, "cpu", None).restore(InMemory(INITIAL, "cpu").snapshot())
    (tmp_path / "states").write_bytes((tmp_path / "states").read_bytes()[:-1])
    assert not InFile(INITIAL, "cpu", tmp_path / "states").restore(snapshot)


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = InFile(INITIAL, "cpu", tmp_path / "states")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(StatesUnwritable, match=r"states cannot be written to .*No space left on device; free some"):
        store[0] = state(1)


@pytest.mark.parametrize("algorithm", ["ditto", "scaffold", "fedloge"])
def test_states_in_a_file_change_no_bit_and_survive_a_stop(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = toy.finish(toy.run(ALGORITHMS[algorithm]()))
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("bench.training.rounds.Run._is_due", lambda run: True)
    first = toy.run(ALGORITHMS[algorithm](), checkpoint=tmp_path / "checkpoint.pt")
    assert isinstance(first.store, InFile)
    first.step()
    first.step()
    second = toy.run(ALGORITHMS[algorithm](), checkpoint=tmp_path / "checkpoint.pt")
    assert second.progress.round == 2
    assert toy.finish(second).outcome().digest == plain.outcome().digest
    assert (tmp_path / "checkpoint.states").stat().st_size > 0


def test_a_file_of_states_does_not_grow_with_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("bench.training.rounds.Run._is_due", lambda run: True)
    run = toy.finish(toy.run(ALGORITHMS["fedper"](), checkpoint=tmp_path / "checkpoint.pt"))
    assert isinstance(run.store, InFile) and run.setting.rounds > 2
    assert run.store.end <= 2 * run.population.size, "a slot for the checkpoint, and one for what came after it"


def test_the_store_goes_to_a_file_when_all_states_together_are_large() -> None:
    head = {"head": torch.zeros(2**20)}  # 4 MiB
    assert isinstance(states.store(head, 64, "cpu", None), InMemory)
    assert isinstance(states.store(head, 65, "cpu", None), InFile)
    assert isinstance(states.store({}, 10**6, "cpu", None), Store)


# Evaluation over many clients -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedrep", "fedavg_ft", "fedloge"])
def test_models_tested_a_few_clients_at_a_time_get_the_same_counts(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stepped(algorithm, unseen=2).outcome()
    monkeypatch.setattr("bench.training.evaluation._CLIENTS", 3)
    parts = stepped(algorithm, unseen=2).outcome()
    assert parts.metrics == whole.metrics
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(parts.counts, whole.counts, strict=True))


def test_runs_on_one_split_still_have_cohorts_weights_and_orders_of_their_own() -> None:
    dataset = toy.Toy()
    splits = dataset.load()

    def trained(seed: int, setting: Setting) -> tuple[str, str]:
        split = make_split(splits.labels, dataset.num_classes, setting, seed)
        job = Job(ALGORITHMS["fedavg"](), dataset, splits, split, setting, seed, "serial")
        return split.fingerprint, toy.finish(Run(job)).outcome().digest

    free = replace(toy.SETTING, rounds=1, epochs=1)
    held = [trained(seed, replace(free, split_seed=7)) for seed in (0, 1, 7)]
    assert len({fingerprint for fingerprint, _ in held}) == 1 and len({digest for _, digest in held}) == 3
    assert held[2] == trained(7, free)
    assert trained(0, free)[0] != trained(1, free)[0]


def test_a_sample_of_clients_is_tested_the_same_for_every_algorithm_and_round() -> None:
    def tested(name: str, seed: int) -> tuple[int, ...]:
        setting = replace(toy.SETTING, rounds=2, eval_clients=3)
        run = toy.finish(toy.run(ALGORITHMS[name](), seed=seed, setting=setting))
        chosen = run.population.evaluated(range(run.population.training))
        for tally in run.progress.counts:
            if tally.model == "personal":
                assert set(tally.rows[0].tolist()) == {k for k in chosen if len(run.population.tests[k])}
        return chosen

    samples = [tested("fedavg", seed) for seed in range(3)]
    assert [tested("fedrep", seed) for seed in range(3)] == samples
    assert len(set(samples)) > 1 and {len(sample) for sample in samples} == {3}


def test_testing_more_clients_than_there_are_tests_all() -> None:
    assert stepped("fedavg", eval_clients=99).outcome().metrics == stepped("fedavg").outcome().metrics


# Natural users ----------------------------------------------------------------------------------------------

NATURAL = Setting(
    name="natural", model="mlp", clients=None, rounds=1, epochs=1, batch_size=8, lr=0.1,
    partition="users", alpha=None, imbalance=None, client_test="own",
)  # fmt: skip


def test_users_are_the_clients_with_their_own_test_images() -> None:
    labels = Labels(
        torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([7, 7, 3, 9, 3]), torch.tensor([3, 9, 3])
    )
    split = make_split(labels, 2, NATURAL, 0)
    dealt = {
        (tuple(train.tolist()), tuple(test.tolist())) for train, test in zip(split.clients, split.tests, strict=True)
    }
    assert dealt == {((0, 1), ()), ((2, 4), (0, 2)), ((3,), (1,))}
    assert split.class_counts.tolist() == [2, 3]


def test_own_test_images_must_be_known() -> None:
    labels = Labels(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(PartitionFailed, match="does not say whose test images"):
        make_split(labels, 2, NATURAL, 0)
    with pytest.raises(PartitionFailed, match="say how many clients with --clients"):
        make_split(replace(labels, users=None), 2, NATURAL, 0)


def test_a_natural_tail_keeps_every_image() -> None:
    counts = np.array([9, 5, 1])
    labels = Labels(torch.from_numpy(np.repeat(np.arange(3), counts)), torch.arange(3))
    split = make_split(labels, 3, replace(NATURAL, partition="iid", clients=4, client_test="matched"), 0)
    assert split.class_counts.tolist() == counts.tolist()


def test_images_of_splits_give_their_labels() -> None:
    splits = toy.Toy().load()
    assert isinstance(splits, Splits)
    assert torch.equal(splits.labels.train, splits.train_y) and splits.labels.test_users is None


def test_class_counts_are_kept_where_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    population = stepped("fedavg").population
    counts = [population.class_counts(client) for client in range(8)]
    assert all(population.class_counts(client) is counts[client] for client in range(8))
    assert [each.sum() for each in counts] == list(toy.SIZES)
    monkeypatch.setattr("bench.training.population._KEPT", 8 * 6 - 1)
    population._counts.clear()
    assert population.class_counts(1).equal(counts[1]) and not population._counts
