"""Do the trials that are left: here one after the other, or studies side by side on Ray Tune."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.results.storage import OutputUnwritable
from bench.sweep.cluster import RayDied, Session, cores, lasting, need_ray, packed, unpacked
from bench.system.text import plain
from bench.tuning.book import Book
from bench.tuning.study import Study, Trial
from bench.tuning.trial import attempt as attempt

_RETRIES = 2  # of a trial whose worker died; it goes on from its checkpoint


def search(book: Book) -> None:
    """Do all trials that are left, one after the other, in this process."""
    while (begun := book.next()) is not None:
        study, trial = begun
        book.note(study, attempt(study, trial, book.folders[study.id], _say))


def search_on_ray(book: Book, address: str = "local", jobs: int | None = None) -> None:
    """Do all trials that are left by Ray Tune: those of one study follow each other, studies go side by side.

    Args:
        book: Of the studies.
        address: As of `bench.sweep.on_ray.OnRay`.
        jobs: Trials at once; None for what the machine or cluster holds.

    Raises:
        OutputUnwritable: A worker could not read its data or write its checkpoints.
        RayDied: Ray did, again and again; the trials that were going on are left.
        BadConfig: Nobody answers at the address.
    """
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    device = book.studies[0].run.device
    need_ray(f"--ray {address}", "use --ray off")
    cpus = min(jobs or cores(device), len(book.studies))
    try:
        lasting(lambda here: _tune(here, book, jobs), cpus, address, tell=_say)
    except RayDied as error:
        raise RayDied(f"{error}; the same command goes on") from error


def _tune(here: Session, book: Book, jobs: int | None) -> None:
    """Do the trials that are left on a cluster."""
    device, ray = book.studies[0].run.device, here.ray
    book.give_back()
    with tempfile.TemporaryDirectory() as scratch:
        from ray import tune

        class Lives(tune.Callback):  # type: ignore[misc]  # Ray's class has no types
            def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
                here.require_alive()

        for logger in ("ray.tune", "ray.train"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)  # workers that die are told of as trials that fail
        cpu = ray.cluster_resources().get("CPU", 1.0)
        gpus = ray.cluster_resources().get("GPU", 0.0) if device == "cuda" else 0.0
        at_once = min(jobs or int(gpus or cpu), len(book.studies))
        rotation = _rotation(book, here)
        tuner = tune.Tuner(
            tune.with_resources(_on_worker, {"cpu": 1, "gpu": min(1.0, gpus / at_once)}),
            tune_config=tune.TuneConfig(
                search_alg=rotation, num_samples=book.left(), max_concurrent_trials=at_once, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,  # what lasts is in the studies' folders
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                callbacks=[Lives()],
            ),
        )
        tuner.fit()
    if rotation.stopped is not None:
        here.require_alive()
        raise OutputUnwritable(f"{rotation.stopped}; the same command goes on")


def _rotation(book: Book, here: Session) -> Any:
    """Make Ray Tune's searcher: asks the book what to try, and tells it what became of that."""
    from ray.tune.search import Searcher

    class Rotation(Searcher):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.begun: dict[str, tuple[Study, Trial]] = {}
            self.stopped: str | None = None

        def suggest(self, trial_id: str) -> Any:
            if self.stopped is not None or not book.left():
                return Searcher.FINISHED
            begun = book.next()
            if begun is None:
                return None if book.left() else Searcher.FINISHED
            study, trial = self.begun[trial_id] = begun
            folder = str(book.folders[study.id].resolve())
            return {"payload": packed(study.run.plugins, (study, trial)), "folder": folder}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            study, trial = self.begun.pop(trial_id)
            for sentence in (result or {}).get("said", ()):
                _say(sentence)
            if result is None or "payload" not in result:
                try:
                    here.require_alive()
                except RayDied as died:  # that is no trial's failure
                    self.stopped = str(died)
                    return
                reason = "its worker died again and again (killed, or out of memory)"
                book.note(study, replace(trial, reason=reason))
            elif isinstance(ended := pickle.loads(result["payload"]), Trial):
                book.note(study, ended)
            else:
                self.stopped = ended

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: the studies' files are what a search goes on from."""

        restore = save

    return Rotation()


def _say(sentence: str) -> None:
    print(f"bench: {plain(sentence)}", file=sys.stderr)


def _on_worker(config: Mapping[str, Any]) -> dict[str, Any]:
    """Do one trial in a worker of Ray; in place of the trial comes a sentence if nothing more can be done there."""
    said: list[str] = []
    with unpacked(config["payload"]) as (study, trial):
        try:
            answer: Trial | str = attempt(study, trial, Path(config["folder"]), said.append)
        except OSError as error:
            answer = str(error)
    return {"payload": pickle.dumps(answer), "said": said}
