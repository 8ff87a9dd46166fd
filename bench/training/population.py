"""The clients of a run: whose data is whose, who takes part in a round, and who is tested."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from bench import keys, tree
from bench.data import Images, LocalData
from bench.dataset import Dataset, Splits
from bench.protocol.settings import Setting
from bench.splits.auxiliary import Reserve
from bench.splits.open_set import Episode, episode, known_rows
from bench.splits.split import Split
from bench.training.visit import Visit
from bench.tree import Tree

RESIDENT = 2**26
"""Bytes of a part's examples in a file up to which they are read into memory at once: a long tail of features is.
"""

_KEPT = 2**22
"""Most class counts, of all clients together, that are kept: 32 MB."""


def draw_cohort(setting: Setting, clients: int, key: Tensor, round: int) -> tuple[int, ...]:
    """Draw the training clients of a round, ascending: uniformly without replacement, or each by itself.

    Args:
        setting: How many, and how.
        clients: All clients.
        key: () int64, of the run's seed.
        round: Which.
    """
    training, size = setting.training_clients(clients), setting.cohort_size(clients)
    if setting.sampling == "independent":
        draws = keys.uniform(keys.fold(key, "cohort", round), training)
        return tuple(torch.nonzero(draws < setting.participation).flatten().tolist())
    if size == training:
        return tuple(range(training))
    return tuple(keys.choice(keys.fold(key, "cohort", round), training, size).tolist())


def draw_attacked(setting: Setting, images: int, key: Tensor) -> Tensor:
    """Draw the test images that are attacked: (n,) int64, ascending; the first of an order that is the key's alone.

    Args:
        setting: How many at most.
        images: Of the official test part.
        key: () int64, of the run's seed.
    """
    return keys.permutation(keys.fold(key, "attacked"), images)[: setting.attack_images].sort().values


def rests_on(
    images: Mapping[int, int], classes: Mapping[int, int], drawn: Set[int]
) -> dict[str, int | list[int] | None]:
    """Say on what personal metrics rest: see `bench.training.outcome.Outcome`.

    Args:
        images: Test images of each client whose models are tested.
        classes: Of their training images.
        drawn: Clients that were in the cohort of any round.
    """
    tested = [k for k, number in images.items() if number]
    took_part = len(set(tested) & drawn)
    return {
        "clients": len(tested),
        "images": [min(images[k] for k in tested), max(images[k] for k in tested)] if tested else None,
        "worst_decile": math.ceil(len(tested) / 10),
        "one_class": sum(classes[k] == 1 for k in tested),
        "drawn": took_part,
        "never": len(tested) - took_part,
    }


class Population:
    """Clients and their images.

    Args:
        dataset: Gives normalisation and the number of classes.
        splits: Official images and labels.
        split: Which images are whose.
        setting: Augmentation, participation, held-out clients.
        seed: Of the run. Cohorts and data order are functions of it, never of the algorithm.
        device: Where batches are made, and where images live that are in memory.
        teacher: (N, d) float32, what a teacher makes of the official training part; None: there is none.
        official: (n,) int64, the test images that generic models are tested on; None: all of known classes.
    """

    def __init__(
        self,
        dataset: Dataset,
        splits: Splits,
        split: Split,
        setting: Setting,
        seed: int,
        device: str,
        teacher: Tensor | None = None,
        official: Tensor | None = None,
    ) -> None:
        self.key = keys.key(seed)
        self._keys = -1, self.key
        self._drawn = 0, Counter[int]()
        self._cohort: tuple[int, tuple[int, ...]] = -1, ()
        self.device = device
        self.num_classes = dataset.num_classes
        self.size = len(split.clients)
        self.training = setting.training_clients(self.size)
        self.setting = setting
        used = torch.cat(split.clients).unique()  # only the long-tailed subset is kept in memory
        place = torch.full((len(splits.train_y),), -1, dtype=torch.int64)
        place[used] = torch.arange(len(used))
        rows = used if splits.held is None else torch.searchsorted(splits.held, used)
        y, look = splits.train_y[used].to(device), (dataset.mean, dataset.std)
        taught = None if teacher is None else tree.bring(teacher[used], device)
        flips = first_mirrored(setting.augment, self.key, used, device)
        everything = Images(splits.train_x, y, *look, setting.augment, dataset.scale, rows, taught, flips)
        self.images = everything.resident(RESIDENT)
        self.test = Images(splits.test_x, splits.test_y.to(device), *look, "none", dataset.scale).resident(RESIDENT)
        known = known_rows(splits.test_y, split.open) if official is None else official
        self.official = tree.bring(known, device)
        self.open = tree.bring(torch.nonzero(torch.isin(splits.test_y, split.open)).flatten(), device)
        """(m,) int64, test images of classes that are withheld from all clients."""
        self.index = [tree.bring(place[rows], device) for rows in split.clients]
        self.tests = [tree.bring(rows, device) for rows in split.tests]
        self.attacked: list[Tensor] = []
        """Where tests are attacked: (n,) int64 of each client, its test images that are; the generic model's are last.
        """
        if setting.attack != "none":
            chosen = draw_attacked(setting, len(self.test), self.key)
            of_clients = [rows[torch.isin(rows, chosen)] for rows in split.tests]
            self.attacked = [tree.bring(rows, device) for rows in (*of_clients, chosen)]
        self._counts: dict[int, Tensor] = {}
        self._client_keys = keys.fold(self.key.to(device), "client", torch.arange(self.size, device=device))

    def cohort(self, round: int) -> tuple[int, ...]:
        """Draw the training clients of a round, ascending."""
        if self._cohort[0] != round:  # several ask in a round
            self._cohort = round, draw_cohort(self.setting, self.size, self.key, round)
        return self._cohort[1]

    def arrives(self, client: int, round: int) -> bool:
        """Draw whether what a client sends in a round reaches the server."""
        lost = self.setting.lost
        return not lost or float(keys.uniform(keys.fold(self.key, "lost", round, client), 1)) >= lost

    def prefetch(self, *rounds: int) -> None:
        """Have the images of rounds' cohorts read ahead, where they are in a file."""
        if self.images.streamed is None:
            return
        clients = [client for round in rounds for client in self.cohort(round)]
        if clients:
            self.images.prefetch(torch.cat([self.index[client] for client in clients]))

    def evaluated(self, clients: range) -> tuple[int, ...]:
        """Choose whose personal models are tested: all of these, or a sample that the seed alone decides."""
        if self.setting.eval_clients is None or self.setting.eval_clients >= len(clients):
            return tuple(clients)
        chosen = keys.choice(keys.fold(self.key, "evaluated"), len(clients), self.setting.eval_clients)
        return tuple(clients[k] for k in chosen.tolist())

    def _times(self, rounds: int) -> Counter[int]:
        """Count how often each client was in the cohorts of the first rounds: the same for every algorithm."""
        known, times = self._drawn if self._drawn[0] <= rounds else (0, Counter[int]())
        for round in range(known, rounds):
            times.update(self.cohort(round))
        self._drawn = rounds, times
        return times

    def drawn_by(self, rounds: int) -> Set[int]:
        """Give the clients that were in the cohort of any of the first rounds."""
        return frozenset(self._times(rounds))

    def _passes(self, client: int, rounds: int, more: int) -> Tensor | None:
        """Say how often a client has gone over its examples in the first rounds and some more, by cohorts and epochs of
        the setting: (n,) int64; None where no image's orientation hangs on that.
        """
        if not self.images.alternates:
            return None
        passes = torch.tensor(self.setting.epochs * (self._times(rounds)[client] + more))
        return tree.bring(passes, self.device).expand(len(self.index[client]))

    def tested(self, clients: Sequence[int], rounds: int) -> dict[str, int | list[int] | None]:
        """Say on what the personal metrics after some rounds rest: see `bench.training.outcome.Outcome`.

        Args:
            clients: Whose models are tested.
            rounds: That are completed.
        """
        images = {k: len(self.tests[k]) for k in clients}
        held = [(self.class_counts(k) > 0).sum() for k in clients]
        classes = dict(zip(clients, torch.stack(held).tolist() if held else [], strict=True))
        return rests_on(images, classes, self.drawn_by(rounds))

    def episode(self, client: int) -> Episode | None:
        """Choose what a client is asked in an open-set test; None: it has too few images for one."""
        train, test = self.images.y[self.index[client]], self.test.y[self.tests[client]]
        return episode(self.setting, self.key, client, train.cpu(), test.cpu(), len(self.open))

    def class_counts(self, client: int) -> Tensor:
        """Count a client's training images of each class: (C,) int64."""
        if client in self._counts:
            return self._counts[client]
        counts = self._counted(self.images.y[self.index[client]])
        if self.size * self.num_classes <= _KEPT:
            self._counts[client] = counts
        return counts

    def _counted(self, y: Tensor) -> Tensor:
        """Count labels, (n,), without asking for the largest one: (C,) int64."""
        return y.new_zeros(self.num_classes).scatter_add_(0, y, torch.ones_like(y))

    def visit(
        self, client: int, round: int, private: Tree, sent: Tree | None = None, *, trained: bool = False
    ) -> Visit:
        """Make what a client brings to a verb in a round; `trained`: when all training of the round is done."""
        if self._keys[0] != round:  # those of a round are drawn together
            clients = torch.arange(self.size, device=self.device)
            self._keys = round, keys.fold(tree.bring(self.key, self.device), f"round {round}", clients)
        key, client_key = self._keys[1][client], self._client_keys[client]
        visited = trained and self.setting.final_visit and round + 1 == self.setting.rounds and client < self.training
        passes = self._passes(client, round + trained, int(visited))
        return Visit(private, self.index[client], key, client_key, self.class_counts(client), sent or {}, passes)

    def pooled_visit(self, round: int, private: Tree) -> Visit:
        """Make the visit of one pseudo-client that holds the union of all training data.

        In a round it is given as many examples as the round's cohort has, the next ones of a stream that
        reshuffles the union whenever it is through: sample visits equal those of a federated run.
        """
        union = torch.cat(self.index[: self.training])
        sizes = [sum(len(self.index[k]) for k in self.cohort(r)) for r in range(round + 1)]
        start, stop = sum(sizes[:-1]), sum(sizes)
        counts = self._counted(self.images.y[union])
        seen = torch.arange(start, stop, device=self.device) // max(len(union), 1)
        before = self.setting.epochs * seen if self.images.alternates else None
        if stop - start == len(union):  # all take part: one client that holds everything, to the bit
            return replace(self.visit(0, round, private), index=union, class_counts=counts, passes=before)
        passes = range(start // len(union), -(-stop // len(union)))
        here = tree.bring(self.key, self.device)
        stream = torch.cat([union[keys.permutation(keys.fold(here, "pooled", p), len(union))] for p in passes])
        offset = start - passes.start * len(union)
        index = stream[offset : offset + stop - start]
        key = keys.fold(here, "pooled round", round)
        return Visit(private, index, key, self._client_keys[0], counts, passes=before)

    def sizes(self, clients: Iterable[int]) -> Tensor:
        """Give the training examples of clients: (K,) float64; -1 stands for the union of all."""
        counts = [len(self.index[k]) if k >= 0 else sum(map(len, self.index[: self.training])) for k in clients]
        return tree.bring(torch.tensor(counts, dtype=tree.counting(self.device)), self.device)


def first_mirrored(augment: str, key: Tensor, rows: Tensor, device: str) -> Tensor | None:
    """Draw which images are mirrored in the first pass over them, by their rows in the dataset and not by whose they
    are: (N,) bool on the device; None where orientations do not alternate.
    """
    if augment != "altflip":
        return None
    return tree.bring((keys.fold(key.to(rows.device), "flip", rows) & 1).bool(), device)


def at_the_server(
    reserve: Reserve, needs: Set[str], dataset: Dataset, setting: Setting, key: Tensor, device: str
) -> tuple[LocalData | None, LocalData | None]:
    """Make of images at the server what a verb is given: auxiliary ones, and public ones without labels.

    Args:
        reserve: The images.
        needs: Of the algorithm; what it does not need is None.
        dataset: Of the run: they are normalised as its own.
        setting: Augmentation and batch size.
        key: () int64, of the run.
        device: Where batches are made.
    """

    def data(purpose: str, rows: Tensor, y: Tensor) -> LocalData:
        look = dataset.mean, dataset.std, setting.augment, dataset.scale
        flips = first_mirrored(setting.augment, key, rows, device)
        return LocalData(
            images=Images(reserve.x, y.to(device), *look, rows, mirrored=flips),
            index=torch.arange(len(rows), device=device),
            n=torch.tensor(len(rows), device=device),
            key=keys.fold(key, purpose),
            class_counts=torch.bincount(y, minlength=dataset.num_classes).to(device),
            batch_size=setting.batch_size,
            client_key=keys.fold(key, purpose),
            passes=None if flips is None else torch.zeros_like(rows, device=device),
        )

    return (
        data("auxiliary", reserve.labelled, reserve.y) if "auxiliary" in needs else None,
        data("public", reserve.public, torch.zeros_like(reserve.public)).unlabelled() if "public" in needs else None,
    )
