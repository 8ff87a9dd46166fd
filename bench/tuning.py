"""Tuning on an equal budget: every algorithm gets the same number of trials, on data set aside from training.

A study is the search for one algorithm. Its trial 0 is the algorithm as it was asked for; what trial n tries is a
function of the study and of trials 0..n-1 alone: Optuna's sampler, seeded by study and number, is told those and asked
for the next. So trials of one algorithm follow each other, those of several run side by side, and a search that was
interrupted, given more trials, or spread over more workers makes the same choices.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from pydantic import TypeAdapter

from bench import selection, weights
from bench.algorithm import Algorithm
from bench.claims import Claimed, claim
from bench.config import Run
from bench.dataset import Dataset, Splits
from bench.files import source
from bench.identity import identify
from bench.models import build
from bench.pool import OnRay, _quiet_ray
from bench.presets import Choice, Preset
from bench.registry import label, load_plugin
from bench.results.storage import OutputUnwritable, place, prepare
from bench.rounds import Diverged
from bench.rounds import train as train
from bench.settings import BadConfig

FOLDER = "tuning"
"""Within the folder of results."""
TRIALS = "trials.jsonl"
WORST = 0.0
"""What the sampler is told of a trial that failed: no accuracy is lower."""

_LR = "lr"
_FACTORS = {float: 10.0, int: 2.0}
_RETRIES = 2  # of a trial whose worker died; it goes on from its checkpoint

Values = dict[str, Any]
"""By name of a field, or "lr"."""


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
    target: str = "personal"
    """Which model's score counts, "personal" or "generic"; the other one's where an algorithm does not have it."""

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
        return {name: _rounded(value) for name, value in search.ask(dict(self.space)).params.items()}

    def value(self, name: str, trial: Trial) -> Any:
        """Give what a trial tried, or what holds where it tried nothing."""
        usual = self.run.setting.lr if name == _LR else getattr(self.run.algorithm, name)
        return trial.values.get(name, usual)

    def models(self) -> tuple[str, str]:
        """Name the models whose accuracy may be the score, the one that is preferred first."""
        return ("personal", "generic") if self.target == "personal" else ("generic", "personal")

    def algorithm(self, values: Values) -> Algorithm:
        """Give the algorithm with these values.

        Raises:
            ValueError: It refuses them.
        """
        own = {name: value for name, value in values.items() if name != _LR}
        return replace(self.run.algorithm, **own)  # type: ignore[type-var]

    def begun(self, values: Values, number: int) -> Trial:
        """Describe a trial of which nothing is known yet."""
        lr = values.get(_LR, self.run.setting.lr)
        try:
            call = label(self.algorithm(values))
        except ValueError as error:
            call = f"{label(self.run.algorithm)} with {values}"
            return Trial(number=number, values=values, call=call, lr=lr, reason=f"{error}")
        return Trial(number=number, values=values, call=call, lr=lr)


def space(algorithm: Algorithm, lr: float, chosen: Collection[str] | None = None) -> dict[str, BaseDistribution]:
    """Say what is tuned of an algorithm, and within which bounds.

    The learning rate of the setting from a tenth to ten times; of the algorithm's own fields what it declares as
    `space`, else: a float above 0 from a tenth of its value to ten times, an int above 0 from half to twice, a bool
    and a `Literal` over all values. A field that was asked for with another value than its default stays as it is.

    Args:
        algorithm: As asked for.
        lr: Of the setting.
        chosen: Only these fields; None: all.

    Raises:
        BadConfig: The algorithm declares a space that is none.
    """
    found: dict[str, BaseDistribution] = {}
    hints = get_type_hints(type(algorithm))
    usual = {each.name: each.default for each in fields(algorithm)}  # type: ignore[arg-type]
    declared = algorithm.space
    for name in usual if declared is None else declared:
        if name not in usual:
            raise BadConfig(f"{label(algorithm)} declares a space of {name!r}, which is none of its fields")
        if getattr(algorithm, name) == usual[name]:
            one = _around(usual[name], hints[name]) if declared is None else _declared(algorithm, name, hints[name])
            found |= {} if one is None else {name: one}
    found.setdefault(_LR, _range(lr, 10.0))
    return {name: one for name, one in found.items() if chosen is None or name in chosen}


def _around(value: Any, hint: Any) -> BaseDistribution | None:
    if get_origin(hint) is Literal:
        return CategoricalDistribution(get_args(hint))
    if hint is bool:
        return CategoricalDistribution((False, True))
    if hint in _FACTORS and value > 0:
        return _range(value, _FACTORS[hint])
    return None  # around 0, or of another type: there is no telling where to look


def _range(value: float, factor: float) -> BaseDistribution:
    if isinstance(value, int):
        return IntDistribution(max(round(value / factor), 1), round(value * factor), log=True)
    return FloatDistribution(_rounded(value / factor), _rounded(value * factor), log=True)


def _declared(algorithm: Algorithm, name: str, hint: Any) -> BaseDistribution:
    assert algorithm.space is not None
    values = algorithm.space[name]
    try:
        if isinstance(values, list):
            return CategoricalDistribution(values)  # type: ignore[arg-type]
        low, high = values
        kind = IntDistribution if hint is int else FloatDistribution
        return kind(low, high, log=low > 0)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        said = f"{label(algorithm)}: its space of {name} is {values!r}"
        raise BadConfig(f"{said}; (lowest, highest) or a list of values is wanted ({error})") from error


def _rounded(value: Any) -> Any:
    """Keep three digits: what is tuned is also written, read and typed."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


# One trial --------------------------------------------------------------------------------------------------


def attempt(study: Study, trial: Trial, folder: Path) -> Trial:
    """Train and score one set of values, from its checkpoints on where there are some.

    Args:
        study: What is searched.
        trial: Which values, as `Study.begun` gives them.
        folder: Of checkpoints.

    Returns:
        The trial with its score, or with the reason why it failed.

    Raises:
        OSError: Data cannot be read, or checkpoints cannot be written.
    """
    torch.set_num_threads(1)
    run, outcomes = study.run, []
    if trial.reason is not None:
        return trial
    files = [folder / f"trial-{trial.number}-seed-{seed}.pt" for seed in study.seeds]
    try:
        for seed, file in zip(study.seeds, files, strict=True):
            splits, split = _load(run.dataset, run.data_root, study, seed)
            outcomes.append(
                train(
                    algorithm=study.algorithm(trial.values),
                    dataset=run.dataset,
                    splits=splits,
                    split=split,
                    setting=_setting(study, trial.lr, len(split.clients)),
                    seed=seed,
                    engine=run.engine,
                    precision=run.precision,
                    device=run.device,
                    weights=_weights(run),
                    checkpoint=file,
                )
            )
        ended = _scored(study, trial, outcomes)
    except OSError:
        raise
    except Exception as error:  # a plug-in may raise anything: then these values are no good
        ended = replace(trial, reason=_reason(error))
    for file in files:
        for left in folder.glob(f"{file.stem}.*"):
            left.unlink(missing_ok=True)
    return ended


def _setting(study: Study, lr: float, clients: int) -> Any:
    """Give the protocol with a trial's learning rate, tested once; held-out clients are not there."""
    setting = study.run.setting
    known = None if setting.clients is None else clients
    return replace(setting, lr=lr, clients=known, unseen=0, eval_every=setting.rounds)


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


def _load(dataset: Dataset, root: Path, study: Study, seed: int) -> Any:
    splits = _images(dataset, root)
    aside = selection.set_aside(splits.labels, dataset.num_classes, study.run.setting, seed, study.share)
    return selection.view(splits, aside)


def _weights(run: Run) -> Any:
    if run.weights is None:
        return None
    dataset, setting = run.dataset, run.setting
    return weights.read(run.weights, build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm))


def _reason(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Diverged | BadConfig):
        return first
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno})"


# All studies ------------------------------------------------------------------------------------------------


class DamagedStudy(BadConfig):
    """A study's file is not what was written."""


@contextmanager
def opened(studies: Sequence[Study], trials: int, out: Path, told: Callable[[Study, Trial], None]) -> Iterator[Book]:
    """Open a `Book`, and keep other processes from its studies.

    Raises:
        BadConfig: Another process has one of them. Besides, what `Book` raises.
    """
    with ExitStack() as claims:
        for study in studies:
            folder = prepare(out / FOLDER / study.id)
            try:
                claims.enter_context(claim(folder))
            except Claimed as error:
                what = f"another process is tuning {label(study.run.algorithm)} ({folder})"
                raise BadConfig(f"{what}; the same command goes on when that has ended") from error
        yield Book(studies, trials, out, told)


class Book:
    """What is tried next, and what has been: in memory, and in the studies' folders.

    Args:
        studies: What is searched.
        trials: Of each; a study with nothing to tune has the one of the algorithm as asked for.
        out: The folder of results.
        told: Learns each trial as it ends, with its study; of those that are there already nothing.

    Raises:
        DamagedStudy: A file cannot be read.
        OutputUnwritable: A folder cannot be written.
    """

    def __init__(self, studies: Sequence[Study], trials: int, out: Path, told: Callable[[Study, Trial], None]) -> None:
        self.studies, self.told = studies, told
        self.budget = {study.id: trials if study.space else 1 for study in studies}
        self.folders = {study.id: out / FOLDER / study.id for study in studies}
        self.trials = {study.id: _read(self.folders[study.id] / TRIALS) for study in studies}
        self._busy: set[str] = set()
        for study in studies:
            text = json.dumps(study.described(), indent=2) + "\n"
            place(self.folders[study.id], {"study.json": text.encode()})

    def left(self) -> int:
        """Count the trials that are not there yet."""
        return sum(max(self.budget[study.id] - len(self.trials[study.id]), 0) for study in self.studies)

    def next(self) -> tuple[Study, Trial] | None:
        """Begin a trial, of a study that has most left; None: all that are left wait for one that runs."""
        while waiting := [study for study in self.studies if study.id not in self._busy and self._lacks(study) > 0]:
            study = max(waiting, key=self._lacks)
            done = self.trials[study.id]
            trial = study.begun(study.propose(done), len(done))
            same = next((old for old in done if (old.call, old.lr) == (trial.call, trial.lr)), None)
            self._busy.add(study.id)
            if same is not None:
                same_as = same.number if same.same_as is None else same.same_as
                self.note(study, replace(same, number=trial.number, values=trial.values, same_as=same_as))
            else:
                return study, trial
        return None

    def note(self, study: Study, trial: Trial) -> None:
        """End a trial.

        Raises:
            OutputUnwritable: It cannot be stored.
        """
        self._busy.discard(study.id)
        self.trials[study.id].append(trial)
        lines = [json.dumps(asdict(each), allow_nan=False) + "\n" for each in self.trials[study.id]]
        place(self.folders[study.id], {TRIALS: "".join(lines).encode()})
        self.told(study, trial)

    def within(self, study: Study) -> list[Trial]:
        """Give the trials of a study that its budget allows: more may be there, of an earlier search."""
        return self.trials[study.id][: self.budget[study.id]]

    def _lacks(self, study: Study) -> int:
        return self.budget[study.id] - len(self.trials[study.id])


def _read(file: Path) -> list[Trial]:
    if not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        trials = [TypeAdapter(Trial).validate_json(line, strict=True) for line in lines]
    except (OSError, ValueError) as error:
        raise DamagedStudy(f"{file} cannot be read as trials; delete the folder {file.parent} ({error})") from error
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise DamagedStudy(f"{file} lacks trials; delete the folder {file.parent}")
    return trials


def check(studies: Sequence[Study]) -> None:
    """Make the splits that studies need, from labels alone: what is wrong shows before any work is done.

    Raises:
        BadConfig, DataMissing, DataDamaged, PartitionFailed: As of `bench.selection.set_aside` and `Dataset.labels`.
    """
    for run, seeds, share in {study.run.protocol: (study.run, study.seeds, study.share) for study in studies}.values():
        labels = source.labels(run.dataset, run.data_root)
        for seed in seeds:
            split = selection.set_aside(labels, run.dataset.num_classes, run.setting, seed, share)
            source.require(run.dataset, run.data_root, [*split.clients, *split.tests])
        _weights(run)


def search(book: Book) -> None:
    """Do all trials that are left, one after the other, in this process."""
    while (begun := book.next()) is not None:
        study, trial = begun
        book.note(study, attempt(study, trial, book.folders[study.id]))


def search_on_ray(book: Book, address: str = "local", jobs: int | None = None) -> None:
    """Do all trials that are left by Ray Tune: those of one study follow each other, studies go side by side.

    Args:
        book: Of the studies.
        address: As of `bench.pool.OnRay`.
        jobs: Trials at once; None for what the machine or cluster holds.

    Raises:
        OutputUnwritable: A worker could not read its data or write its checkpoints.
        BadConfig: Nobody answers at the address.
    """
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    device = book.studies[0].run.device
    with session(address, jobs, device, len(book.studies)) as ray, tempfile.TemporaryDirectory() as scratch:
        from ray import tune

        for logger in ("ray.tune", "ray.train"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)  # workers that die are told of as trials that fail
        cores = ray.cluster_resources().get("CPU", 1.0)
        gpus = ray.cluster_resources().get("GPU", 0.0) if device == "cuda" else 0.0
        at_once = min(jobs or int(gpus or cores), len(book.studies))
        rotation = _rotation(book)
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
            ),
        )
        tuner.fit()
    if rotation.stopped is not None:
        raise OutputUnwritable(f"{rotation.stopped}; the same command goes on")


@contextmanager
def session(address: str, jobs: int | None, device: str, work: int) -> Iterator[Any]:
    """Start Ray, or join it, and stop at the end what was started."""
    pool = OnRay(address, jobs, device)
    ray = _quiet_ray()
    mine = not ray.is_initialized()
    # Ray prints what happened to workers on standard output, which is for results.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            if mine:
                pool._start(ray, work)
            yield ray
        finally:
            if mine:
                ray.shutdown()


def _rotation(book: Book) -> Any:
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
            sources = [(file.name, file.read_bytes()) for file in study.run.plugins]
            folder = str(book.folders[study.id].resolve())
            return {"sources": sources, "payload": pickle.dumps((study, trial)), "folder": folder}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            study, trial = self.begun.pop(trial_id)
            if result is None or "payload" not in result:
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


def _on_worker(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Do one trial in a worker of Ray; in place of the trial comes a sentence if nothing more can be done there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in config["sources"]:  # before unpickling, which needs their classes
            (Path(folder) / name).write_bytes(content)
            load_plugin(Path(folder) / name)
        study, trial = pickle.loads(config["payload"])
        try:
            answer: Trial | str = attempt(study, trial, Path(config["folder"]))
        except OSError as error:
            answer = str(error)
    return {"payload": pickle.dumps(answer)}


# What comes out ---------------------------------------------------------------------------------------------


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
