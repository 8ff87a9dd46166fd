"""Tuning of a personal model before it is tested: an algorithm's stages, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from bench import losses, tree
from bench.algorithm import Adaptation, Algorithm, Misnamed, method_of
from bench.data import Batch, LocalData
from bench.task import Loss, Task
from bench.tree import Tree


@dataclass(frozen=True)
class _Stretch:
    """A stage, or a part of one that ends where a model is reported."""

    stage: Adaptation
    first: bool
    """Whether the stage begins with it."""
    begin: int
    """Epochs that were made before it."""
    epochs: int
    """0 in a stage of steps."""
    salt: str
    """Of its batches."""
    budget: str
    """What was spent when it is done."""
    reported: bool


def _stretches(adaptation: tuple[Adaptation, ...]) -> Iterator[_Stretch]:
    """Cut stages where models are reported."""
    curve, epochs, steps = adaptation[0].curve, 0, 0
    for number, stage in enumerate(adaptation):
        begin, end = epochs, epochs + stage.epochs
        between = () if stage.by is not None else (budget for budget in curve if begin < budget < end)
        for stop in sorted({end, *between}):
            salt = f"adapt {epochs} {steps}" if steps else f"adapt {epochs}"
            steps += stage.steps or 0
            budget = f"{stop} epochs" if stage.steps is None else f"{steps} steps"
            last = number + 1 == len(adaptation) and stop == end
            reported = last or stage.steps is not None or stop in curve
            yield _Stretch(stage, epochs == begin, epochs, stop - epochs, salt, budget, reported)
            epochs = stop


def budgets(adaptation: tuple[Adaptation, ...]) -> tuple[str, ...]:
    """Give the budgets after which models are reported, in order: "0 epochs", "5 epochs", "1 steps"."""
    before = ("0 epochs",) if 0 in adaptation[0].curve else ()
    return tuple(dict.fromkeys((*before, *(each.budget for each in _stretches(adaptation) if each.reported))))


def _moving(stage: Adaptation, model: Tree) -> tuple[str, ...]:
    """Give the keys of a model that a stage moves."""
    rest = () if "head" in model else tuple(key for key in model if key != "body")
    return tuple(key for part in stage.parts for key in (rest if part == "head" and rest else (part,)))


def require_possible(algorithm: Algorithm, adaptation: tuple[Adaptation, ...], model: Tree) -> None:
    """Require that stages name parts which a model has, and losses which the algorithm has.

    Raises:
        Misnamed: Some stage does not.
    """
    of = f"the adaptation of {type(algorithm).__name__} moves"
    for stage in adaptation:
        for part in _moving(stage, model):
            if part not in model:
                there = f"and its model has {', '.join(model) or 'nothing'}"
                raise Misnamed(f"{of} {part!r}, {there}; name these in the parts of the stage")
            leaves = tree.flatten({part: model[part]})
            fixed = next((path for path, leaf in leaves.items() if not leaf.is_floating_point()), None)
            if fixed is not None:
                raise Misnamed(f"{of} {fixed!r}, which holds whole numbers; name other parts in the stage")
        for name in (stage.loss, stage.by):
            if name is not None:
                method_of(algorithm, name)


def adapt(
    adaptation: tuple[Adaptation, ...], algorithm: Algorithm, task: Task, shared: Tree, model: Tree, data: LocalData
) -> Tree:
    """Tune one client's model: by budget, the models that are reported."""
    still, done = replace(task, still=True), {"0 epochs": model}
    momentum: Tree | None = None
    for stretch in _stretches(adaptation):
        stage = stretch.stage
        seen = data if stage.labels else data.unlabelled()
        epochs = stretch.epochs if stage.steps is None else None
        lr = (task.initial_lr or task.lr) * stage.lr_factor if stage.lr is None else stage.lr
        if stage.by is not None:
            itself: Callable[..., Tree] = getattr(algorithm.pieces[0], stage.by)
            model = itself(replace(task, lr=lr), model, seen.after(stretch.begin))
        else:
            moving, momentum = still.resume_sgd(
                _objective(stage, algorithm, still, model, seen),
                {part: model[part] for part in _moving(stage, model)},
                seen.after(stretch.begin).batches(epochs, stretch.salt, steps=stage.steps),
                None if stretch.first else momentum,
                lr,
            )
            model = {**model, **moving}
        if stretch.reported:
            done[stretch.budget] = model
    return {budget: done[budget] for budget in budgets(adaptation)}


def _objective(stage: Adaptation, algorithm: Algorithm, task: Task, model: Tree, data: LocalData) -> Loss:
    """Give a stage's loss of the parts that move; a part of training such as another loss has no say in it."""

    def loss(params: Tree, batch: Batch) -> Tensor:
        tuned = {**model, **params}
        if stage.loss is None:
            return losses.cross_entropy(algorithm.predict(task, tuned, batch.x), batch)
        return method_of(algorithm, stage.loss)(task, tuned, data, batch)

    return loss
