"""FedALA. What runs is their `FedALA.train`: server, client, and the module that learns the weights.

Their loaders do not shuffle and leave out a last batch that is not full, so that a client with fewer images than a
batch does not train at all; all other cases have our batches. Weights are learnt on four fifths of the images, drawn in
a row there and each by itself here, and the first time until losses stand still, which here is one pass as ever: with
all images and one pass nothing is left that differs. Clients mix once more before they are tested, as there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from tests.agreement.foreign import opened, options
from tests.agreement.problem import ALL, Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "TsingZ0/FedALA", "a7a9b21"


def _theirs(problem: Problem, folder: Path, share: int = 80, loaders: bool = False, start: bool = True) -> Models:
    """Run their server.

    Args:
        problem: The case.
        folder: Their code.
        share: Of the images on which weights are learnt, in percent.
        loaders: Whether batches are made by their loaders.
        start: Whether weights are learnt longer the first time.
    """
    setting = problem.setting
    given = options({
        "model": problem.network(), "dataset": "digits", "device": "cpu", "num_classes": 10, "layer_idx": 2, "eta": 1.0,
        "batch_size": setting.batch_size, "local_learning_rate": setting.lr, "local_steps": setting.epochs,
        "rand_percent": share, "global_rounds": setting.rounds - 1, "num_clients": len(problem.clients),
        "join_ratio": setting.participation, "random_join_ratio": False, "eval_gap": 1,
    })  # fmt: skip
    with opened(folder / "system", problem.seed) as code:
        modules = [code.module(name) for name in ("flcore.clients.clientALA", "flcore.servers.serverALA")]
        for module in modules:
            module.read_client_data = lambda dataset, client, is_train=True: problem.examples[client]
        modules[0].DataLoader = DataLoader if loaders else problem.loader()
        code.module("utils.ALA").DataLoader = problem.loader("merge 0") if share == 100 else DataLoader
        server: Any = modules[1].FedALA(given, 0)
        for client in server.clients:
            client.ALA.start_phase = start
        server.select_clients = lambda: [server.clients[k] for k in problem.cohort()]
        server.evaluate, server.rs_test_acc = lambda: None, [0.0]
        server.train()
        problem.again()
        server.send_models()
    return Models(None, [tree_of(client.model, problem.initial) for client in server.clients])


CASES = (
    Case("as published", partial(_theirs, loaders=True), ("personal.balanced",), "fedala", setting=ALL),
    Case("our batches", _theirs, ("personal.balanced",), "fedala", setting=ALL),
    Case(
        "our batches; one pass the first time", partial(_theirs, start=False), ("personal.balanced",), "fedala",
        setting=ALL,
    ),
    Case(
        "our batches; weights learnt on all images, in one pass", partial(_theirs, share=100, start=False),
        ("personal.balanced",), "fedala", {"share": 1.0}, ALL,
    ),
)  # fmt: skip
