"""The clients of a run: whose data is whose, who takes part in a round, and what each keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bench import keys, tree
from bench.data import Images
from bench.dataset import Dataset, Splits
from bench.engine import Visit
from bench.settings import Setting
from bench.split import Split
from bench.tree import Tree


class Population:
    """Clients with resident data.

    Args:
        dataset: Gives normalisation and the number of classes.
        splits: Official images and labels.
        split: Which images are whose.
        setting: Augmentation, participation, held-out clients.
        seed: Of the run. Cohorts and data order are functions of it, never of the algorithm.
        device: Where images live.
    """

    def __init__(
        self, dataset: Dataset, splits: Splits, split: Split, setting: Setting, seed: int, device: str
    ) -> None:
        self.key = keys.key(seed)
        self._keys = -1, self.key
        self.device = device
        self.size, self.training = setting.clients, setting.training_clients
        self.cohort_size = setting.cohort_size
        used = torch.cat(split.clients).unique()  # only the long-tailed subset is kept in memory
        place = torch.full((len(splits.train_y),), -1, dtype=torch.int64)
        place[used] = torch.arange(len(used))
        look = dataset.mean, dataset.std
        self.images = Images(
            splits.train_x[used].to(device),
            splits.train_y[used].to(device),
            *look,
            setting.augment,
            dataset.scale,
        )
        self.test = Images(splits.test_x.to(device), splits.test_y.to(device), *look, "none", dataset.scale)
        self.index = [place[rows].to(device) for rows in split.clients]
        self.tests = [rows.to(device) for rows in split.tests]
        self.counts = torch.stack(
            [torch.bincount(self.images.y[rows], minlength=dataset.num_classes) for rows in self.index]
        )

    def cohort(self, round: int) -> tuple[int, ...]:
        """Draw the training clients of a round, uniformly without replacement, ascending."""
        if self.cohort_size == self.training:
            return tuple(range(self.training))
        return tuple(keys.choice(keys.fold(self.key, "cohort", round), self.training, self.cohort_size).tolist())

    def visit(self, client: int, round: int, private: Tree, own: Tree | None = None) -> Visit:
        """Make what a client brings to a verb in a round."""
        if self._keys[0] != round:  # those of a round are drawn together
            clients = torch.arange(self.size, device=self.device)
            self._keys = round, keys.fold(self.key.to(self.device), f"round {round}", clients)
        return Visit(private, self.index[client], self._keys[1][client], self.counts[client], own)

    def pooled_visit(self, round: int, private: Tree) -> Visit:
        """Make the visit of one pseudo-client that holds the union of all training data.

        In a round it is given as many examples as the round's cohort has, the next ones of a stream that
        reshuffles the union whenever it is through: sample visits equal those of a federated run.
        """
        union = torch.cat(self.index[: self.training])
        sizes = [sum(len(self.index[k]) for k in self.cohort(r)) for r in range(round + 1)]
        start, stop = sum(sizes[:-1]), sum(sizes)
        counts = self.counts[: self.training].sum(0)
        if stop - start == len(union):  # all take part: one client that holds everything, to the bit
            return replace(self.visit(0, round, private), index=union, class_counts=counts)
        passes = range(start // len(union), -(-stop // len(union)))
        stream = torch.cat(
            [union[keys.permutation(keys.fold(self.key, "pooled", p), len(union)).to(self.device)] for p in passes]
        )
        offset = start - passes.start * len(union)
        index = stream[offset : offset + stop - start]
        return Visit(private, index, keys.fold(self.key, "pooled round", round).to(self.device), counts)

    def sizes(self, clients: Iterable[int]) -> Tensor:
        """Give the training examples of clients: (K,) float64."""
        return torch.tensor([len(self.index[k]) for k in clients], dtype=torch.float64, device=self.device)


class Store:
    """Private states by client, in host memory, made when a client first takes part.

    Args:
        initial: The state of a client that never took part; shared by all of them.
        device: Where states are used.
    """

    def __init__(self, initial: Tree, device: str) -> None:
        self.initial, self.device = initial, device
        self.states: dict[int, Tree] = {}

    def __getitem__(self, client: int) -> Tree:
        return tree.to(self.states.get(client, self.initial), self.device)

    def __setitem__(self, client: int, state: Tree) -> None:
        self.states[client] = tree.map(_keep, state)

    def all(self) -> list[Tree]:
        """Give the states of the clients that took part, by client."""
        return [self.states[client] for client in sorted(self.states)]

    def nbytes(self) -> int:
        """Count the bytes kept for all clients together."""
        return sum(tree.nbytes(state) for state in self.states.values())


def _keep(leaf: Tensor) -> Tensor:
    """Bring a leaf to host memory of its own; a slice of a stack would keep the whole stack alive."""
    leaf = leaf.detach()
    alone = leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    return leaf.to("cpu", copy=not alone)
