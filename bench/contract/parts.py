"""What every part promises: alone, and on a method of the contract's own that carries it through the toy problem."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from bench import keys, tree
from bench.contract import checks, extremes, sayings, toy
from bench.contract.promises import Finding, findings, require
from bench.data import Batch
from bench.part import Aggregation, Channel, Correction, LearnedCorrection, Loss, Part, UsesPrior
from bench.plugins import ledger
from bench.plugins.registry import ALGORITHMS, PARTS
from bench.protocol import composed
from bench.protocol.composed import Composed
from bench.protocol.composition import compose, is_neutral
from bench.protocol.spelling import parse_algorithms
from bench.training import engine as engines
from bench.training.rounds import Run
from bench.tree import Tree


def check(part: type[Part]) -> Iterator[Finding]:
    """Run every check of a part's contract, one after the other."""
    return findings(part, PROMISES)


def hosted(part: Part, host: toy.Host = toy.Host()) -> partial[Composed]:  # noqa: B008 - a value
    """Give what is called like an algorithm's class: the host with the part."""
    return partial(Composed, host, (part,))


def carried(promise: Callable[[Callable[[], Composed]], None]) -> Callable[[type[Part]], None]:
    """Make a promise of algorithms one of parts."""
    return lambda part: promise(hosted(part()))


# What it says of itself -------------------------------------------------------------------------------------


def name_is_file_name(part: type[Part]) -> None:
    """The registered name is the name of the file."""
    stem = Path(inspect.getfile(part)).stem
    names = [name for name in PARTS if PARTS[name] is part]
    require(names == [stem], f"registered as {names}, but the file is {stem}.py")


def docstring_says_it(part: type[Part]) -> None:
    """The module's docstring says which kind it is, what the server learns, and where it departs from its source."""
    said = ledger.sections(inspect.getdoc(sys.modules[part.__module__]) or "")
    missing = [title for title in ("Kind", "Learns", "Departs") if title not in said]
    require(not missing, f"the module's docstring has no line {', '.join(missing)}")
    require(said["Kind"] == part.kind, f"the docstring says {said['Kind']}, and it is of the kind {part.kind}")
    kept = part().tier != "S" or said["Learns"].startswith("nothing") or issubclass(part, Channel)
    require(kept, f"the server learns {said['Learns']}, and the tier is S")


def aliases_are_rows(part: type[Part]) -> None:
    """What it says stands for a row with it is no algorithm's name, and stands for one row with it."""
    for alias, row in part.aliases.items():
        name = alias.partition("(")[0]
        require(name not in ALGORITHMS, f"aliases: {name} is an algorithm")
        found = parse_algorithms(row)
        require(len(found) == 1 and part in map(type, found[0].pieces), f"aliases: {row} is not one row with it")


def changes_what_it_says(part: type[Part]) -> None:
    """A loss, a rule and a channel change what is trained or sent, a correction only what is tested."""
    require(not is_neutral(part()), f"its defaults are those at which it changes nothing: {dict(part.neutral)}")
    different = []
    for host in (toy.Host(), toy.Host(scale=0.5)):  # cross-entropy is a change where the loss is another one
        plain, mine = (_run(algorithm) for algorithm in (host, hosted(part(), host)()))
        apart = plain.outcome().digest != mine.outcome().digest
        if issubclass(part, Correction):
            moved = tree.largest_difference(_trained(plain), _trained(mine))
            require(moved == 0, "a correction changes what is trained")
            apart = any(
                tree.largest_difference(was, {**was, **now}) > 0
                for was, now in zip(*_corrected(mine, "serial"), strict=True)
            )
        different.append(apart or plain.progress.cost["bytes_up"] != mine.progress.cost["bytes_up"])
    require(any(different), "nothing differs from the method without it")


def _trained(run: Run) -> Tree:
    """Give all states of a run but what its corrections have learnt."""
    states = toy.states(run)
    return {**states, "server": {key: value for key, value in states["server"].items() if key != composed.PARTS}}


def neutral_is_off(part: type[Part]) -> None:
    """At its neutral values it is left out of the row, and would change nothing if it were not."""
    if not part.neutral:
        return
    off = part(**part.neutral)
    require(compose(toy.Host(), [off]) == toy.Host(), "at its neutral values it is not left out")
    plain, mine = (_run(algorithm) for algorithm in (toy.Host(), hosted(off)()))
    pairs = [(plain.progress.server, mine.progress.server)]
    if issubclass(part, Correction):
        pairs += [(was, {**was, **now}) for was, now in zip(*_corrected(mine, "serial"), strict=True)]
    apart = max(tree.largest_difference(a, {key: b[key] for key in a}) for a, b in pairs)
    require(apart <= engines.TOLERANCE, f"at its neutral values a model changes by {apart:.1e}")


def numbers_are_bounded(part: type[Part]) -> None:
    """No field takes a number out of any sense, or does harm with one."""
    extremes.numbers_are_bounded(part, lambda made: extremes.run_a_round(hosted(made)()))


def every_prior_works(part: type[Part]) -> None:
    """Whosever class counts it is given, the engines agree, and the tier says what the server learns."""
    if not issubclass(part, UsesPrior):
        return
    for prior in get_args(get_type_hints(UsesPrior)["prior"]):
        made = part(prior=prior)
        checks.engines_agree(hosted(made))
        learns = prior in ("global", "estimated")
        require(made.tier == ("L" if learns else "S"), f"with prior {prior} its tier is {made.tier}")
        if isinstance(made, Correction):
            _corrected(_run(hosted(made)()), "serial")


# Losses -----------------------------------------------------------------------------------------------------


def loss_is_a_mean(part: type[Part]) -> None:
    """Padding weighs nothing in value and gradient; the result is () float32, also of bfloat16."""
    if not issubclass(part, Loss):
        return
    whole, slope = _loss(part(), rows=8, padding=3)
    alone, cut = _loss(part(), rows=5, padding=0)
    apart = max(float((whole - alone).abs()), float((slope[:5] - cut).abs().max()), float(slope[5:].abs().max()))
    require(apart < 1e-6, f"padding changes the loss or its gradient by {apart:.1e}")
    rough, _ = _loss(part(), rows=5, padding=0, dtype=torch.bfloat16)
    require(rough.shape == () and rough.dtype == torch.float32, f"it gives {tuple(rough.shape)} {rough.dtype}")
    fine, _ = _loss(part(), rows=5, padding=0, rounded=True)
    require(torch.equal(rough, fine), "bfloat16 logits are not taken to float32 first")


def loss_is_finite(part: type[Part]) -> None:
    """One class, absent classes and no example at all leave value and gradient finite."""
    if not issubclass(part, Loss):
        return
    for what, counts, padding in (
        ("of one class", [9, 0, 0, 0, 0, 0], 0),
        ("with absent classes", [5, 0, 3, 0, 1, 0], 0),
        ("without examples", [0] * 6, 5),
        ("with sure logits", [1] * 6, 0),
    ):
        scale = 200.0 if what == "with sure logits" else 1.0
        value, slope = _loss(part(), 5, padding, counts=torch.tensor(counts), scale=scale)
        require(bool(value.isfinite() and slope.isfinite().all()), f"a client {what} makes the loss {float(value)}")


def _loss(
    part: Loss,
    rows: int,
    padding: int,
    dtype: torch.dtype = torch.float32,
    rounded: bool = False,
    counts: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Give the loss of made-up logits, the first of which is right, and its gradient (rows, 6)."""
    task, key = toy.run(toy.Host()).task, keys.key(5)
    counts = torch.tensor([5, 4, 3, 2, 1, 1]) if counts is None else counts
    present = counts.nonzero().flatten().tolist() or [0]
    y = torch.tensor([present[k % len(present)] for k in range(rows)])
    logits = scale * (keys.normal(key, 8, 6)[:rows] + 9 * torch.eye(6)[y] * (torch.arange(rows) == 0)[:, None])
    logits = (logits.bfloat16().float() if rounded else logits.to(dtype)).requires_grad_()
    features = keys.normal(keys.fold(key, "z"), 8, task.model.feature_size)[:rows]
    batch = Batch(torch.zeros(rows, 1, 8, 8), y, (torch.arange(rows) < rows - padding).float())
    value = part.loss(task, logits, features, batch, counts.float())
    (slope,) = torch.autograd.grad(value, logits)
    return value.detach(), slope


# Corrections ------------------------------------------------------------------------------------------------


def correction_keeps_shapes(part: type[Part]) -> None:
    """It gives keys that it reads, in their shapes, finite, for every client and the server, in both engines alike."""
    if not issubclass(part, Correction):
        return
    run = toy.run(hosted(part())())
    trained, corrected = _corrected(run, "serial")
    for was, now in zip(trained, corrected, strict=True):
        read = {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten(was).items()}
        found = {path: (leaf.shape, leaf.dtype) for path, leaf in tree.flatten({**was, **now}).items()}
        require(found == read, f"a model of {sorted(read)} becomes one of {sorted(found)}, or in other shapes")
        require(tree.is_finite(now), "a corrected model is not finite")
    if run.algorithm.stackable:
        _, stacked = _corrected(run, "stacked")
        apart = max(tree.largest_difference(a, b) for a, b in zip(corrected, stacked, strict=True))
        require(apart <= engines.TOLERANCE, f"corrected models of the two engines differ by {apart:.1e}")


def epilogue_stands_aside(part: type[Part]) -> None:
    """A correction that learns asks each training client once, when all rounds are over, and clients keep nothing
    of it. Before it no generic model is corrected, after it its head alone.
    """
    if not issubclass(part, LearnedCorrection):
        return
    run = toy.run(hosted(part())(), setting=replace(toy.SETTING, rounds=2))
    algorithm, population = run.algorithm, run.population
    for round in range(2):
        task, server = run.task_at(round), run.progress.server
        model = algorithm.global_model(task, server)
        assert model is not None
        changed = algorithm.corrected(task, server, model, None)
        require(changed is None, f"the generic model is corrected after {round} of 2 rounds")
        asked = [exchange for exchange in algorithm.exchanges(task) if exchange.aside]
        require(len(asked) == round, f"in round {round + 1} of 2 there are {len(asked)} epilogues")
        run.step()
    model = algorithm.global_model(task, run.progress.server) or {}
    changed = algorithm.corrected(task, run.progress.server, model, None)
    found = ", ".join(sorted(changed or {})) or "nothing"
    require(found == "head", f"{found} of the generic model is corrected, and the head should be")
    drawn = sorted({k for round in range(2) for k in population.cohort(round)})
    require(run.store.clients() == drawn, "clients that no cohort drew keep something of the epilogue")


def _corrected(run: Run, engine: str) -> tuple[list[Tree], list[Tree]]:
    """Give what is read of the trained model of the server and of each client, and what becomes of it."""
    task, server = run.task_at(0), run.progress.server
    shared = run.algorithm.broadcast(task, server)
    model = {key: server[key] for key in run.algorithm.corrects}
    before = tree.clone(model)
    visits = [replace(run.population.visit(k, 0, {}), private=model) for k in range(run.population.size)]
    changed, _ = engines.BY_NAME[engine](run.algorithm.corrected, task, shared, run.population.images, visits)
    changed = [run.algorithm.corrected(task, server, model, None), *changed]
    require(tree.largest_difference(before, model) == 0, "a model is changed in place")
    return [model] * len(changed), [each or {} for each in changed]


# Rules ------------------------------------------------------------------------------------------------------


def rule_combines(part: type[Part]) -> None:
    """What all send is the result, one update too; the order of clients says nothing; nothing is changed in place."""
    if not issubclass(part, Aggregation):
        return
    rule, task = part(), toy.run(toy.Host()).task
    updates = [_update(f"{k}") for k in range(7)]
    weights = torch.arange(1, 8).double() / 28
    before = tree.clone({f"{k}": each for k, each in enumerate(updates)})
    forward, backward = rule.combine(task, updates, weights), rule.combine(task, updates[::-1], weights.flip(0))
    same = [
        ("seven equal updates", rule.combine(task, [updates[0]] * 7, weights), updates[0]),
        ("a single update", rule.combine(task, updates[:1], weights[:1] / weights[0]), updates[0]),
    ]
    for what, found, wanted in (
        *([] if rule.noisy else same),
        ("updates in another order", backward, forward),
        ("updates, afterwards,", {f"{k}": each for k, each in enumerate(updates)}, before),
    ):
        apart = tree.largest_difference(found, wanted)
        require(apart < 1e-5, f"{what}: the result is {apart:.1e} away from what it should be")
    require({leaf.dtype for leaf in tree.flatten(forward).values()} == {torch.float32}, "the dtype is another one")


def _update(name: str, parts: tuple[str, ...] = ("body", "head")) -> Tree:
    """Make up an update, of the shapes of the toy's model."""
    key, model = keys.key(11), tree.parameters(toy.run(toy.Host()).task.init())
    leaves = tree.flatten({part: model[part] for part in parts}).items()
    return tree.unflatten({path: 0.01 * keys.normal(keys.fold(key, name, path), *leaf.shape) for path, leaf in leaves})


# Channels ---------------------------------------------------------------------------------------------------


def channel_carries(part: type[Part]) -> None:
    """What arrives has the update's shapes, and was no larger on its way; a client that keeps an update keeps what has
    not arrived.
    """
    if not issubclass(part, Channel):
        return
    channel, task = part(), toy.run(toy.Host()).task
    for parts in (("body", "head"), ("body",)):  # the latter of a method that sends no head back
        kept = channel.init(task, _update("first"))
        total = arrived = tree.zeros_like(_update("first", parts))
        for r in range(4):
            update = _update(f"{r}", parts)
            sent, after = channel.send(task, update, kept, keys.fold(keys.key(0), r))
            decoded = channel.receive(task, sent, tree.zeros_like(update))
            require(
                tree.largest_difference(decoded, channel.receive(task, sent, update)) == 0,
                "what arrives depends on the values of `like`",
            )
            require(tree.nbytes(sent) <= tree.nbytes(update), f"{tree.nbytes(update)} bytes become {tree.nbytes(sent)}")
            total, arrived, kept = tree.add(total, update), tree.add(arrived, decoded), tree.merge(kept, after)
        if tree.flatten(total).keys() <= tree.flatten(kept).keys():
            apart = tree.largest_difference(total, tree.map(torch.add, arrived, kept))
            require(apart < 1e-5, f"what arrived and what is kept differ from what was sent by {apart:.1e}")


def _run(algorithm: Any) -> Run:
    return toy.finish(toy.run(algorithm, setting=replace(toy.SETTING, rounds=2, participation=1.0)))


PROMISES: Mapping[str, Callable[[type[Part]], None]] = {
    "the name is the file's name": name_is_file_name,
    "defaults construct, frozen, repr evaluates back": sayings.defaults_construct,
    "the docstring says kind, what the server learns, departures": docstring_says_it,
    "its aliases are rows with it": aliases_are_rows,
    "later fields have their defaults": sayings.later_fields_have_defaults,
    "it changes what it says": changes_what_it_says,
    "off is off": neutral_is_off,
    "every prior works": every_prior_works,
    "a loss is a mean over real examples, in float32": loss_is_a_mean,
    "a loss is finite": loss_is_finite,
    "a correction keeps shapes": correction_keeps_shapes,
    "what a correction learns stands aside": epilogue_stands_aside,
    "a rule gives what is agreed": rule_combines,
    "a channel carries": channel_carries,
    "inputs are left alone": carried(checks.inputs_are_left_alone),
    "states keep keys, shapes and dtypes": carried(checks.states_keep_shape),
    "engines agree": carried(checks.engines_agree),
    "the seed decides, and nothing else": carried(checks.seed_decides),
    "the order of clients is irrelevant": carried(checks.client_order_is_irrelevant),
    "small and empty clients are harmless": carried(checks.small_clients_are_harmless),
    "pickles by reference": carried(checks.pickles_small),
    "stop and resume equals one go": carried(checks.resumes),
    "evaluation is pure": carried(checks.evaluation_is_pure),
    "test data stay out of training": carried(checks.test_data_stay_out),
    "learns the toy problem": carried(checks.learns),
    "numbers out of any sense are refused, or do no harm": numbers_are_bounded,
}
