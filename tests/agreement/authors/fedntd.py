"""FedNTD. What runs is their `Server.run`, as for FedAvg.

The teacher is in training mode there and in evaluation mode here, which is one on a network without normalisation.
"""

from __future__ import annotations

from pathlib import Path

from tests.agreement.authors import fedavg
from tests.agreement.problem import Case, Models, Problem

REPOSITORY, COMMIT = fedavg.REPOSITORY, fedavg.COMMIT


def _theirs(problem: Problem, folder: Path) -> Models:
    return fedavg.served(problem, folder, "fedntd", tau=1.0, beta=1.0)


CASES = (Case("as published", _theirs, ("generic",), "fedntd", setting={"momentum": 0.5, "weight_decay": 1e-4}),)
