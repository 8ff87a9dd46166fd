"""FedLoGe. What runs is their `fedloge.py` with its client and its means, then their realignment for the test: norms of
the personal head's rows (`update_weights_norm_init`), the generic head's rows of norm 1.7 (`globaltest_calibra`).

The personal model is the sum that their test has, rule P1 here; classes are left out by training labels on both sides,
where they take the client's test labels. Their frame has a bias of random numbers that nobody trains, and each personal
head a start of its own; heads start alike in all cases. Tests during training go nowhere.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench import Tree, tree
from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, linear, tree_of

REPOSITORY, COMMIT = "ZackZikaiXiao/FedLoGe", "f4cac52"


def _theirs(problem: Problem, folder: Path, ours: bool = False) -> Models:
    """Run their script.

    Args:
        problem: The case.
        folder: Their code.
        ours: Whether the frame that teaches the body is ours, without a bias.
    """
    setting, started = problem.setting, set[int]()
    users = {k: problem.rows[k] for k in problem.clients}
    given = options({
        "seed": problem.seed, "dataset": "digits", "model": "mlp", "frac": setting.participation, "iid": False, "IF": 0,
        "num_users": len(users), "rounds": setting.rounds, "local_ep": setting.epochs, "num_classes": 10, "beta": 0,
        "local_bs": setting.batch_size, "lr": setting.lr, "momentum": setting.momentum, "balanced_global": False,
        "device": "cpu", "non_iid_prob_class": 0, "alpha_dirichlet": 0, "loss_type": "CE",
    })  # fmt: skip
    counts = problem.counts.sum(0).numpy()
    images = SimpleNamespace(
        get_args=lambda: given, training_set_distribution=problem.counts.numpy(), global_test_distribution=counts,
        get_imbalanced_dataset=lambda _: (problem.everything, problem.everything, users, users),
    )  # fmt: skip
    shots = {"head": [0, True], "middle": [0, True], "tail": [0, True]}
    head, frame = linear(problem.initial["head"]), linear(problem.run.progress.server["etf"])
    replaced = {"util.dataset": SimpleNamespace(myDataset=lambda _: images)}
    with opened(folder, problem.seed, replaced=replaced) as code:
        for parser in ("args_parser", "args_parser_cifar10"):
            setattr(code.module("options"), parser, lambda: given)
        code.module("model.build_model").build_model = lambda _: problem.network("linear")
        update = code.module("util.update_baseline")
        realigned = update.globaltest_calibra
        update.globaltest = update.globaltest_calibra = lambda *_, **__: (0.0, dict.fromkeys(shots, 0.0))
        update.localtest = lambda *_, **__: (0.0, 0.0, 0.0, shots)
        update.DataLoader = lambda data, **named: problem.loader()(data) if "shuffle" in named else None
        train = update.LocalUpdate.update_weights_gaux

        def alike(local: Any, net: Any, g_head: Any, g_aux: Any, l_head: Any, **named: Any) -> Any:
            """Train a client from heads that start as ours."""
            if problem.round == 0:
                g_aux.load_state_dict(head.state_dict())
            if (client := local.ldr_train.client) not in started:
                l_head.load_state_dict(head.state_dict())
                started.add(client)
            return train(local, net, frame if ours else g_head, g_aux, l_head, **named)

        update.LocalUpdate.update_weights_gaux = alike
        if ours:
            code.module("util.etf_methods").ETF_Classifier.gen_sparse_ETF = lambda *_, **__: frame.weight.detach().T
        with patch("numpy.random.choice", problem.drawn):
            ended = code.script("fedloge.py")
        for k in set(problem.clients) - started:
            ended["l_heads"][k].load_state_dict(head.state_dict())
        personal = [
            update.LocalUpdate(given, problem.everything, users[k]).update_weights_norm_init(
                problem.network("linear"), copy.deepcopy(ended["g_aux"]), None, ended["l_heads"][k], 0, None, 0
            )[1:3]
            for k in problem.clients
        ]
        generic = copy.deepcopy(ended["g_aux"])
        realigned(ended["model"], generic, problem.everything, given, images)
    body = tree_of(ended["model"], problem.initial)["body"]
    sums = [tree.add(_head(shared), _head(own)) for shared, own in personal]
    return Models({"body": body, "head": _head(generic)}, [{"body": body, "head": each} for each in sums])


def _head(layer: torch.nn.Linear) -> Tree:
    return {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}


SETTING = {"momentum": 0.5}
METRICS = ("generic", "personal.masked")
CASES = (
    Case("as published", _theirs, METRICS, "fedloge", {"personal_rule": "P1", "etf_bias": "frozen_random"}, SETTING),
    Case("our frame", partial(_theirs, ours=True), METRICS, "fedloge", {"personal_rule": "P1"}, SETTING),
)
