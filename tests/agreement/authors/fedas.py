"""FedAS. What runs is their `FedAS.train`: server, client, alignment, Fisher weights.

Their loaders do not shuffle and leave out a last batch that is not full; batches are ours in all cases.

*Two traps.* A client aligns the server's model itself, not a copy, so that the next one is given what it left. And a
client is aligned the first time too, with what the initial model makes of its images.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from tests.agreement.foreign import opened, options
from tests.agreement.problem import ALL, Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "xiyuanyang45/FedAS", "1a4f5fd"
OFF = ("privacy", "learning_rate_decay", "wo_local", "wo_global", "random_join_ratio", "auto_break", "dlg_eval",
       "time_select")  # fmt: skip
ZERO = ("dp_sigma", "client_drop_rate", "train_slow_rate", "send_slow_rate", "num_new_clients", "fine_tuning_epoch",
        "yxy_hyper", "dlg_gap", "batch_num_per_client")  # fmt: skip


def _theirs(problem: Problem, folder: Path, copies: bool = False, first: bool = True) -> Models:
    """Run their server.

    Args:
        problem: The case.
        folder: Their code.
        copies: Whether each client aligns a copy.
        first: Whether it does so the first time.
    """
    setting, epochs = problem.setting, [f" {epoch}" for epoch in range(problem.setting.epochs)]
    given = options({
        **dict.fromkeys(OFF, False), **dict.fromkeys(ZERO, 0), "model": problem.network(), "algorithm": "FedAS",
        "dataset": "digits", "device": "cpu", "save_folder_name": "", "num_classes": 10, "goal": "", "eval_gap": 1,
        "batch_size": setting.batch_size, "local_learning_rate": setting.lr, "local_epochs": setting.epochs,
        "learning_rate_decay_gamma": 1.0, "global_rounds": setting.rounds - 1, "num_clients": len(problem.clients),
        "join_ratio": setting.participation, "time_threthold": 1e9,
    })  # fmt: skip
    with opened(folder / "system", problem.seed, ("h5py", "opacus", "torchviz")) as code:
        clients, base = code.module("flcore.clients.clientas"), code.module("flcore.clients.clientbase")
        for module in (base, code.module("flcore.servers.serverbase")):
            module.read_client_data = lambda dataset, client, is_train=True: problem.examples[client]
        align = clients.clientAS.set_parameters

        def set_parameters(client: Any, model: Any, progress: float) -> None:
            client.wo_local = not first and not client.fim_trace_history
            aligning = () if client.wo_local else ("align 0", "align 0")
            base.DataLoader = problem.loader(*aligning, *epochs, "trace 0")
            align(client, copy.deepcopy(model) if copies else model, progress)

        clients.clientAS.set_parameters = set_parameters
        server: Any = code.module("flcore.servers.serveras").FedAS(given, 0)
        server.select_clients = lambda: [server.clients[k] for k in problem.cohort()]
        server.evaluate = server.save_results = server.save_global_model = lambda: None
        server.avg_generalization_metrics, server.rs_test_acc = lambda: 0.0, [0.0]
        server.train()
    return Models(None, [tree_of(client.model, problem.initial) for client in server.clients])


CASES = (
    Case("as published", _theirs, ("personal.balanced",), "fedas", setting=ALL),
    Case("each aligns a copy", partial(_theirs, copies=True), ("personal.balanced",), "fedas", setting=ALL),
    Case(
        "each aligns a copy, and nobody the first time", partial(_theirs, copies=True, first=False),
        ("personal.balanced",), "fedas", setting=ALL,
    ),
)  # fmt: skip
