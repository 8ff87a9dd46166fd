"""FedBABU. What runs is their `main_fed.py` with its client and its mean of bodies, then their client's training of the
whole model, five epochs of it, as their notebook tunes models before it tests them.

Clients weigh alike, and the learning rate falls to a tenth after a half and three quarters of the rounds, as there.
Tuned is the last body, not the one that is best on test images; and at the rate of the start, not at a hundredth of it,
as in the notebook.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "jhoon-oh/FedBABU", "e34c15b"
TUNING = ("adapt 0 0", *(f"adapt 1 {epoch}" for epoch in range(4)))
"""Batches of five epochs of tuning here: a model is looked at after the first."""


def _theirs(problem: Problem, folder: Path) -> Models:
    setting = problem.setting
    users = {k: problem.rows[k] for k in problem.clients}
    given = options({
        "seed": problem.seed, "gpu": -1, "local_upt_part": "body", "aggr_part": "body", "unbalanced": False,
        "dataset": "digits", "model": "mlp", "iid": False, "num_users": len(users), "frac": setting.participation,
        "local_ep": setting.epochs, "momentum": setting.momentum, "wd": setting.weight_decay, "shard_per_user": 0,
        "server_data_ratio": 0.0, "results_save": "run", "epochs": setting.rounds, "lr": setting.lr,
        "local_bs": setting.batch_size, "test_freq": 10**9, "device": "cpu",
    })  # fmt: skip
    with opened(folder, problem.seed) as code:
        code.module("utils.options").args_parser = lambda: given
        prepared = code.module("utils.train_utils")
        prepared.get_data = lambda _: (problem.everything, problem.everything, users, {})
        prepared.get_model = lambda _: problem.network("linear")
        update = code.module("models.Update")
        update.DataLoader = problem.loader()
        with patch("numpy.random.choice", problem.drawn):
            trained: Any = code.script("main_fed.py")["net_local_list"]
        update.DataLoader = problem.loader(*TUNING)
        tuned = []
        for k in problem.clients:
            local = update.LocalUpdate(given, problem.everything, users[k])
            rate = {"body_lr": setting.lr, "head_lr": setting.lr}
            state, _ = local.train(copy.deepcopy(trained[k]), **rate, local_eps=len(TUNING))
            tuned.append(tree_of(state, problem.initial))
    return Models(tree_of(trained[0], problem.initial), tuned)


SETTING = {"momentum": 0.5, "client_weights": "uniform", "lr_steps": ((0.5, 0.1), (0.75, 0.1))}
CASES = (Case("as published", _theirs, ("personal.balanced", "generic"), "fedbabu", setting=SETTING),)
