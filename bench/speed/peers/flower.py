"""Flower's simulation: `pip install "flwr[simulation]"`. Its FedAvg on its Ray backend, an actor of one core for each
process that it may use. It draws cohorts of its own, of the same size.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.utils.data import DataLoader, TensorDataset

from bench.speed.peers.work import Line, Work, read


def _client(folder: Path) -> Any:
    """Make the app of the clients."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]  # Flower need not be installed
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        work = read(folder)
        rows = work.clients[int(context.node_config["partition-id"])]
        module = work.module
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if len(rows):
            work.train(module, DataLoader(TensorDataset(work.x[rows], work.y[rows]), work.batch, shuffle=True))
        content = {
            "arrays": ArrayRecord(module.state_dict()),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def _server(work: Work, line: Line) -> Any:
    """Make the app of the server, which begins a round when it may."""
    app = ServerApp()
    size, everyone = len(work.cohort(0)), len(work.clients)

    @app.main()  # type: ignore[untyped-decorator]  # likewise
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=size / everyone, min_train_nodes=size, min_available_nodes=everyone, fraction_evaluate=0.0
        )
        arrays, round = ArrayRecord(work.module.state_dict()), 0
        while line.may_begin():
            round += 1
            replies = list(
                grid.send_and_receive(strategy.configure_train(round, arrays, ConfigRecord(), grid), timeout=3600)
            )
            arrays, _ = strategy.aggregate_train(round, replies)
            trained = sum(int(reply.content["metrics"]["num-examples"]) for reply in replies)
            line.answer(images=work.epochs * trained)
        module = work.module
        module.load_state_dict(arrays.to_torch_state_dict())
        line.answer(accuracy=work.accuracy(module))

    return app


def main(folder: Path, workers: int) -> None:
    """Do rounds as long as they may begin."""
    line = Line()
    torch.set_num_threads(1)
    work = read(folder)
    resources = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(
        server_app=_server(work, line),
        client_app=_client(folder),
        num_supernodes=len(work.clients),
        backend_config=resources,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
