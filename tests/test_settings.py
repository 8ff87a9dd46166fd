"""The papers' settings field by field, schedules of the learning rate, and sizes of cohorts."""

from __future__ import annotations

import pytest
import torch

from bench.protocol.settings import FIELDS, SETTINGS, named
from bench.registry import DATASETS
from bench.splits.longtail import class_sizes, group_classes

# The papers' settings ---------------------------------------------------------------------------------------

OURS = {
    "norm": ("batch", "every code's networks have batch norm"),
    "statistics": ("shared", "every code averages the whole state dictionary"),
    "unseen": (0, "nobody is held out"),
    "unseen_labels": (True, "nobody is held out"),
    "sampling": ("fixed", "uniform without replacement in every code"),
    "lost": (0.0, "everything arrives"),
    "client_weights": ("size", "every code averages by training examples"),
    "match": ("rounds", "the papers count rounds"),
    "final_visit": (False, "FedRep's alone"),
    "lr_decay": (1.0, "no factor a round"),
    "lr_steps": ((), "constant"),
    "lr_cosine": (False, "nobody"),
    "momentum": (0.0, "torch's default"),
    "weight_decay": (0.0, "torch's default"),
    "decayed": ("all", "one group of parameters in every optimiser"),
    "clip": (None, "no clipping"),
    "augment": ("crop_flip", "crop of 4 pixels of padding, and flip"),
    "profile": ("exponential", "every code"),
    "split_seed": (None, "one split for all runs, which is the person's choice"),
    "client_test": ("matched", "no test of clients in the paper"),
    "groups": ("thirds", "ours: no groups, or cuts by class number"),
    "eval_clients": (None, "all"),
    "auxiliary": (None, "told with the algorithm"),
}
"""What holds for all that say nothing else: field to value and reason."""

PAPERS: dict[tuple[str, str], dict[str, tuple[object, str]]] = {
    ("fedloge", "cifar10"): {
        "model": ("resnet18", "logs a-d"),
        "clients": (40, "logs a-d"),
        "participation": (1.0, "the main table's code forces 1"),
        "rounds": (500, "options.py"),
        "epochs": (5, "options.py"),
        "batch_size": (8, "options.py"),
        "lr": (0.03, "options.py"),
        "momentum": (0.5, "options.py"),
        "imbalance": (50.0, "logs: 50 and 100"),
        "partition": ("fedloge", "sampling.py"),
        "alpha": (0.5, "logs: 0.5 and 1"),
        "client_test": ("fedloge", "sampling.py"),
        "groups": ("cumulative", "75 and 95 per cent"),
        "eval_every": (10, "ours: the code tests after each round"),
    },
    ("creff", "cifar10"): {
        "model": ("resnet8", "Model/Resnet8.py"),
        "clients": (20, "options.py"),
        "participation": (0.4, "options.py: 8 online"),
        "rounds": (200, "options.py"),
        "epochs": (10, "options.py"),
        "batch_size": (32, "options.py"),
        "lr": (0.1, "options.py"),
        "augment": ("batch_crop_flip", "main.py transforms a whole batch"),
        "imbalance": (50.0, "options.py: 0.02"),
        "partition": ("feddf_recut", "Dataset/sample_dirichlet.py"),
        "alpha": (0.5, "options.py"),
        "eval_every": (10, "ours: the code tests after each round"),
    },
    ("gbme", "cifar100"): {
        "model": ("resnet32", "main_fedavg.py, without experts"),
        "clients": (100, "main_fedavg.py"),
        "participation": (0.2, "main_fedavg.py: 20 a round"),
        "rounds": (2000, "README's command"),
        "epochs": (2, "README's command"),
        "batch_size": (64, "README's command"),
        "lr": (0.6, "README's command"),
        "lr_steps": (((0.8, 0.05),), "README's lr_decay 0.05; fedavg_api.py multiplies at 4/5"),
        "momentum": (0.9, "my_model_trainer_classification.py"),
        "weight_decay": (5e-4, "main_fedavg.py"),
        "imbalance": (100.0, "README's command: 0.01"),
        "partition": ("lda", "partition_data"),
        "alpha": (0.1, "README's command"),
        "eval_every": (50, "README's command"),
    },
    ("redgrape", "cifar10"): {
        "model": ("resnet56", "README's command"),
        "clients": (50, "README's command"),
        "participation": (0.2, "README's command: 10 a round"),
        "rounds": (1000, "README's command"),
        "epochs": (5, "README's command"),
        "batch_size": (64, "README's command"),
        "lr": (0.1, "README's command"),
        "momentum": (0.9, "the script"),
        "clip": (1.0, "clip_grad_norm_ in the trainer"),
        "imbalance": (100.0, "the script"),
        "partition": ("lda", "nearest: the code's own is told in the docstring"),
        "alpha": (1.0, "the script"),
        "eval_every": (10, "ours: the code tests after each round"),
    },
}
PAPERS["fedloge", "cifar100"] = PAPERS["fedloge", "cifar10"] | {
    "model": ("resnet34", "logs e-h"),
    "clients": (20, "logs e-h"),
}
PAPERS["creff", "cifar100"] = PAPERS["creff", "cifar10"]
PAPERS["redgrape", "cifar100"] = PAPERS["redgrape", "cifar10"]
PAPERS["gbme", "cifar10"] = PAPERS["gbme", "cifar100"] | {
    "clients": (10, "the paper"),
    "participation": (0.5, "the paper: 5 a round"),
    "lr": (0.1, "the paper"),
    "alpha": (0.5, "the paper"),
}


@pytest.mark.parametrize(("setting", "dataset"), PAPERS)
def test_a_papers_setting_is_the_papers_in_every_field(setting: str, dataset: str) -> None:
    decided = {"name": (setting, "itself"), **OURS, **PAPERS[setting, dataset]}
    found = named(setting, DATASETS[dataset]())
    assert {field: getattr(found, field) for field in FIELDS} == {field: value for field, (value, _) in decided.items()}


def test_every_setting_of_a_paper_is_in_the_table() -> None:
    assert {setting for setting, _ in PAPERS} == set(SETTINGS) - {"quick"}


# Groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", [10, 50, 100, 200])
@pytest.mark.parametrize(
    "dataset", ["digits", "fashion_mnist", "svhn", "cinic10", "cifar10", "cifar100", "tiny_imagenet"]
)
def test_every_group_of_a_dataset_that_is_cut_has_classes(dataset: str, imbalance: float) -> None:
    plugin = DATASETS[dataset]()
    assert plugin.tail == "made"
    sizes = torch.tensor(class_sizes("exponential", 500, imbalance, plugin.num_classes))
    for setting in SETTINGS:
        groups = group_classes(sizes, named(setting, plugin).groups)
        assert all(len(classes) for classes in groups.values())
        assert sizes[groups["many"]].min() >= sizes[groups["few"]].max()


def test_a_dataset_has_the_groups_of_its_literature() -> None:
    rules = {name: DATASETS[name]().groups for name in ("digits", "femnist", "imagenet_lt", "places_lt", "inat")}
    assert rules == {
        "digits": "thirds",
        "femnist": "thirds",
        "imagenet_lt": "count",
        "places_lt": "count",
        "inat": "count",
    }
    for setting in SETTINGS:
        expected = "cumulative" if setting == "fedloge" else "count"
        assert named(setting, DATASETS["imagenet_lt"]()).groups == expected
