"""FedRep. What runs is their `main_fedrep.py` with its client and its sums of models, up to the extra round at its end.

Momentum 0.5 and a decay of 1e-4 of weights, not biases, stand in their code; clients weigh alike, as there for images.
Their tests, a file that Python 3 cannot read, are left out.

*Heads of newcomers.* Heads of clients that were never drawn are the very tensors of the server's model there, into
which the mean of all uploads is written: a client starts not from the initial head but from the mean of the others'
heads. Where a model's state is a copy, as is one's intention, it starts from the initial one.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Finished, Models, Network, Problem, tree_of

REPOSITORY, COMMIT = "lgcollins/FedRep", "d82e629"
HEAD_EPOCHS = 5


class _Copying(Network):
    """A network whose state is a copy."""

    def state_dict(self, *positional: Any, **named: Any) -> Any:
        return {name: leaf.clone() for name, leaf in super().state_dict(*positional, **named).items()}


def _theirs(problem: Problem, folder: Path, copies: bool = False) -> Models:
    setting, known = problem.setting, dict[int, Any]()
    network: Any = problem.network()
    network.__class__ = _Copying if copies else Network
    network.weight_keys = [["base.1.weight", "base.1.bias"], [], [], ["head.weight", "head.bias"]]
    users = {k: problem.rows[k] for k in problem.clients}
    given = options({
        "alg": "fedrep", "dataset": "mnist", "num_users": len(users), "frac": setting.participation, "gpu": -1,
        "epochs": setting.rounds, "local_ep": HEAD_EPOCHS + setting.epochs, "local_rep_ep": setting.epochs,
        "local_bs": setting.batch_size, "lr": setting.lr, "m_tr": None, "m_ft": None, "load_fed": "n", "test_freq": 1,
        "save_every": 10**9, "local_updates": 10**9,
    })  # fmt: skip

    def tested(net: Any, *_: Any, w_locals: dict[int, Any], **__: Any) -> tuple[float, float]:
        """Take the body and all heads, where they are tested."""
        known.update({k: {**net.state_dict(), **_head(own)} for k, own in w_locals.items()})
        return 0.0, 0.0

    tests = SimpleNamespace(test_img_local=None, test_img_local_all=tested)
    with opened(folder, problem.seed, replaced={"models.test": tests}) as code:
        code.module("utils.options").args_parser = lambda: given
        prepared = code.module("utils.train_utils")
        prepared.get_data = lambda _: (problem.everything, None, users, None)
        prepared.get_model = lambda _: network
        update = code.module("models.Update")
        update.DataLoader = problem.loader(
            *(f" {epoch}" for epoch in range(HEAD_EPOCHS)), *(f" {epoch}" for epoch in range(setting.epochs))
        )
        drawing, ordering = patch("numpy.random.choice", problem.drawn), patch("numpy.random.shuffle")
        with drawing, ordering, contextlib.suppress(Finished):
            code.script("main_fedrep.py")
        return Models(None, [tree_of(known[k], problem.initial) for k in problem.clients])


def _head(state: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf.clone() for name, leaf in state.items() if name.startswith("head")}


SETTING = {"momentum": 0.5, "weight_decay": 1e-4, "decayed": "weights", "client_weights": "uniform", "epochs": 1}
FIELDS = {"head_epochs": HEAD_EPOCHS}
METRICS = ("personal.balanced",)
CASES = (
    Case("as published, 40 % of the clients", _theirs, METRICS, "fedrep", FIELDS, SETTING),
    Case("initial heads, 40 % of the clients", partial(_theirs, copies=True), METRICS, "fedrep", FIELDS, SETTING),
    Case(
        "as published, all clients", _theirs, METRICS, "fedrep", FIELDS, {**SETTING, "participation": 1.0, "rounds": 12}
    ),
)
