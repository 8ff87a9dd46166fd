"""CReFF. What runs are the clients (`Local`) and the server (`Global`) of their `main.py`, in the order of its `CReFF`.

Features have 256 numbers in their code, hence the network `adapter`. Augmentation is switched off, in training and of
the images whose gradients are taken, which are at most 32 of a class, ten times, and here all that there are: a client
rarely has more. Features start from our noise, the head that is trained on them from our weights in our order. Less is
computed at the server than published, on both sides: 10 features a class, 30 steps of matching, 50 epochs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

from bench import keys
from tests.agreement.foreign import opened, options
from tests.agreement.problem import Case, Models, Problem, linear, tree_of

REPOSITORY, COMMIT = "shangxinyi/CReFF-FL", "fbec98f"
FIELDS = {"features_per_class": 10, "match_steps": 30, "head_epochs": 50}


class _Ours:
    """Features in the order in which our server trains its head on them."""

    def __init__(self, problem: Problem, features: Tensor, labels: Tensor) -> None:
        self.key = problem.run.task_at(problem.round).server_key("retrain")
        self.x, self.y, self.epoch = features, labels, 0

    def loader(self, dataset: object, **_: object) -> Any:
        order = keys.permutation(keys.fold(self.key, self.epoch), len(self.y))
        self.epoch += 1
        return zip(self.x[order].split(32), self.y[order].split(32), strict=True)


def _theirs(problem: Problem, folder: Path) -> Models:
    setting, initial = problem.setting, problem.initial
    given = options({
        "num_classes": 10, "device": "cpu", "lr_feature": 0.1, "lr_net": 0.01, "lr_local_training": setting.lr,
        "num_epochs_local_training": setting.epochs, "batch_size_local_training": setting.batch_size, "dsa": False,
        "batch_real": 32, "match_epoch": FIELDS["match_steps"], "crt_epoch": FIELDS["head_epochs"],
        "dis_metric": "ours",
    })  # fmt: skip
    with opened(folder, problem.seed) as code:
        main = code.module("main")
        main.args_parser, main.args = lambda: given, given
        main.ResNet_cifar = lambda **_: problem.network("classifier", lambda z, y: (z, y))
        main.transforms = MagicMock(Compose=lambda _: lambda x: x)
        server = main.Global(10, "cpu", given, FIELDS["features_per_class"])
        with torch.no_grad():
            server.feature_syn.copy_(problem.run.algorithm.init_server(problem.task)["features"].flatten(0, 1))
        retrained: Any = linear(initial["head"]).state_dict()
        for _ in range(setting.rounds):
            cohort, averaged = problem.cohort(), server.download_params()
            asked = {**copy.deepcopy(averaged), **{f"classifier.{name}": leaf for name, leaf in retrained.items()}}
            gradients, states = [], []
            for k in cohort:
                main.DataLoader = problem.loader()
                own = [(x, int(y)) for x, y in problem.examples[k]]
                local = main.Local(_Indexed(own, k, problem), problem.counts[k].tolist())
                gradients.append(local.compute_gradient(copy.deepcopy(asked), given))
                states.append(copy.deepcopy(local.local_train(given, copy.deepcopy(averaged))))
            averaged = server.initialize_for_model_fusion(states, [problem.sizes[k] for k in cohort])
            server.update_feature_syn(given, copy.deepcopy(asked), gradients)
            ours = _Ours(problem, server.feature_syn.detach().clone(), server.label_syn)
            main.DataLoader = ours.loader
            start = linear(problem.task.model.init(ours.key)["head"])
            with patch.object(main, "nn", SimpleNamespace(Linear=lambda *_: start)):  # noqa: B023 - used at once
                retrained, tested = server.feature_re_train(copy.deepcopy(averaged), 32)
            server.syn_model.load_state_dict(averaged)
    return Models(tree_of(tested, initial))


class _Indexed(list[Any]):
    """A client's examples with labels that are numbers, and whose they are."""

    def __init__(self, pairs: list[Any], client: int, problem: Problem) -> None:
        super().__init__(pairs)
        self.indices = problem.rows[client]


CASES = (Case("without augmentation", _theirs, ("generic",), "creff", FIELDS, {"model": "adapter"}),)
