"""How often a method goes over its clients' examples, measured on the toy problem."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from bench.algorithm import Algorithm
from bench.contract import toy


class Passes(NamedTuple):
    """Passes over a cohort's examples; one forward alone is a third."""

    first: float
    """In the first round, with a prologue if there is one."""
    between: float
    last: float
    """In the last one, with an epilogue if there is one."""
    tuning: float
    """Before the test, of all clients."""


@lru_cache(maxsize=1024)
def passes(algorithm: Algorithm, epochs: int, participation: float = 1.0, final_visit: bool = False) -> Passes:
    """Measure passes: those of rounds, at the server left out, and those before the test."""
    setting = replace(toy.SETTING, epochs=epochs, rounds=3, participation=1.0, final_visit=final_visit)
    run, examples = toy.run(algorithm, setting=setting), float(sum(toy.SIZES))
    cost = run.progress.cost

    def of_round(round: int) -> float:
        task, spent = run.task_at(round), 0.0
        for exchange in algorithm.exchanges(task):
            before = cost.get("train_samples", 0.0)
            run.exchange(task, exchange)
            done = (cost.get("train_samples", 0.0) - before) / examples
            spent += done / participation if exchange.everyone else done
        return spent

    first, between, last = map(of_round, range(setting.rounds))
    run.evaluate(run.task_at(setting.rounds - 1), setting.rounds, True)
    return Passes(first, between, last, cost.get("adaptation_samples", 0.0) / examples / participation)
