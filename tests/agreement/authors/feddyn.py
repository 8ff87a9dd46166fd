"""FedDyn. What runs is their `train_FedDyn`: clients, memory, the server's model, which is the one compared.

Gradients are clipped at a norm of 10 there. A client's alpha is divided there by its share of the images, and models
are averaged alike; here alpha is one, and models and drifts are averaged by the setting's weights. Where clients have
equally many images the two are one. Tests go nowhere.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.agreement.foreign import opened
from tests.agreement.problem import Case, Models, Problem, tree_of

REPOSITORY, COMMIT = "alpemreacar/FedDyn", "48a19fa"
ALPHA = 0.1


def _theirs(problem: Problem, folder: Path) -> Models:
    setting, count = problem.setting, len(problem.clients)
    x = [examples.x.numpy() for examples in problem.examples]
    y = [examples.y.numpy() for examples in problem.examples]
    given = SimpleNamespace(n_client=count, clnt_x=x, clnt_y=y, tst_x=x[0], tst_y=y[0], dataset="synt", name="digits")

    def drawn(size: int) -> Any:
        """Give 0 to the clients of the round, and to others more than any share."""
        return 2.0 * ~np.isin(np.arange(size), problem.cohort())

    def of_client(given: Any, labels: Any, **_: Any) -> Any:
        """Give the examples of the client whose images these are."""
        return problem.examples[next(k for k in problem.clients if x[k] is given)]

    with opened(folder, problem.seed) as code:
        Path("Output/digits").mkdir(parents=True)
        general, methods = code.module("utils_general"), code.module("utils_methods")
        general.Dataset, general.data = of_client, SimpleNamespace(DataLoader=problem.loader())
        methods.get_acc_loss = lambda *_: (0.0, 0.0)
        with patch("numpy.random.uniform", drawn), patch("numpy.random.seed"):
            *_, clouds = methods.train_FedDyn(
                given, setting.participation, setting.lr, setting.batch_size, setting.epochs, setting.rounds,
                setting.epochs + 1, setting.weight_decay, problem.network, problem.network(), ALPHA, setting.rounds,
                1.0,
            )  # fmt: skip
    return Models(tree_of(clouds[0], problem.initial))


DECAY = {"weight_decay": 1e-3}
FIELDS = {"alpha": ALPHA}
EQUAL = {"client_weights": "uniform", "partition": "feddf_recut", "imbalance": 8.0, **DECAY}
CASES = (
    Case("as published, clients of 26 or 27 images", _theirs, ("generic",), "feddyn", FIELDS, EQUAL),
    Case("as published, clients of any size", _theirs, ("generic",), "feddyn", FIELDS, DECAY),
)
