"""What a search has found: the best trial of each study, and the preset made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bench.plugins.registry import label
from bench.protocol.presets import Choice, Preset
from bench.protocol.settings import BadConfig
from bench.tuning.book import Book
from bench.tuning.study import Study, Trial


def best(trials: Sequence[Trial]) -> Trial | None:
    """Give the trial with the highest score, the first of equals; None if all failed."""
    return max((t for t in trials if t.score is not None), key=lambda t: (t.score, -t.number), default=None)


def scored_by(study: Study, trials: Sequence[Trial]) -> str | None:
    """Say which model's accuracy the scores are, "personal" or "generic"; None if all failed."""
    measured = next((trial.metrics[0] for trial in trials if trial.metrics), None)
    return None if measured is None else next(name for name in study.models() if measured[name] is not None)


def preset(book: Book, trials: int, name: str, chosen: Collection[str] | None) -> Preset:
    """Make a preset of what was best; algorithms of which every trial failed are not in it.

    Args:
        book: Of the studies, done.
        trials: Of each study.
        name: Stands beside the algorithms in the table.
        chosen: Fields that could be tuned; None: all.
    """
    first = book.studies[0]
    algorithms = {}
    for study in book.studies:
        done = book.within(study)
        if (found := best(done)) is not None:
            lr = None if found.lr == study.run.setting.lr else found.lr
            algorithms[label(study.run.algorithm)] = Choice(
                call=found.call, lr=lr, score=found.score, untuned=done[0].score, study=study.id
            )
    return Preset(
        name=name,
        dataset=label(first.run.dataset),
        protocol=first.run.protocol,
        trials=trials,
        validation=first.share,
        seeds=list(first.seeds),
        target=first.target,
        tuned=None if chosen is None else sorted(chosen),
        algorithms=algorithms,
    )


def kept(new: Preset, old: Preset, file: Path, tuned: Collection[str]) -> Mapping[str, Choice]:
    """Give what stays of an earlier preset of the same name: choices made with the same budget.

    Args:
        new: What takes its place; only the budget counts.
        old: The earlier one.
        file: Where it is.
        tuned: Algorithms that are tuned now.

    Raises:
        BadConfig: It was tuned for another protocol, or holds others than these that had another budget.
    """
    if new.budget() == old.budget():
        return old.algorithms
    others = [algorithm for algorithm in old.algorithms if algorithm not in tuned]
    if old.protocol != new.protocol or others:
        what = "for another protocol" if old.protocol != new.protocol else "on another budget"
        held = ", ".join(others or old.algorithms)
        raise BadConfig(f"{file} holds {held}, tuned {what}; choose another --name, or delete the file")
    return {}
