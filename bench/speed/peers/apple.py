"""Apple's pfl: `pip install pfl`. Its federated averaging on its simulated backend, in one process."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from bench.speed.module import Module
from bench.speed.peers.work import Line, Work, read

_ENDLESS = 1_000_000


class _Network(Module):
    """The network, with what pfl asks of one."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Give what is minimised."""
        self.train()
        return F.cross_entropy(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Measure nothing."""
        return {}


class _Turns(TrainingProcessCallback):  # type: ignore[misc]  # pfl need not be installed
    """Tells of each round, and waits until the next may begin."""

    def __init__(self, work: Work, line: Line) -> None:
        self.work, self.line = work, line

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Answer, and say whether this was the last."""
        self.line.answer(images=self.work.images(self.work.cohort(central_iteration)))
        return not self.line.may_begin(), Metrics()


def main(folder: Path, threads: int) -> None:
    """Do rounds as long as they may begin."""
    line = Line()
    torch.set_num_threads(threads)
    work = read(folder)
    network = _Network(work.module.model, work.module.params)
    users = _in_cohorts(work)

    def dataset(user: int) -> PyTorchTensorDataset:
        rows = work.clients[user]
        rows = rows[torch.randperm(len(rows))]
        return PyTorchTensorDataset((work.x[rows], work.y[rows]), user_id=str(user))

    data = FederatedDataset(dataset, lambda: next(users))
    size = len(work.cohort(0))
    model = PyTorchModel(
        network,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=work.momentum),
        torch.optim.SGD(network.parameters(), lr=1.0),
    )
    if line.may_begin():
        FederatedAveraging().run(
            NNAlgorithmParams(
                central_num_iterations=_ENDLESS,
                evaluation_frequency=_ENDLESS,
                train_cohort_size=size,
                val_cohort_size=0,
            ),
            SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
            model,
            NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=work.epochs, local_learning_rate=work.lr),
            None,
            [_Turns(work, line)],
        )
    line.answer(accuracy=work.accuracy(network))


def _in_cohorts(work: Work) -> Iterator[int]:
    """Give the users of one round after the other."""
    for round in itertools.count():
        yield from work.cohort(round)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
