"""What a run is given, and what every process of it sets up from that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench import attacks, keys, models, tree
from bench.algorithm import Algorithm
from bench.dataset import Dataset, Splits
from bench.models.teacher import Features
from bench.protocol.settings import BadConfig, Setting
from bench.splits.auxiliary import NEEDS, Reserve
from bench.splits.open_set import known_rows
from bench.splits.shift import shifted
from bench.splits.split import Split
from bench.task import Task
from bench.training import engine as engines
from bench.training.asked import tell
from bench.training.crew import Surroundings
from bench.training.population import Population, at_the_server
from bench.tree import Tree

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One algorithm on one split, with all that it reads at hand."""

    algorithm: Algorithm
    dataset: Dataset
    """Where images come from, for their normalisation."""
    splits: Splits
    """The images."""
    split: Split
    """Whose they are."""
    setting: Setting
    """The protocol."""
    seed: int
    """Of initial weights, cohorts, data order and augmentation."""
    engine: str
    """"serial" or "stacked"."""
    precision: str = "fp32"
    """"fp32", on a GPU too: TF32, which torch takes for convolutions there, is switched off in the whole process. Or
    "bf16", for automatic mixed precision."""
    device: str = "cpu"
    """Or "cuda", or "mps"."""
    weights: Tree | None = None
    """Body that models start from; None: drawn by the seed."""
    reserve: Reserve | None = None
    """Images at the server; None: there are none."""
    teacher: Features | None = None
    """What a teacher makes of images and classes; None: there is none."""


def surroundings(job: Job) -> Surroundings:
    """Set up what every process of a run has.

    Raises:
        BadConfig: The algorithm needs images at the server, or a teacher, and the job has none.
    """
    algorithm, dataset, split, setting, device = job.algorithm, job.dataset, job.split, job.setting, job.device
    if device == "cuda":  # torch would round in convolutions to 10 bits of mantissa
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    teacher = job.teacher if "teacher" in algorithm.needs else None
    if teacher is None and "teacher" in algorithm.needs:
        raise BadConfig(f"{type(algorithm).__name__} needs a teacher, and this run has none")
    seen = None if teacher is None else teacher.images
    splits, seen_split = shifted(dataset, job.splits, split, setting, job.seed)
    official = known_rows(job.splits.test_y, split.open)
    population = Population(dataset, splits, seen_split, setting, job.seed, device, seen, official)
    model = models.build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm, setting.balanced)
    told = None if model.learns is None or job.weights is not None else tell(model, population)
    prior = split.class_counts / split.class_counts.sum() if "prior" in algorithm.needs else None
    task = Task(
        model=model,
        num_classes=dataset.num_classes,
        num_clients=population.training,
        rounds=setting.rounds,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        initial_lr=setting.lr,
        key=keys.fold(keys.key(job.seed), "run").to(device),
        update_rule=setting.optimiser,
        momentum=setting.momentum,
        weight_decay=setting.weight_decay,
        decay_vectors=setting.decayed == "all",
        clip=setting.clip,
        prior=None if prior is None else prior.float().to(device),
        teacher=None if teacher is None else tree.bring(teacher.texts, device),
        ball=attacks.around(population.test, setting.attack_epsilon, setting.attack_step) if dataset.pictures else None,
        frozen_statistics=setting.statistics == "frozen",
        weights=None if job.weights is None else tree.to(job.weights, device),
        start=None if told is None else tree.to(model.started(told.total), device),
        precision=PRECISIONS[job.precision],
    )
    if needs := algorithm.needs & NEEDS:
        if job.reserve is None:
            raise BadConfig(f"{type(algorithm).__name__} needs images at the server, and this run has none")
        auxiliary, public = at_the_server(job.reserve, needs, dataset, setting, task.key, device)
        task = replace(task, auxiliary=auxiliary, public=public)
    chosen = engines.BY_NAME["serial" if not algorithm.stackable else job.engine]
    return Surroundings(algorithm, population, task, chosen, split.fingerprint, told)
