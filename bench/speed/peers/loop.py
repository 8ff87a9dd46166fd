"""A plain loop as PFLlib and its kin have it: a model, an optimiser and a DataLoader for each client, and a server that
averages parameter by parameter. It is nobody's code, needs no install, and is a peer for everybody.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from bench.speed.peers.work import Line, Work, read


class _Client:
    """One client, with a copy of the model for itself."""

    def __init__(self, work: Work, number: int) -> None:
        self.work = work
        self.model = copy.deepcopy(work.module)
        rows = work.clients[number]
        self.size = len(rows)
        self.data = TensorDataset(work.x[rows], work.y[rows])

    def take(self, model: torch.nn.Module) -> None:
        """Take over what the server sent."""
        self.model.load_state_dict(model.state_dict())

    def train(self) -> None:
        """Train on batches in a new order."""
        if self.size:
            self.work.train(self.model, DataLoader(self.data, self.work.batch, shuffle=True))


def main(folder: Path, threads: int) -> None:
    """Do rounds as long as they may begin."""
    line = Line()
    torch.set_num_threads(threads)
    work = read(folder)
    model = copy.deepcopy(work.module)
    clients = [_Client(work, number) for number in range(len(work.clients))]
    round = 0
    while line.may_begin():
        cohort = work.cohort(round)
        for number in cohort:
            clients[number].take(model)
            clients[number].train()
        total = sum(clients[number].size for number in cohort)
        averaged = copy.deepcopy(model)
        for leaf in averaged.state_dict().values():
            leaf.zero_()
        for number in cohort:
            share = clients[number].size / total
            trained = clients[number].model.state_dict()
            for key, leaf in averaged.state_dict().items():
                leaf += trained[key] * share
        model = averaged
        round += 1
        line.answer(images=work.images(cohort))
    line.answer(accuracy=work.accuracy(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
