"""One run: the round loop, its checkpoints and its accounts. It knows phases, trees and clients, and no
algorithm by name.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.algorithm import Exchange
from bench.data import Uploads
from bench.models.layers import is_norm_statistic
from bench.splits.split import group_classes
from bench.task import Task
from bench.training import engine as engines
from bench.training import metrics
from bench.training.crew import Alone, Crew, visit_all
from bench.training.evaluation import Answers, Evaluator, right
from bench.training.job import Job, surroundings
from bench.training.keeping import Keeper, holds
from bench.training.memory import peak_memory, reset_peak_memory
from bench.training.states import StatesUnwritable, store
from bench.training.statistics import with_own_statistics
from bench.training.visit import Verb, Visit
from bench.tree import Tree

WORK = tuple(f"{whose}_{what}" for what in ("samples", "flops") for whose in ("train", "adaptation", "server"))
"""Costs of computing: in training, in making the tested models of trained states, and at the server."""
_RATE = "flops of "
"""Begins the operations a sample, or of one time at the server, among what a checkpoint knows of costs."""

_TALLIED = ("counts", "predictions")
"""Of what a checkpoint holds."""

_VISITED_AT_ONCE = 128
"""Clients of a final visit whose states are in memory together."""

Row = dict[str, float | int | None]


class Diverged(ArithmeticError):
    """A model is no longer finite; the message says whose and when."""


class BadCohort(ValueError):
    """An algorithm chose clients that there are not; the message says which."""


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
    """One row an evaluated round: "round" and the metrics."""
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


def train(
    job: Job,
    *,
    checkpoint: Path | None = None,
    report: Callable[[Report], None] | None = None,
    crew: Crew | None = None,
    models: Path | None = None,
) -> Outcome:
    """Train and test one algorithm on one split.

    Args:
        job: Which, and on what.
        checkpoint: File to save to after rounds, and to continue from if it is there.
        report: Called after each round.
        crew: Processes that share the clients of a round and the tests; None: this one does it all, with the same bits.
        models: Folder that the final states and the models of the last evaluation are written to; None: nowhere.

    Raises:
        Diverged: A state is no longer finite.
        StatesUnwritable: A file of states or models cannot be written.
    """
    run = Run(job, checkpoint, crew, models)
    while run.progress.round < job.setting.rounds:
        measured = run.step()
        if report is not None:
            report(Report(run.progress.round, job.setting.rounds, run.progress.cost["wall_seconds"], measured))
    return run.outcome()


class Run:
    """One run between two rounds. `train` drives it; tests may step through it."""

    def __init__(
        self, job: Job, checkpoint: Path | None = None, crew: Crew | None = None, models: Path | None = None
    ) -> None:
        self.started = time.perf_counter()
        algorithm, setting = self.algorithm, self.setting = job.algorithm, job.setting
        self.checkpoint, self.models, self.device = checkpoint, models, job.device
        self.job = job
        self.here = here = surroundings(job)
        self.population, self.task = here.population, here.task
        self.crew = Alone() if crew is None else crew
        self.crew.join(here)
        self.groups = group_classes(job.split.class_counts, setting.groups)
        self.own_statistics = setting.norm == "batch" and setting.statistics == "personal"
        self.evaluator = Evaluator(here, self.crew, partial(self.work, "adaptation"))
        if self.own_statistics:
            self.evaluator.wrap = with_own_statistics
        versions = " ".join(str(piece.version) for piece in algorithm.pieces)
        self.fingerprint = f"{algorithm!r} {versions} {setting!r} {job.seed} {job.split.fingerprint}"
        server = algorithm.init_server(self.task)
        initial = algorithm.init_client(self.task)
        if self.own_statistics:
            initial = {
                "own": initial,
                "statistics": tree.split(self._first_sent(server), is_norm_statistic)[0],
            }
        file = None if checkpoint is None else checkpoint.with_suffix(".states")
        self.store = store(initial, self.population.size, job.device, file)
        reset_peak_memory(job.device)
        self.progress = self._load() or Progress(0, server, cost={})
        if not self.progress.cost:
            self._spend("server_samples", float(self.task.samples()))
        self.saved = time.perf_counter()
        self.saving = 0.0

    def step(self) -> dict[str, float | None] | None:
        """Run the next round; give its metrics if it was evaluated."""
        r = self.progress.round
        started = time.perf_counter()
        task = self.task_at(r)
        self.population.prefetch(r, min(r + 1, self.setting.rounds - 1))
        finite = all([self.exchange(task, exchange) for exchange in self.algorithm.exchanges(task)])
        self._spend("server_samples", float(task.samples()))
        self._synchronise()
        self._spend("device_seconds", (time.perf_counter() - started) * self.crew.size)
        self._require_finite(finite and tree.is_finite(self.progress.server), f"after round {r + 1}")
        measured = None
        last = r + 1 == self.setting.rounds
        if last or (r + 1) % self.setting.eval_every == 0:
            measured = self.evaluate(task, r + 1, last)
        self.progress.round = r + 1
        self._spend("wall_seconds", time.perf_counter() - (self.started if r == 0 else started))
        self._save(last)
        return measured

    def outcome(self) -> Outcome:
        """Sum up a finished run."""
        rows = self.progress.rows
        final: dict[str, float | None] = {key: value for key, value in rows[-1].items() if key != "round"}
        for key in metrics.FOLLOWED:
            final[f"{key}@last10"] = metrics.last_mean(rows, key)
            final[f"{key}@best"] = metrics.best(rows, key)
        cost: dict[str, float | None] = {**dict.fromkeys(WORK, 0.0), **self.progress.cost}
        for key in self.progress.cost:
            if key.startswith(_RATE):
                del cost[key]
        if "pooled" in self.algorithm.needs:
            cost["bytes_down"] = cost["bytes_up"] = None  # nothing is sent: there is one place
        peak = peak_memory(self.device)
        cost["peak_memory_bytes"] = None if peak is None else peak + self.crew.peak_memory()
        cost["client_state_bytes"] = float(self.store.nbytes())
        digest = tree.digest([self.progress.server, *self.store.all()])
        counts, predictions = self.progress.counts, self.progress.predictions
        return Outcome(final, rows, counts, predictions, cost, digest, self._tested(), self.progress.models)

    def _tested(self) -> dict[str, int | list[int] | None]:
        """Say on what the personal metrics of the last evaluation rest."""
        population = self.population
        return population.tested(population.evaluated(range(population.training)), self.setting.rounds)

    # A round's parts ------------------------------------------------------------------------------

    def task_at(self, r: int) -> Task:
        """Give the task of a round, with its learning rate."""
        return self.task.at(r, self.setting.lr_at(r))

    def _first_sent(self, server: Tree) -> Tree:
        """Give all that a client is sent at first."""
        task = self.task_at(0)
        return {**self.algorithm.broadcast(task, server), **self.algorithm.send(task, server, None)}

    def exchange(self, task: Task, exchange: Exchange) -> bool:
        """Make one trip from the server to clients and back; tell whether the clients' states are finite."""
        server, store, population, algorithm = self.progress.server, self.store, self.population, self.algorithm
        pooled = "pooled" in algorithm.needs
        clients = (-1,) if pooled else self.cohort(task, exchange)
        knowing = replace(task, cohort=clients)  # only the server knows who takes part
        shared = algorithm.broadcast(knowing, server)
        if pooled:
            visits = [population.pooled_visit(task.round, store[-1])]
        else:
            sent = [algorithm.send(knowing, server, k) for k in clients]
            visits = [population.visit(k, task.round, store[k], own) for k, own in zip(clients, sent, strict=True)]
            self._spend("bytes_down", self._bytes_down(task, shared, clients, sent))
        verb: Verb = algorithm.client_verb(exchange.client)
        wrapped = with_own_statistics(verb) if self.own_statistics else verb
        results = self.work("train", exchange.client, wrapped, task, shared, visits)
        arrived, uploads = [], []
        finite = True
        for k, (upload, private) in zip(clients, results, strict=True):
            finite = finite and tree.is_finite(private)
            store[k] = private  # a client cannot know whether what it sent arrives
            if pooled or population.arrives(k, task.round):
                arrived.append(k)
                uploads.append(upload)
        self._spend("bytes_up", sum(algorithm.payload_bytes(task, upload) for upload in uploads))
        if uploads:
            ids = torch.tensor(arrived, device=population.device)
            sizes = population.sizes(arrived)
            alike = (sizes > 0).to(sizes.dtype) if self.setting.client_weights == "uniform" else None
            taken = Uploads(uploads, sizes, ids, alike)
            self.progress.server = self._serve(exchange, knowing, server, taken)
        return finite

    def work(self, purpose: str, name: str, verb: Verb, task: Task, shared: Tree, visits: Sequence[Visit]) -> list[Any]:
        """Run a verb for every visit, and count its samples and operations: those of its first time, a sample.

        Args:
            purpose: "train" or "adaptation": what it is counted as.
            name: Of the verb: what is done under another one takes other operations.
            verb: What to do.
            task: Of the round.
            shared: What every client is sent.
            visits: One for each client.
        """
        rate = f"{_RATE}{purpose} {name}"
        probe = engines.Probe() if rate not in self.progress.cost else None
        results, samples = visit_all(self.here, self.crew, verb, task, shared, visits, probe)
        self._spend(f"{purpose}_samples", samples)
        if probe is not None and probe.samples:
            self.progress.cost[rate] = probe.flops / probe.samples
        self._spend(f"{purpose}_flops", samples * self.progress.cost.get(rate, 0.0))
        return results

    def _serve(self, exchange: Exchange, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Let the server take uploads, and count its operations: those of the first time an exchange is made."""
        verb = partial(self.algorithm.server_verb(exchange.server), task, server, uploads)
        probed = f"{_RATE}{exchange}"
        if probed not in self.progress.cost:
            following, self.progress.cost[probed] = engines.counted(verb)
        else:
            following = verb()
        self._spend("server_flops", self.progress.cost[probed])
        return following

    def cohort(self, task: Task, exchange: Exchange) -> tuple[int, ...]:
        """Give the clients of a trip, ascending.

        Raises:
            BadCohort: An algorithm chose a client twice, or one that may not take part.
        """
        population = self.population
        if exchange.everyone:
            return tuple(range(population.training))
        drawn = population.cohort(task.round)
        if exchange.cohort is None:
            return drawn
        choose = getattr(self.algorithm.pieces[0], exchange.cohort)
        chosen = sorted(int(k) for k in choose(task, self.progress.server, drawn))
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(population.training)):
            allowed = f"wanted are different ones of 0..{population.training - 1}"
            raise BadCohort(f"{exchange.cohort} chose the clients {chosen}; {allowed}")
        return tuple(chosen)

    def _bytes_down(self, task: Task, shared: Tree, clients: Sequence[int], sent: Sequence[Tree]) -> int:
        """Count what a cohort is sent; what never changes only to those that take part for the first time."""
        algorithm, known = self.algorithm, set(self.store.clients())
        changing = {key: part for key, part in shared.items() if key not in algorithm.constant}
        constant = {key: part for key, part in shared.items() if key in algorithm.constant}
        first = len(set(clients) - known)
        down = len(clients) * algorithm.payload_bytes(task, changing)
        down += sum(algorithm.payload_bytes(task, own) for own in sent if own)
        return down + (first * algorithm.payload_bytes(task, constant) if constant else 0)

    def _visit_all_once_more(self, task: Task) -> None:
        """Have all training clients do their local work on the final broadcast, and keep their private states."""
        population, store, algorithm = self.population, self.store, self.algorithm
        shared, server = algorithm.broadcast(task, self.progress.server), self.progress.server
        verb: Verb = algorithm.client_verb("local_update")
        verb = with_own_statistics(verb) if self.own_statistics else verb
        everyone, then = range(population.training), self.setting.rounds
        for start in everyone[::_VISITED_AT_ONCE]:
            clients = everyone[start : start + _VISITED_AT_ONCE]
            sent = [algorithm.send(task, server, k) for k in clients]
            visits = [population.visit(k, then, store[k], own) for k, own in zip(clients, sent, strict=True)]
            self._spend("bytes_down", self._bytes_down(task, shared, clients, sent))
            results = self.work("adaptation", "local_update", verb, task, shared, visits)
            self._require_finite(all(tree.is_finite(private) for _, private in results), "in the final visit")
            for k, (_, private) in zip(clients, results, strict=True):
                store[k] = private

    def evaluate(self, task: Task, completed: int, last: bool) -> dict[str, float | None]:
        """Test all models, note counts and metrics, and give the metrics."""
        server, population = self.progress.server, self.population
        evaluator = self.evaluator
        keeper = evaluator.keeper = Keeper(self.models, self.job) if last and self.models is not None else None
        if last and self.setting.final_visit and "pooled" not in self.algorithm.needs:
            self._visit_all_once_more(task)
        if keeper is not None:
            keeper.put("server", server)
            keeper.put("clients/initial", self.store.initial)
        answers: Answers = {}
        tested: dict[str, Sequence[int]] = {"generic": (-1,)}
        if not self.own_statistics:  # a generic model would need statistics that nobody has
            answers |= evaluator.generic(task, server)
        if keeper is not None:
            keeper.close_server()
        for kind, clients in (
            ("personal", range(population.training)),
            ("unseen", range(population.training, population.size)),
        ):
            tested[kind] = population.evaluated(clients)
            if tested[kind]:
                answers |= evaluator.personal(task, server, self.store, tested[kind], last)
        evaluator.forget()
        if keeper is not None:
            self.progress.models = keeper.finish(self.store)
        by_then = population.drawn_by(completed)
        drawn = torch.tensor([k in by_then for k in tested["personal"]])
        counts = {name: right(told, task.num_classes) for name, told in answers.items()}
        measured = metrics.summarise(counts, self.groups, drawn)
        self.progress.rows.append({"round": completed, **measured})
        for name, (correct, total) in counts.items():
            k, c = torch.nonzero(total, as_tuple=True)
            kind = name.split(":")[0].split(".")[0]
            client = torch.tensor(tested[kind])[k]
            known = drawn[k].long() if kind == "personal" else torch.full_like(k, -1)
            rows = torch.stack([client, c, correct[k, c], total[k, c], known]).to(torch.int32)
            self.progress.counts.append(Tally(completed, name, rows))
            if last:
                k = torch.repeat_interleave(torch.tensor([told.shape[1] for told in answers[name]]))
                known = drawn[k].long() if kind == "personal" else torch.full_like(k, -1)
                rows = torch.cat([torch.tensor(tested[kind])[k][None], torch.cat(answers[name], 1), known[None]])
                self.progress.predictions.append(Tally(completed, name, rows.to(torch.int32)))
        return measured

    def _require_finite(self, finite: bool, when: str) -> None:
        if not finite:
            raise Diverged(f"diverged: {when} a state is no longer finite; a smaller lr may help")

    def _spend(self, what: str, amount: float) -> None:
        self.progress.cost[what] = self.progress.cost.get(what, 0.0) + amount

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.device == "mps":
            torch.mps.synchronize()

    # Checkpoints ----------------------------------------------------------------------------------

    def _save(self, last: bool) -> None:
        """Save what a later process needs, unless the last save is so recent that saving would cost over 5 %
        of the time.
        """
        if self.checkpoint is None or not (last or self._is_due()):
            return
        started = time.perf_counter()
        partial = self.checkpoint.with_suffix(".partial")
        tallies = {key: [vars(tally) for tally in getattr(self.progress, key)] for key in _TALLIED}
        saved = {"fingerprint": self.fingerprint, **vars(self.progress), **tallies}
        saved["store"] = self.store.snapshot()
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, partial)
            os.replace(partial, self.checkpoint)
        except (OSError, RuntimeError) as error:  # the latter is what torch says of a full disk
            with suppress(OSError):
                partial.unlink()
            raise StatesUnwritable(f"{self.checkpoint} cannot be written ({error}); free some space there") from error
        self.store.release()
        self.saved = time.perf_counter()
        self.saving = self.saved - started

    def _is_due(self) -> bool:
        return time.perf_counter() - self.saved >= 1.0 + 20 * self.saving

    def _load(self) -> Progress | None:
        """Give what a checkpoint holds; None where there is none, it is another run's, or it cannot be read."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        try:
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError):
            return None  # half a file is no file: the run starts anew
        if saved["round"] == self.setting.rounds and not saved.get("predictions"):
            return None  # an earlier version's, which has not noted what its last evaluation took images for
        if saved.pop("fingerprint") != self.fingerprint or self._lacks_models(saved):
            return None
        if not self.store.restore(saved.pop("store")):
            return None
        for key in _TALLIED:
            saved[key] = [Tally(**{**tally, "rows": tally["rows"].cpu()}) for tally in saved.get(key, [])]
        return Progress(**saved)

    def _lacks_models(self, saved: dict[str, Any]) -> bool:
        """Tell whether models are wanted of a run that is over, and were not kept: they are those of its last test."""
        over = saved["round"] == self.setting.rounds
        return over and self.models is not None and not holds(self.models, saved.get("models", {}))
