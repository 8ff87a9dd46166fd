"""A study: the search for one algorithm's values. What a trial tries is a function of those before it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json

from bench.algorithm import Algorithm
from bench.plugins.registry import label
from bench.protocol.composition import values_of, with_values
from bench.protocol.identity import identify
from bench.sweep.run import Run
from bench.tuning.space import LR, rounded

WORST = 0.0
"""What the sampler is told of a trial that failed: no accuracy is lower."""

Values = dict[str, Any]
"""By name of a field, of a part's as "focal.gamma", or "lr"."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One set of values and what became of it; a line of trials.jsonl."""

    number: int
    """From 0."""
    values: Values
    """What was tried; empty in trial 0."""
    call: str
    """The algorithm with these, as on the command line."""
    lr: float
    score: float | None = None
    """Mean over the seeds; None if it failed."""
    reason: str | None = None
    """Why it failed."""
    same_as: int | None = None
    """Number of the earlier trial with these values, whose result this is: it was not run again."""
    metrics: list[dict[str, float | None]] = field(default_factory=list)
    """Of the last round on the validation part, for each seed."""
    cost: list[dict[str, float | None]] = field(default_factory=list)
    """For each seed."""
    digests: list[str] = field(default_factory=list)
    """Of the final states, for each seed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The search for one algorithm's values, whatever its budget."""

    run: Run
    """The algorithm as asked for, with dataset, setting, engine, precision and device; its seed is not used."""
    seeds: tuple[int, ...]
    space: Mapping[str, BaseDistribution]
    """What is tuned; nothing, if nothing can be."""
    share: float = 0.2
    """Of the clients' training images that are set aside."""
    target: str = "balanced"
    """Whose accuracy counts: "balanced" (`personal.balanced`, which ranks), "personal" or "generic"; where an algorithm
    does not have it, "generic", or instead of that "balanced"."""

    @cached_property
    def id(self) -> str:
        """12 hexadecimal digits: the name of the study's folder."""
        return identify(self.described())

    def described(self) -> dict[str, Any]:
        """Give everything that decides what is tried and chosen, in JSON's types."""
        return {
            **{key: value for key, value in self.run.identity().items() if key != "seed"},
            "seeds": list(self.seeds),
            "space": {name: json.loads(distribution_to_json(values)) for name, values in self.space.items()},
            "validation": self.share,
            "target": self.target,
            "sampler": f"TPE of optuna {optuna.__version__}",
        }

    def propose(self, trials: Sequence[Trial]) -> Values:
        """Choose what to try after trials 0..n-1."""
        if not trials:
            return {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=int(identify({"study": self.id, "trial": len(trials)})[:8], 16))
        search = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in trials:
            values = {name: self.value(name, trial) for name in self.space}
            score = WORST if trial.score is None else trial.score
            with suppress(ValueError):  # what was asked for may lie outside of a declared space
                search.add_trial(optuna.trial.create_trial(params=values, distributions=dict(self.space), value=score))
        return {name: rounded(value) for name, value in search.ask(dict(self.space)).params.items()}

    def value(self, name: str, trial: Trial) -> Any:
        """Give what a trial tried, or what holds where it tried nothing."""
        usual = self.run.setting.lr if name == LR else values_of(self.run.algorithm)[name]
        return trial.values.get(name, usual)

    def models(self) -> tuple[str, str]:
        """Name the metrics that may be the score, the one that is preferred first."""
        balanced = "personal.balanced"
        others = {"balanced": (balanced, "generic"), "personal": ("personal", "generic")}
        return others.get(self.target, ("generic", balanced))

    def algorithm(self, values: Values) -> Algorithm:
        """Give the algorithm with these values.

        Raises:
            ValueError: It refuses them.
        """
        return with_values(self.run.algorithm, {name: value for name, value in values.items() if name != LR})

    def begun(self, values: Values, number: int) -> Trial:
        """Describe a trial of which nothing is known yet."""
        lr = values.get(LR, self.run.setting.lr)
        try:
            call = label(self.algorithm(values))
        except ValueError as error:
            call = f"{label(self.run.algorithm)} with {values}"
            return Trial(number=number, values=values, call=call, lr=lr, reason=f"{error}")
        return Trial(number=number, values=values, call=call, lr=lr)
