"""MOON. What runs is their `main.py`: the client's training, the pool of last models, the mean by sizes.

Their network without the projection is asked for, so that features are those that the head reads; momentum 0.9 stands
in their code. Every party starts there from random weights of its own, which is what a client contrasts with if it is
first drawn after the first round; here all start alike, and one without a last model has no contrast. With all clients
in each round nothing is left that differs. Tests go nowhere.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "QinbinLi/MOON", "8fcba3c"


def _theirs(problem: Problem, folder: Path, alg: str = "moon", newcomers: bool = True) -> Models:
    """Run their script.

    Args:
        problem: The case.
        folder: Their code.
        alg: Of their program.
        newcomers: Whether a client without a last model has a contrast to the initial one.
    """
    setting, met = problem.setting, set[int]()
    cohorts = [list(problem.population.cohort(round)) for round in range(setting.rounds)]
    parties: dict[int, Any] = {k: problem.rows[k] for k in problem.clients}
    visits = {k: iter([round for round, cohort in enumerate(cohorts) if k in cohort]) for k in problem.clients}
    labels = [int(y) for _, y in problem.everything]
    whole = [(problem.examples[0].x, problem.examples[0].y)]

    def accuracy(*_: Any, get_confusion_matrix: bool = False, **__: Any) -> tuple[Any, ...]:
        return (0.0, None, 0.0) if get_confusion_matrix else (0.0, 0.0)

    def loaders(dataset: str, folder: str, size: int, tested: int, rows: Any = None) -> tuple[Any, Any, Any, Any]:
        """Give our batches of a client in its next round; of all images there is only something to count."""
        if rows is None:
            return whole, whole, problem.everything, problem.everything
        client = next(k for k in problem.clients if parties[k] is rows)
        problem.round = next(visits[client])
        script: Any = sys.modules["__main__"]
        if not newcomers and client not in met and problem.round:  # to the received one: that is none
            script.old_nets_pool[0][client].load_state_dict(script.global_model.state_dict())
        met.add(client)
        problem.again()
        return problem.loader()(problem.examples[client]), whole, None, None

    given = options({
        "alg": alg, "model": "mlp", "dataset": "cifar10", "net_config": None, "partition": "", "batch_size": 0,
        "lr": setting.lr, "epochs": setting.epochs, "n_parties": len(parties), "comm_round": setting.rounds,
        "init_seed": problem.seed, "datadir": "", "reg": setting.weight_decay, "logdir": "logs/", "modeldir": "models/",
        "beta": 0.0, "device": "cpu", "log_file_name": "log", "optimizer": "sgd", "mu": 1.0, "out_dim": 256,
        "temperature": 0.5, "model_buffer_size": 1, "pool_option": "FIFO", "sample_fraction": setting.participation,
        "load_model_file": None, "load_pool_file": None, "load_first_net": 1, "normal_model": 0, "save_model": 0,
        "use_project_head": 0, "server_momentum": 0,
    })  # fmt: skip
    with opened(folder, problem.seed) as code:
        utils = code.module("utils")
        utils.get_dataloader, utils.compute_accuracy = loaders, accuracy
        utils.partition_data = lambda *_, **__: (None, labels, None, None, parties, None)
        utils.ModelFedCon_noheader = lambda *_: problem.network(says=lambda z, y: (z, z, y))
        parsing = patch("argparse.ArgumentParser.parse_args", lambda _: given)
        with parsing, patch("random.sample", lambda *_: cohorts.pop(0)):
            ended = code.script("main.py")
    return Models(tree_of(ended["global_model"], problem.initial))


SETTING = {"momentum": 0.9, "weight_decay": 1e-5, "lr": 0.01}
CASES = (
    Case("as published, 40 % of the clients", _theirs, ("generic",), "moon", setting=SETTING),
    Case(
        "newcomers without a contrast, 40 %", partial(_theirs, newcomers=False), ("generic",), "moon", setting=SETTING
    ),
    Case(
        "as published, all clients",
        _theirs,
        ("generic",),
        "moon",
        setting={**SETTING, "participation": 1.0, "rounds": 12},
    ),
    Case("their FedAvg", partial(_theirs, alg="fedavg"), ("generic",), "fedavg", setting=SETTING),
)
