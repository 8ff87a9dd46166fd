"""One trial: train one set of values without the test part, and score it on what was set aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bench.algorithm import Algorithm
from bench.dataset import Dataset, Splits
from bench.files import source
from bench.protocol.settings import BadConfig, Setting
from bench.splits import selection
from bench.splits.auxiliary import Reserve
from bench.sweep.execution import reason_of
from bench.sweep.matching import matched_rounds
from bench.sweep.run import Run
from bench.training.job import Job
from bench.training.outcome import Report
from bench.training.rounds import Diverged
from bench.training.rounds import train as train
from bench.tuning.study import Study, Trial


def attempt(study: Study, trial: Trial, folder: Path, say: Callable[[str], None]) -> Trial:
    """Train and score one set of values, from its checkpoints on where there are some.

    Args:
        study: What is searched.
        trial: Which values, as `Study.begun` gives them.
        folder: Of checkpoints.
        say: Told in a sentence of a checkpoint that it does not go on from.

    Returns:
        The trial with its score, or with the reason why it failed.

    Raises:
        OSError: Data cannot be read, or checkpoints cannot be written.
    """
    torch.set_num_threads(1)
    run, outcomes = study.run, []
    if trial.reason is not None:
        return trial

    def tell(news: Report) -> None:
        if news.anew is not None:
            say(f"a checkpoint of trial {trial.number} of {trial.call} {news.anew}; it begins anew")

    files = [folder / f"trial-{trial.number}-seed-{seed}.pt" for seed in study.seeds]
    try:
        for seed, file in zip(study.seeds, files, strict=True):
            splits, split = _load(run.dataset, run.data_root, study, seed)
            algorithm = study.algorithm(trial.values)
            setting = _setting(study, algorithm, trial.lr, len(split.clients))
            job = Job(
                algorithm, run.dataset, splits, split, setting, seed, run.engine, run.precision, run.device,
                run.read_weights(), _reserve(run), run.read_teacher(len(splits.train_y)),
            )  # fmt: skip
            outcomes.append(train(job, checkpoint=file, report=tell))
        ended = _scored(study, trial, outcomes)
    except OSError:
        raise
    except (Exception, SystemExit) as error:  # a plug-in may raise anything: then these values are no good
        ended = replace(trial, reason=reason_of(error, (Diverged, BadConfig)))
    for file in files:
        for left in folder.glob(f"{file.stem}.*"):
            left.unlink(missing_ok=True)
    return ended


def _setting(study: Study, algorithm: Algorithm, lr: float, clients: int) -> Setting:
    """Give the protocol with a trial's learning rate, tested once; held-out clients are not there."""
    setting = study.run.setting
    known = None if setting.clients is None else clients
    rounds = matched_rounds(algorithm, setting) if setting.match == "samples" else setting.rounds
    return replace(setting, lr=lr, rounds=rounds, clients=known, unseen=0, eval_every=rounds)


def _scored(study: Study, trial: Trial, outcomes: Sequence[Any]) -> Trial:
    found = [next((o.metrics[name] for name in study.models() if o.metrics[name] is not None), None) for o in outcomes]
    scores = [score for score in found if score is not None]
    if len(scores) < len(found):
        return replace(trial, reason="it has neither a personal nor a generic model to be scored")
    last = [{key: value for key, value in each.metrics.items() if "@" not in key} for each in outcomes]
    return replace(
        trial,
        score=sum(scores) / len(scores),
        metrics=last,
        cost=[each.cost for each in outcomes],
        digests=[each.digest for each in outcomes],
    )


@lru_cache(maxsize=1)
def _images(dataset: Dataset, root: Path) -> Splits:
    """Load a dataset, without its official test part."""
    splits = source.load(dataset, root)
    return replace(splits, test_x=torch.empty(0, *splits.train_x.shape[1:]), test_y=splits.test_y[:0], test_users=None)


@lru_cache(maxsize=1)
def _reserve(run: Run) -> Reserve | None:
    """Find the images at the server; the official test part is looked at only so that none of them is in it."""
    return None if run.setting.auxiliary is None else run.reserve(source.load(run.dataset, run.data_root))


def _load(dataset: Dataset, root: Path, study: Study, seed: int) -> Any:
    splits = _images(dataset, root)
    aside = selection.set_aside(splits.labels, dataset.num_classes, study.run.setting, seed, study.share)
    return selection.view(splits, aside)
