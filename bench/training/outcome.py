"""What a run tells of itself: after each round, in a checkpoint, and when it has finished."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bench.tree import Tree

Row = dict[str, float | int | None]
"""Of one evaluated round: "round" and the metrics."""


@dataclass(frozen=True)
class Report:
    """News of a run after a round."""

    round: int
    """Rounds completed."""
    rounds: int
    seconds: float
    """Wall time of this run so far, from before an interruption too."""
    metrics: dict[str, float | None] | None
    """Where this round was evaluated."""
    anew: str | None = None
    """Before the first round: why the run begins anew although it has a checkpoint; completes "its checkpoint ..."."""


@dataclass(frozen=True)
class Tally:
    """What one model, or one kind of personal models, got right in one evaluation; a row for a client and class."""

    round: int
    """Rounds completed."""
    model: str
    rows: Tensor
    """(5, n) int32: client (-1: generic), class, correct, total, and whether the client was in the cohort of any round
    by then: 1, 0, or -1 where that is no question; no row without test images. Of predictions: client, class, predicted
    class, number of images, and the same."""


@dataclass(frozen=True)
class Outcome:
    """All that a finished run leaves."""

    metrics: dict[str, float | None]
    """Last round; `@last10` the mean of the last ten evaluations; `@best` the best one, on test data, hence
    optimistic.
    """
    rounds: list[Row]
    counts: list[Tally]
    """Right answers of all evaluations."""
    predictions: list[Tally]
    """What images were taken for, of the last evaluation."""
    cost: dict[str, float | None]
    digest: str
    """SHA-256 over the server's and all clients' final states."""
    tested: dict[str, int | list[int] | None]
    """On what the personal metrics rest: "clients" that have test images, "images" of the one with fewest and most,
    clients in the "worst_decile", with "one_class" only in training, "drawn" for any cohort and "never"."""
    models: dict[str, str]
    """SHA-256 of each file of kept models, by name; empty if none were to be kept."""
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that were sent, up and down, by each evaluated round; empty where nothing is sent."""
    open_set: dict[str, str] = field(default_factory=dict)
    """How images came out in the open-set test, a line of `bench.training.open_set` a client; empty without one."""


@dataclass
class Progress:
    """All that changes from round to round: what a checkpoint holds."""

    round: int
    server: Tree
    rows: list[Row] = field(default_factory=list)
    counts: list[Tally] = field(default_factory=list)
    predictions: list[Tally] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    """As `Outcome` has them."""
    open_set: dict[int, str] = field(default_factory=dict)
    """Likewise, by client."""
