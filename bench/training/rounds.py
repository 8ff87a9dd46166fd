"""One run: the round loop, its checkpoints and its accounts. It knows phases, trees and clients, and no
algorithm by name.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import tree
from bench.algorithm import Exchange
from bench.data import Uploads
from bench.models.balanced import at_rest
from bench.models.layers import is_norm_statistic
from bench.splits.split import group_classes
from bench.system import durable
from bench.task import Task
from bench.training import checkpoint as checkpoints
from bench.training import engine as engines
from bench.training import metrics, open_set
from bench.training.counting import Answers, right
from bench.training.crew import Alone, Crew, visit_all
from bench.training.evaluation import Evaluator
from bench.training.footprint import footprint
from bench.training.job import Job, surroundings
from bench.training.keeping import Keeper, holds
from bench.training.memory import peak_memory, reset_peak_memory
from bench.training.outcome import Outcome, Progress, Report, Tally
from bench.training.states import StatesDamaged, StatesUnwritable, store
from bench.training.statistics import taken_up, with_own_statistics
from bench.training.visit import Verb, Visit
from bench.tree import Tree

WORK = tuple(f"{whose}_{what}" for what in ("samples", "flops") for whose in ("train", "adaptation", "server"))
"""Costs of computing: in training, in making the tested models of trained states, and at the server."""
CLIENT_ROUNDS = "client_rounds"
"""How often clients took part in rounds, all together; a final visit is a round."""
_RATE = "flops of "
"""Begins the operations a sample, or of one time at the server, among what a checkpoint knows of costs."""

_SENT = "bytes by round "
"""Begins what was sent by an evaluation, up and down together, among them."""

_TALLIED = ("counts", "predictions")
"""Of what a checkpoint holds."""

_VISITED_AT_ONCE = 128
"""Clients of a final visit whose states are in memory together."""


class Diverged(ArithmeticError):
    """A model is no longer finite; the message says whose and when."""


class BadCohort(ValueError):
    """An algorithm chose clients that there are not; the message says which."""


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
        checkpoint: File to save to after rounds, and to continue from if it is there and nothing in it, nor in the
            file of states beside it, is in doubt.
        report: Called after each round, and before the first if it is not continued from a checkpoint that is there.
        crew: Processes that share the clients of a round and the tests; None: this one does it all, with the same bits.
        models: Folder that the final states and the models of the last evaluation are written to; None: nowhere.

    Raises:
        Diverged: A state is no longer finite.
        StatesUnwritable: A file of states or models cannot be written, or gives back other states than this very
            process has written.
    """
    run = Run(job, checkpoint, crew, models)
    try:
        return _go(run, report)
    except StatesDamaged:
        if not run.resumed:
            raise
    del run  # its states take memory
    assert checkpoint is not None
    durable.remove(checkpoint)
    run = Run(job, checkpoint, crew, models)
    run.anew = checkpoints.DAMAGED
    return _go(run, report)


def _go(run: Run, report: Callable[[Report], None] | None) -> Outcome:
    """Do the rounds that are left."""
    tell = report if report is not None else lambda news: None
    rounds = run.setting.rounds
    if run.anew is not None:
        tell(Report(0, rounds, 0.0, None, run.anew))
    while run.progress.round < rounds:
        measured = run.step()
        tell(Report(run.progress.round, rounds, run.progress.cost["wall_seconds"], measured))
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
        self.groups = group_classes(job.split.class_counts, setting.groups, job.split.open)
        self.own_statistics = setting.norm == "batch" and setting.statistics == "personal"
        # Weakly: in a circle, the images of a run that is over would stay until the collector comes, many runs later.
        self.evaluator = Evaluator(here, self.crew, partial(Run.work, weakref.proxy(self), "adaptation"))
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
        self.anew: str | None = None
        """As `Report` has it."""
        loaded = self._load(server)
        self.resumed = loaded is not None
        self.progress = loaded or Progress(0, server)
        if not self.resumed:
            self._spend("server_samples", float(self.task.samples()))
            if here.told is not None:
                self._spend("bytes_up", here.told.nbytes)
                self._spend("train_flops", here.told.flops)
        self.saved = time.perf_counter()
        self.saving = 0.0
        self.present: set[int] = set()
        """Clients of the round under way, whichever trip they are on."""

    def step(self) -> dict[str, float | None] | None:
        """Run the next round; give its metrics if it was evaluated."""
        r = self.progress.round
        started = time.perf_counter()
        task = self.task_at(r)
        self.population.prefetch(r, min(r + 1, self.setting.rounds - 1))
        self.present.clear()
        before, balanced = self.progress.server, self.task.model.balanced
        finite = all([self.exchange(task, exchange) for exchange in self.algorithm.exchanges(task)])
        if balanced is not None:
            self.progress.server = taken_up(balanced, before, self.progress.server, r)
        self._spend(CLIENT_ROUNDS, len(self.present))
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
        if self.setting.open_classes:
            final |= open_set.measured(self.progress.open_set)
        cost: dict[str, float | None] = {**dict.fromkeys((*WORK, CLIENT_ROUNDS), 0.0), **self.progress.cost}
        for key in self.progress.cost:
            if key.startswith((_RATE, _SENT)):
                del cost[key]
        sent = {key.removeprefix(_SENT): value for key, value in self.progress.cost.items() if key.startswith(_SENT)}
        if "pooled" in self.algorithm.needs:
            cost |= dict.fromkeys(("bytes_down", "bytes_up", CLIENT_ROUNDS))  # nothing is sent: there is one place
        peak = peak_memory(self.device)
        cost["peak_memory_bytes"] = None if peak is None else peak + self.crew.peak_memory()
        cost["client_state_bytes"] = float(self.store.nbytes())
        cost |= footprint(self.task.model).costs
        digest = tree.digest([self.progress.server, *self.store.all()])
        counts, predictions = self.progress.counts, self.progress.predictions
        sent = {} if "pooled" in self.algorithm.needs else sent
        told = {str(client): line for client, line in sorted(self.progress.open_set.items())}
        return Outcome(final, rows, counts, predictions, cost, digest, self._tested(), self.progress.models, sent, told)

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
        shared, sent = algorithm.sends(exchange, knowing, server, () if pooled else clients)
        if pooled:
            visits = [population.pooled_visit(task.round, store[-1])]
        else:
            visits = [population.visit(k, task.round, store[k], own) for k, own in zip(clients, sent, strict=True)]
            self._spend("bytes_down", self._bytes_down(task, shared, clients, sent))
            self.present.update(clients)
        verb: Verb = algorithm.client_verb(exchange.client)
        wrapped = with_own_statistics(verb) if self.own_statistics else verb
        name = f"{exchange.client} {exchange.phase}" if exchange.phase else exchange.client
        results = self.work("train", name, wrapped, task, shared, visits)
        arrived, uploads = [], []
        for k, (upload, private) in zip(clients, results, strict=True):
            if not exchange.aside:
                store[k] = self._rested(private)  # a client cannot know whether what it sent arrives
            if pooled or population.arrives(k, task.round):
                arrived.append(k)
                uploads.append(upload)
        self._spend("bytes_up", sum(algorithm.payload_bytes(task, upload) for upload in uploads))
        if uploads:
            ids = tree.bring(torch.tensor(arrived), population.device)
            sizes = population.sizes(arrived)
            alike = (sizes > 0).to(sizes.dtype) if self.setting.client_weights == "uniform" else None
            taken = Uploads(uploads, sizes, ids, alike)
            self.progress.server = self._rested(self._serve(exchange, knowing, server, taken))
        return tree.is_finite(*(private for _, private in results))

    def work(self, purpose: str, name: str, verb: Verb, task: Task, shared: Tree, visits: Sequence[Visit]) -> list[Any]:
        """Run a verb for every visit, and count its samples and operations: those of its first time, a sample.

        Args:
            purpose: "train" or "adaptation": what it is counted as.
            name: Of the verb and its phase: what is done under another one takes other operations.
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
        self._spend(CLIENT_ROUNDS, len(everyone))
        for start in everyone[::_VISITED_AT_ONCE]:
            clients = everyone[start : start + _VISITED_AT_ONCE]
            sent = [algorithm.send(task, server, k) for k in clients]
            visits = [population.visit(k, then, store[k], own) for k, own in zip(clients, sent, strict=True)]
            self._spend("bytes_down", self._bytes_down(task, shared, clients, sent))
            results = self.work("adaptation", "local_update", verb, task, shared, visits)
            self._require_finite(tree.is_finite(*(private for _, private in results)), "in the final visit")
            for k, (_, private) in zip(clients, results, strict=True):
                store[k] = self._rested(private)

    def evaluate(self, task: Task, completed: int, last: bool) -> dict[str, float | None]:
        """Test all models, note counts and metrics, and give the metrics."""
        server, population = self.progress.server, self.population
        evaluator = self.evaluator
        keeper = evaluator.keeper = Keeper(self.models, self.job) if last and self.models is not None else None
        if last and self.setting.final_visit and "pooled" not in self.algorithm.needs:
            self._visit_all_once_more(task)
        sent = sum(self.progress.cost.get(f"bytes_{way}", 0.0) for way in ("down", "up"))
        self.progress.cost[f"{_SENT}{completed}"] = sent
        if keeper is not None:
            keeper.put("server", server)
            keeper.put("clients/initial", self.store.initial)
        answers: Answers = {}
        tested: dict[str, Sequence[int]] = {"generic": (-1,)}
        if not self.own_statistics:  # a generic model would need statistics that nobody has
            answers |= evaluator.generic(task, server, last)
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
        self.progress.open_set = evaluator.open_set
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

    def _rested(self, state: Tree) -> Tree:
        """Give a state as it is between visits: where norm layers count steps, none are counted."""
        return state if self.task.model.balanced is None else at_rest(state)

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
        tallies = {key: [vars(tally) for tally in getattr(self.progress, key)] for key in _TALLIED}
        saved = {"fingerprint": self.fingerprint, **vars(self.progress), **tallies}
        saved["store"] = self.store.snapshot()
        try:
            checkpoints.save(self.checkpoint, saved)
        except (OSError, RuntimeError) as error:  # the latter is what torch says of a full disk
            raise StatesUnwritable(f"{self.checkpoint} cannot be written ({error}); free some space there") from error
        self.store.release()
        self.saved = time.perf_counter()
        self.saving = self.saved - started

    def _is_due(self) -> bool:
        return time.perf_counter() - self.saved >= 1.0 + 20 * self.saving

    def _load(self, server: Tree) -> Progress | None:
        """Give what a checkpoint holds; None where there is none, or none to go on from, which `anew` then says.

        Args:
            server: The state to begin with, whose form the later ones have.
        """
        if self.checkpoint is None:
            return None
        durable.tidy(self.checkpoint)
        if not os.path.lexists(self.checkpoint):
            return None
        try:
            return self._taken_up(checkpoints.load(self.checkpoint, self.device), server)
        except checkpoints.Unfit as error:
            self.anew = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a damaged file can make of torch, or of what looks into it
            self.anew = checkpoints.DAMAGED
        durable.remove(self.checkpoint)  # states of the run that begins now are written over those that it knows
        return None

    def _taken_up(self, saved: dict[str, Any], server: Tree) -> Progress:
        """Make of what a checkpoint held what a run goes on with; any error means that it is none of ours.

        Raises:
            Unfit: It is of another run, lacks what this one needs, or is not what a run leaves.
        """
        require, setting = checkpoints.require, self.setting
        if saved.pop("fingerprint") != self.fingerprint:
            raise checkpoints.Unfit("is of another run")
        stored, completed = saved.pop("store"), saved["round"]
        require(saved.keys() == {each.name for each in fields(Progress)})
        require(0 < completed <= setting.rounds)
        over = completed == setting.rounds
        tested = [r for r in range(1, completed + 1) if r % setting.eval_every == 0 or r == setting.rounds]
        require([row["round"] for row in saved["rows"]] == tested)
        require(checkpoints.is_like(saved["server"], server) and checkpoints.are_numbers(saved["cost"]))
        if over and self.models is not None and not holds(self.models, saved["models"]):
            raise checkpoints.Unfit("lacks the models of its last test")  # they are not to be had without training
        for key, times in (("counts", tested), ("predictions", [setting.rounds] if over else [])):
            tallies = [Tally(**{**tally, "rows": tally["rows"].cpu()}) for tally in saved[key]]
            require({tally.round for tally in tallies} <= set(times))
            require(all(t.rows.dtype == torch.int32 and t.rows.dim() == 2 and len(t.rows) == 5 for t in tallies))
            saved[key] = tallies
        require(all(type(client) is int and open_set.is_line(line) for client, line in saved["open_set"].items()))
        require(self.store.restore(stored))
        return Progress(**saved)
