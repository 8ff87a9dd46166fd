"""FedPAC. What runs is their `train_round_fedpac`: clients, prototypes, weights of heads. It needs cvxpy.

Momentum 0.5 and a decay of 5e-4 stand in their code. `torch.eig`, which torch has no more, is that of symmetric
matrices. All clients take part, as a class that a round's clients lack ends their program; they are eight, as their
matrices take long. Weights of heads below 1e-3 are set to zero there.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "JianXu95/FedPAC", "5770f4f"


def _eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def _theirs(problem: Problem, folder: Path) -> Models:
    setting = problem.setting
    given = options({
        "num_classes": 10, "device": "cpu", "lr": setting.lr, "lam": 1.0, "num_users": len(problem.clients),
        "frac": setting.participation, "epochs": setting.rounds, "local_epoch": setting.epochs, "agg_g": 1,
    })  # fmt: skip
    network: Any = problem.network(says=lambda z, y: (z, y))
    network.classifier_weight_keys = ["head.weight", "head.bias"]
    loader = problem.loader(None, None, " 0", *(f" {epoch}" for epoch in range(setting.epochs)))
    with (
        opened(folder, problem.seed, ("numpy.core.shape_base",)) as code,
        patch.object(torch, "eig", _eig, create=True),
    ):
        running = code.module("running")
        client = code.module("methods").local_update("FedPAC")
        client.local_test = lambda *_: (0.0, 0.0)
        clients = [client(k, given, loader(problem.examples[k]), None, copy.deepcopy(network)) for k in problem.clients]
        with patch("numpy.random.choice", problem.drawn):
            for round in range(setting.rounds):
                running.train_round_fedpac(given, network, clients, round)
    return Models(None, [tree_of(client.local_model, problem.initial) for client in clients])


SETTING = {"momentum": 0.5, "weight_decay": 5e-4, "participation": 1.0, "clients": 8}
CASES = (Case("as published", _theirs, ("personal.balanced",), "fedpac", setting=SETTING),)
