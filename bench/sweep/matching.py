"""As many rounds for each algorithm as make the samples equal: a rule that looks at no image and at no accuracy."""

from __future__ import annotations

from bench.algorithm import Algorithm
from bench.contract.passes import passes
from bench.protocol.settings import Setting


def matched_rounds(algorithm: Algorithm, setting: Setting) -> int:
    """Give the most rounds in which clients process no more samples than plain local training does in the setting's.

    What a round takes is measured on the toy problem, in passes over the examples of a cohort: the first round (with a
    prologue, if there is one), one in between, the last (with an epilogue), and the tuning before the test, of all
    clients. A cohort is taken to have its share of the examples, and what is processed at the server is left out.

    Args:
        algorithm: Whose.
        setting: Its rounds, epochs, participation, final_visit and eval_clients are read.

    Returns:
        At least 1, even where one round is more than there is to spend.
    """
    first, between, last, tuning = passes(algorithm, setting.epochs, setting.participation, setting.final_visit)
    budget = float(setting.rounds * setting.epochs)
    if budget < first + last + tuning or between <= 0:
        return setting.rounds if between <= 0 else 1
    return int(2 + (budget - first - last - tuning) / between + 1e-9)
