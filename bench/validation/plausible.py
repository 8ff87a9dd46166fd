"""What a run must have cost, as far as that can be told without training it.

How often a method trains on an image of its cohorts, how much it computes for each, and whether clients send as much as
they are sent, is seen on the toy problem, with the run's own network where that has branches, which a method may train
apart. The network of the run says how much one image takes at least, unless a method trains another one by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from bench import models
from bench.algorithm import Algorithm
from bench.contract import toy
from bench.plugins.registry import MODELS
from bench.training.asked import size
from bench.training.footprint import Footprint, footprint
from bench.validation.expected import drawn
from bench.validation.rebuilding import Asked

_FASTEST = 1e17
"""FLOP a second that no machine of today does for one run: some hundred of the fastest accelerators."""
_SHORTEST = 1e-4
"""Seconds that no round is done in."""
_MOST_EPOCHS = 20
"""Of a setting that the toy problem is trained by."""


def implausible(
    asked: Asked, cost: Mapping[str, float | None], clients: int | None, visited: int | None
) -> Iterator[tuple[str, str]]:
    """Compare the costs of a finished run with what they must be at least, and at most.

    Args:
        asked: The run.
        cost: As run.json tells it, complete.
        clients: All clients; None: that is not known.
        visited: Training images that the cohorts of all rounds hold together; None: that is not known.

    Returns:
        Keys of the costs that cannot be, and why.
    """
    setting, algorithm = asked.trained_by, asked.algorithm
    amounts = {key: 0.0 if value is None else value for key, value in cost.items()}
    samples, flops = amounts["train_samples"], amounts["train_flops"]
    known = None
    if setting.epochs <= _MOST_EPOCHS and not asked.outdated:
        known = _on_the_toy(algorithm, setting.epochs, setting.model)
    as_told = setting.lost == 0 and not setting.final_visit  # the toy problem has neither
    if known is not None and known.passes is not None and visited is not None and as_told:
        wanted = known.passes * visited
        if abs(samples - wanted) > 1e-6 * wanted:
            yield "train_samples", f"is {samples:.10g}, and cohorts of {visited:,} images make it {wanted:.10g}"
    forward = network(asked)
    if forward is not None:
        least, most = samples * forward.flops, None if known is None else 3 * known.work * samples * forward.flops
        if asked.teacher is not None:  # of whose width the work depends
            most = None
        if flops < least and not algorithm.pieces[0].trains_another:
            yield "train_flops", f"is {flops:.4g}, and as many samples take {least:.4g} to be looked at once"
        elif most is not None and flops > most:
            yield "train_flops", f"is {flops:.4g}, and as many samples take {most:.4g} at most"
        peak = cost.get("peak_memory_bytes")
        if peak is not None and peak < forward.nbytes:
            yield "peak_memory_bytes", f"is {peak:.10g}, and the model alone takes {forward.nbytes}"
    if known is not None and known.alike and clients is not None and as_told:
        before = _told(asked, clients)
        if amounts["bytes_up"] != amounts["bytes_down"] + before:
            sent = f"clients send what they are sent, {_count(cost['bytes_down'])}"
            once = f", and {before} bytes before the first round" if before else ""
            yield "bytes_up", f"is {_count(cost['bytes_up'])}, and {sent}{once}"
    done = sum(amounts[f"{whose}_flops"] for whose in ("train", "adaptation", "server"))
    shortest = max(setting.rounds * _SHORTEST, done / _FASTEST)
    for key in ("wall_seconds", "device_seconds"):
        if amounts[key] < shortest:
            yield key, f"is {amounts[key]:.4g}, and no machine does that in less than {shortest:.4g} s"


def _told(asked: Asked, clients: int) -> int:
    """Count the bytes in which clients tell of their images before the first round."""
    if asked.dataset is None or asked.own_weights:
        return 0
    setting = asked.setting
    model = models.build(setting.model, asked.dataset.num_classes, asked.dataset.image_shape, setting.norm)
    return 0 if model.learns is None else setting.training_clients(clients) * 8 * size(model)


def _count(number: float | None) -> str:
    return "absent" if number is None else f"{number:.10g}"


@dataclass(frozen=True)
class _Toy:
    """What a method does on the toy problem."""

    passes: float | None
    """How often it trains on an image of its cohorts; None where that depends on more than the cohorts."""
    work: float
    """FLOP for a training sample, over that of a forward pass."""
    alike: bool
    """Whether as much is sent up as down."""


def _on_the_toy(algorithm: Algorithm, epochs: int, model: str) -> _Toy:
    pictures = toy.Toy(enlarged=-(-MODELS[model].smallest // 8))
    if not models.build(model, pictures.num_classes, pictures.image_shape).branches:
        return _trained(algorithm, epochs, toy.SETTING.model, toy.Toy())
    return _trained(algorithm, epochs, model, pictures)


@cache
def _trained(algorithm: Algorithm, epochs: int, model: str, pictures: toy.Toy) -> _Toy:
    found = []
    for rounds in (2, 3):
        setting = replace(toy.SETTING, rounds=rounds, epochs=epochs, model=model)
        run = toy.finish(toy.run(algorithm, setting=setting, dataset=pictures))
        cost = run.progress.cost
        visited = int(drawn(setting, len(toy.SIZES), 0).times @ toy.SIZES)
        forward = footprint(run.task.model)
        work = cost.get("train_flops", 0.0) / max(cost.get("train_samples", 0.0), 1.0) / forward.flops
        sent = cost.get("bytes_up", 0.0) == cost.get("bytes_down", 0.0)
        found.append((cost.get("train_samples", 0.0) / visited, work, sent))
    (passes, one, alike), (again, other, alike_again) = found
    regular = abs(passes - again) <= 1e-9 * passes
    return _Toy(passes if regular else None, max(one, other), alike and alike_again)


def network(asked: Asked) -> Footprint | None:
    """Measure the network of a run; None where the images' shape is not known here."""
    setting, dataset = asked.trained_by, asked.dataset
    if dataset is None:
        return None
    shape, balanced = dataset.image_shape, setting.balanced
    return footprint(models.build(setting.model, dataset.num_classes, shape, setting.norm, balanced))
