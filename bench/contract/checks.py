"""The contract: what every algorithm and dataset promises, each promise a function, for built-in and third-party ones
alike. What datasets and parts promise, and what an algorithm says of itself, is in files beside this one.

`bench check NAME` and the test suite run them on a toy problem: eight clients with 0 to 60 examples of six
classes, a small dense model, seconds on a CPU.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import tree
from bench.algorithm import Adaptation, Algorithm, is_usual, method_of, stages
from bench.contract import accounts, datasets, extremes, probes, sayings, toy
from bench.contract.promises import Finding, findings, require
from bench.contract.toy import tested_models as tested_models
from bench.data import Uploads
from bench.dataset import Dataset
from bench.protocol.composition import refusal
from bench.training import engine as engines


def check(plugin: type[Algorithm] | type[Dataset]) -> Iterator[Finding]:
    """Run every check of an algorithm's or a dataset's contract, one after the other."""
    promises: Mapping[str, Callable[[Any], None]] = (
        ALGORITHM_PROMISES if issubclass(plugin, Algorithm) else datasets.PROMISES
    )
    return findings(plugin, promises)


# Promises of an algorithm -------------------------------------------------------------------------


def inputs_are_left_alone(plugin: Callable[[], Algorithm]) -> None:
    """Nothing that is passed in is changed in place."""
    run = toy.run(plugin(), setting=toy.SHORT)
    for task, exchange in toy.trips(run):
        server, private = run.progress.server, run.store[0]
        before = tree.clone({"server": server, "private": private})
        upload, _ = toy.upload_once(run, 0, task, exchange)
        sent = tree.clone(upload)
        verb = run.algorithm.server_verb(exchange.server)
        verb(task, server, Uploads([upload, upload], torch.ones(2, dtype=torch.float64)))
        run.algorithm.global_model(task, server)
        run.evaluate(task, 1, True)
        require(
            tree.largest_difference(before, {"server": server, "private": private}) == 0,
            "server or private state was changed in place",
        )
        require(tree.largest_difference(sent, upload) == 0, "the upload was changed in place by the server")


def states_keep_shape(plugin: Callable[[], Algorithm]) -> None:
    """Server and private states keep their keys, shapes and dtypes from round to round."""
    run = toy.run(plugin())
    first = {"server": run.progress.server, "private": run.store.initial}
    run.step()
    run.step()
    client = run.store.clients()[0]
    second = {"server": run.progress.server, "private": run.store[client]}
    a, b = tree.flatten(first), tree.flatten(second)
    require(a.keys() == b.keys(), f"keys changed: {sorted(a.keys() ^ b.keys())}")
    for path, leaf in a.items():
        now = b[path]
        require(
            (leaf.shape, leaf.dtype) == (now.shape, now.dtype),
            f"{path} was {tuple(leaf.shape)} {leaf.dtype}, is {tuple(now.shape)} {now.dtype}",
        )


def models_fit(plugin: Callable[[], Algorithm]) -> None:
    """Global and personal models are absent, or hold a body and a head of the architecture (unless `predict` is
    overridden); what stands beside them is for the loss of a stage.
    """
    run = toy.run(plugin())
    run.step()
    if not is_usual(run.algorithm.pieces[0].predict, Algorithm.predict):
        return
    task = run.task_at(0)
    wanted = {path: leaf.shape for path, leaf in tree.flatten(task.init()).items()}
    visit, shared = run.population.visit(0, 0, run.store[0]), toy.received(run, 0)
    personal, _ = engines.serial(run.algorithm.personal_model, task, shared, run.population.images, [visit])
    models = {"global": run.algorithm.global_model(task, run.progress.server), "personal": personal[0]}
    models |= {
        f"global {name}": model
        for name, model in run.algorithm.global_variants(task, run.progress.server).items()
        if name not in run.algorithm.predictors
    }
    require(any(model is not None for model in models.values()), "there is neither a global nor a personal model")
    for name, model in models.items():
        if model is not None:
            both = {key: model[key] for key in ("body", "head") if key in model}
            found = {path: leaf.shape for path, leaf in tree.flatten(both).items()}
            require(found == wanted, f"the {name} model has {sorted(found)}, the architecture {sorted(wanted)}")


def engines_agree(plugin: Callable[[], Algorithm]) -> None:
    """Serial and stacked engines give the same states, unequal and empty clients included."""
    if not plugin().stackable:
        return
    setting = replace(toy.SETTING, rounds=1, participation=1.0, weight_decay=1e-3, clip=5.0)
    one, other = (
        toy.finish(toy.run(plugin(), "serial", setting=setting)),
        toy.finish(toy.run(plugin(), "stacked", setting=setting)),
    )
    apart = tree.largest_difference(toy.states(one), toy.states(other))
    require(apart <= engines.TOLERANCE, f"states of the serial and the stacked engine differ by {apart:.1e}")


def mixed_precision_works(plugin: Callable[[], Algorithm]) -> None:
    """With `--precision bf16` states stay float32 and finite, in both engines."""
    for engine in ("serial", "stacked"):
        run = toy.finish(toy.run(plugin(), engine, setting=replace(toy.SETTING, rounds=1), precision="bf16"))
        states = toy.states(run)
        require(tree.is_finite(states), f"bf16 ({engine}) ends in a state that is not finite")
        half = [path for path, leaf in tree.flatten(states).items() if leaf.dtype == torch.bfloat16]
        require(not half, f"bf16 ({engine}) leaves {', '.join(half[:3])} in half precision")


def seed_decides(plugin: Callable[[], Algorithm]) -> None:
    """The same seed gives the same bits, another seed others; torch's global generator has no say."""
    digests = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        state = torch.random.get_rng_state()
        torch.random.set_rng_state(torch.Generator().manual_seed(noise).get_state())
        digests.append(
            toy.finish(toy.run(plugin(), seed=seed, setting=replace(toy.SETTING, rounds=2))).outcome().digest
        )
        torch.random.set_rng_state(state)
    require(digests[0] == digests[1], "two runs of one seed differ")
    require(digests[0] != digests[2], "two seeds give the same bits")


def client_order_is_irrelevant(plugin: Callable[[], Algorithm]) -> None:
    """The server's result does not depend on the order in which clients are listed."""
    run = toy.run(plugin(), setting=toy.SHORT)
    clients = torch.tensor([0, 1, 2, 4])
    sizes = torch.tensor([60.0, 44.0, 33.0, 9.0], dtype=torch.float64)
    for task, exchange in toy.trips(run):
        uploads = [toy.upload_once(run, k, task, exchange)[0] for k in clients.tolist()]
        server = run.algorithm.server_verb(exchange.server)
        forward = server(task, run.progress.server, Uploads(uploads, sizes, clients))
        backward = server(task, run.progress.server, Uploads(uploads[::-1], sizes.flip(0), clients.flip(0)))
        apart = tree.largest_difference(forward, backward)
        require(apart < 1e-4, f"listing the clients backwards changes the server's state by {apart:.1e}")


def what_is_sent_has_one_form(plugin: Callable[[], Algorithm]) -> None:
    """Every client is sent the same keys and shapes, held-out ones too; what is called constant is."""
    run = toy.run(plugin())
    task, server = run.task_at(0), run.progress.server
    broadcast = run.algorithm.broadcast(task, server)
    sent = [run.algorithm.send(task, server, k) for k in (0, 1, None)]
    forms = [{path: leaf.shape for path, leaf in tree.flatten(each).items()} for each in sent]
    require(forms[0] == forms[1] == forms[2], f"clients are sent different things: {forms}")
    doubled = set(broadcast) & set(sent[0])
    require(not doubled, f"{', '.join(sorted(doubled))}: sent to all and to one")
    unknown = run.algorithm.constant - set(broadcast)
    require(not unknown, f"constant names {', '.join(sorted(unknown))}, which is not broadcast")
    first = {key: broadcast[key] for key in run.algorithm.constant}
    toy.finish(run)
    last = run.algorithm.broadcast(run.task_at(run.setting.rounds - 1), run.progress.server)
    apart = tree.largest_difference(first, {key: last[key] for key in first})
    require(apart == 0, f"what is called constant changes by {apart:.1e}")


def lost_uploads_are_harmless(plugin: Callable[[], Algorithm]) -> None:
    """Rounds in which nobody takes part, or some uploads do not arrive, leave everything finite."""
    setting = replace(toy.SETTING, sampling="independent", participation=0.2, lost=0.4)
    run = toy.finish(toy.run(plugin(), setting=setting))
    require(tree.is_finite(toy.states(run)), "lost uploads end in a state that is not finite")


def small_clients_are_harmless(plugin: Callable[[], Algorithm]) -> None:
    """An empty client changes nothing; clients of one example or one class leave everything finite."""
    for sizes in ((60, 0, 0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 60, 5, 0, 1)):
        for engine in ("serial", "stacked"):
            run = toy.run(plugin(), engine, setting=replace(toy.SETTING, rounds=2, participation=1.0), sizes=sizes)
            toy.finish(run)
            require(
                tree.is_finite(toy.states(run)),
                f"clients of {sizes} examples ({engine}) end in a state that is not finite",
            )
    run = toy.run(plugin())
    if "pooled" not in run.algorithm.needs:
        upload, private = toy.upload_once(run, toy.SIZES.index(0))
        apart = tree.largest_difference(run.store.initial, private)
        require(apart == 0, f"a client without examples changes its private state by {apart:.1e}")
        require(tree.is_finite(upload), "a client without examples sends something that is not finite")


def pickles_small(plugin: Callable[[], Algorithm]) -> None:
    """An algorithm pickles by reference, to less than 500 bytes."""
    packed = pickle.dumps(plugin())
    require(len(packed) < 500, f"pickles to {len(packed)} bytes")
    require(pickle.loads(packed) == plugin(), "does not survive pickling")


def resumes(plugin: Callable[[], Algorithm]) -> None:
    """Stopping after a round and going on in a new process gives the bits of one go."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        first = toy.run(plugin(), checkpoint=checkpoint)
        first.saved = -math.inf  # save after this round, however quick it was
        first.step()
        second = toy.run(plugin(), checkpoint=checkpoint)
        require(second.progress.round == 1, "the checkpoint was not taken up")
        resumed = toy.finish(second).outcome()
    whole = toy.finish(toy.run(plugin())).outcome()
    require(resumed.digest == whole.digest, "a resumed run ends in another state than an uninterrupted one")
    require(resumed.metrics == whole.metrics, "a resumed run ends with other metrics than an uninterrupted one")


def evaluation_is_pure(plugin: Callable[[], Algorithm]) -> None:
    """Testing between rounds leaves training as it is."""
    often = toy.finish(toy.run(plugin())).outcome().digest
    once = toy.finish(toy.run(plugin(), setting=replace(toy.SETTING, eval_every=toy.SETTING.rounds))).outcome().digest
    require(often == once, "testing after each round changes the final state")


def test_data_stay_out(plugin: Callable[[], Algorithm]) -> None:
    """Garbage as test data changes no state and no adapted model: nothing is trained or chosen on them."""
    setting = replace(toy.SETTING, rounds=2, unseen=1)
    runs = [toy.finish(toy.run(plugin(), setting=setting, garbage=garbage)) for garbage in (False, True)]
    require(runs[0].outcome().digest == runs[1].outcome().digest, "the final state depends on the test data")
    for client in (0, len(toy.SIZES) - 1):
        a, b = (tested_models(run, client) for run in runs)
        require(tree.largest_difference(a, b) == 0, "the personal model, or its adaptation, depends on the test data")


def newcomers_are_served(plugin: Callable[[], Algorithm]) -> None:
    """Clients held out of training, an empty one among them, get finite models, with labels and without; asking for
    them changes nothing.
    """
    for engine, labels in (("serial", True), ("stacked", True), ("stacked", False)):
        setting = replace(toy.SETTING, rounds=1, unseen=2, unseen_labels=labels)
        run = toy.finish(toy.run(plugin(), engine, setting=setting))
        before = tree.clone({**toy.states(run), "initial": run.store.initial})
        for client in (toy.SIZES.index(0), len(toy.SIZES) - 1):
            who = f"a newcomer of {toy.SIZES[client]} examples, {'with' if labels else 'without'} labels ({engine}),"
            models, again = (tree.clone(tested_models(run, client)) for _ in range(2))
            apart = tree.largest_difference(before, {**toy.states(run), "initial": run.store.initial})
            require(apart == 0, f"{who} changes the run's states by {apart:.1e}")
            require(tree.is_finite(models), f"{who} gets a model that is not finite")
            apart = tree.largest_difference(models, again)
            require(apart == 0, f"{who} gets another model when asked again, by {apart:.1e}")


def adaptation_is_data(plugin: Callable[[], Algorithm]) -> None:
    """What is tuned before a test can be listed before a run: stages that pickle, the same whenever asked."""
    run = toy.run(plugin())
    for verb in (run.algorithm.adaptation, run.algorithm.newcomer_adaptation):
        for round in range(run.setting.rounds):
            listed, again = (tuple(stages(verb(run.task_at(round)))) for _ in range(2))
            of = f"{verb.__name__} of round {round}"
            for stage in listed:
                require(isinstance(stage, Adaptation), f"{of} lists {stage!r}, which is no Adaptation")
            require(listed == again, f"{of} lists other stages when asked again")
            require(pickle.loads(pickle.dumps(listed)) == listed, f"{of} does not survive pickling")


def predictors_are_there(plugin: Callable[[], Algorithm]) -> None:
    """`predictors` names variants that are tested, and methods that are there."""
    run = toy.run(plugin())
    run.step()
    task = run.task_at(0)
    visit, shared = run.population.visit(0, 0, run.store[0]), toy.received(run, 0)
    (personal,), _ = engines.serial(run.algorithm.personal_variants, task, shared, run.population.images, [visit])
    variants = {*personal, *run.algorithm.global_variants(task, run.progress.server)}
    for variant, method in run.algorithm.predictors.items():
        method_of(run.algorithm, method)
        there = ", ".join(sorted(variants)) or "none"
        require(variant in variants, f"predictors names the variant {variant!r}; there are {there}")


def learns(plugin: Callable[[], Algorithm]) -> None:
    """The toy problem is learnt: over 80 % personal (masked) accuracy, or generic where there is no personal
    model.
    """
    outcome = toy.finish(toy.run(plugin(), "stacked", setting=replace(toy.SETTING, rounds=12, eval_every=12))).outcome()
    reached = outcome.metrics.get("personal.masked")
    reached = outcome.metrics.get("generic") if reached is None else reached
    require(reached is not None and reached > 0.8, f"reaches {reached}, a working method over 0.8")


def parts_act(plugin: Callable[[], Algorithm]) -> None:
    """A part of each kind changes something, or the method refuses the kind with a reason. Plain cross-entropy changes
    something where the method says that it has a loss of its own.
    """
    algorithm = plugin()
    unknown = set(algorithm.refuses) - {probe.kind for probe in probes.PROBES} - {"memory"}
    require(not unknown, f"it refuses {', '.join(sorted(unknown))}, which is no kind of a part")
    allowed = [probe for probe in probes.PROBES if refusal(algorithm, probe) is None]
    plain = probes.Plain()
    silent = probes.silent(algorithm, [*allowed, plain])
    kinds = ", ".join(probe.kind for probe in silent if probe is not plain)
    how = "train by task.loss or task.criterion, take means of body and head by uploads.mean"
    require(not kinds, f"a part of the kind {kinds} changes nothing; {how}, or say why: refuses = {{kind: reason}}")
    own = plain not in silent
    require(own == algorithm.own_loss, f"own_loss = {algorithm.own_loss}, and cross-entropy in its place changes "
             f"{'something' if own else 'nothing'}; say own_loss = {own}")  # fmt: skip


def numbers_are_bounded(plugin: type[Algorithm]) -> None:
    """No field takes a number out of any sense, or does harm with one."""
    extremes.numbers_are_bounded(plugin, extremes.run_a_round)


ALGORITHM_PROMISES: dict[str, Callable[[type[Algorithm]], None]] = {
    "the name is the file's name": sayings.name_is_file_name,
    "defaults construct, frozen, repr evaluates back": sayings.defaults_construct,
    "its tier says what the server has": sayings.tier_is_told,
    "its family is a named set": sayings.family_is_known,
    "its controls are rows": sayings.controls_are_rows,
    "later fields have their defaults": sayings.later_fields_have_defaults,
    "the ledger is true": accounts.ledger_is_true,
    "inputs are left alone": inputs_are_left_alone,
    "states keep keys, shapes and dtypes": states_keep_shape,
    "models fit the architecture": models_fit,
    "engines agree": engines_agree,
    "mixed precision works": mixed_precision_works,
    "the seed decides, and nothing else": seed_decides,
    "the order of clients is irrelevant": client_order_is_irrelevant,
    "small and empty clients are harmless": small_clients_are_harmless,
    "what is sent has one form": what_is_sent_has_one_form,
    "lost uploads are harmless": lost_uploads_are_harmless,
    "pickles by reference": pickles_small,
    "stop and resume equals one go": resumes,
    "evaluation is pure": evaluation_is_pure,
    "test data stay out of training": test_data_stay_out,
    "newcomers are served": newcomers_are_served,
    "adaptation is data": adaptation_is_data,
    "predictors are there": predictors_are_there,
    "learns the toy problem": learns,
    "parts act, or are refused": parts_act,
    "numbers out of any sense are refused, or do no harm": numbers_are_bounded,
}
