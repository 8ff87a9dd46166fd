"""As many rounds for each algorithm as make the samples equal: a rule that looks at no image and at no accuracy."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from bench.algorithm import Algorithm
from bench.contract import toy
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
    first, between, last, tuning = _passes(algorithm, setting.epochs, setting.participation, setting.final_visit)
    budget = float(setting.rounds * setting.epochs)
    if budget < first + last + tuning or between <= 0:
        return setting.rounds if between <= 0 else 1
    return int(2 + (budget - first - last - tuning) / between + 1e-9)


@lru_cache(maxsize=1024)
def _passes(
    algorithm: Algorithm, epochs: int, participation: float, final_visit: bool
) -> tuple[float, float, float, float]:
    """Measure passes over a cohort's examples: in the first, a middle and the last round, and before the test."""
    setting = replace(toy.SETTING, epochs=epochs, rounds=3, participation=1.0, final_visit=final_visit)
    run, examples, spent = toy.run(algorithm, setting=setting), float(sum(toy.SIZES)), [0.0] * 3
    cost = run.progress.cost
    for round in range(setting.rounds):
        task = run.task_at(round)
        for exchange in algorithm.exchanges(task):
            before = cost.get("train_samples", 0.0)
            run.exchange(task, exchange)
            passes = (cost.get("train_samples", 0.0) - before) / examples
            spent[round] += passes / participation if exchange.everyone else passes
    run.evaluate(task, setting.rounds, True)
    return spent[0], spent[1], spent[2], cost.get("adaptation_samples", 0.0) / examples / participation
