"""The papers' settings field by field, schedules of the learning rate, what decays, and sizes of cohorts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import Algorithm, LocalData, Task, Tree, keys, tree
from bench.command.main import main
from bench.contract import toy
from bench.models import is_norm
from bench.plugins.registry import ALGORITHMS, DATASETS
from bench.protocol.bundles import SETTINGS, named
from bench.protocol.settings import FIELDS, BadConfig
from bench.protocol.spelling import parse_assignments
from bench.results import records
from bench.splits.longtail import class_sizes, group_classes
from bench.sweep.resolving import resolve_setting
from bench.training.engine import TOLERANCE
from bench.training.job import surroundings
from bench.training.population import draw_cohort
from bench.validation.rebuilding import rebuild
from bench.validation.rerun import rerun

# The papers' settings ---------------------------------------------------------------------------------------

OURS = {
    "norm": ("batch", "every code's networks have batch norm"),
    "statistics": ("shared", "every code averages the whole state dictionary"),
    "kappa": (1.0, "one momentum, torch's"),
    "server_momentum": (1.0, "every code replaces the state dictionary"),
    "balance": (False, "nobody weighs classes in a norm layer"),
    "penalty": (0.0, "likewise"),
    "shift": ("none", "one camera"),
    "severity": (1.0, "nothing is shifted"),
    "unseen_severity": (None, "likewise"),
    "open_classes": (0, "every class is dealt"),
    "shots": (5, "there is no open-set test"),
    "ways": (None, "likewise"),
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
    "classes_per_client": (None, "nobody deals whole classes"),
    "sizes": ("equal", "likewise"),
    "users": ("merge", "no natural users"),
    "attack": ("none", "no test under attack"),
    "attack_epsilon": (8 / 255, "likewise; what is usual"),
    "attack_step": (2 / 255, "likewise"),
    "attack_steps": (None, "likewise"),
    "attack_images": (1000, "likewise"),
    "optimiser": ("sgd", "every code, for the method that its setting is of"),
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
PAPERS["airbench", "cifar10"] = {
    "model": ("airbench94", "airbench94.py"),
    "clients": (1, "not federated"),
    "participation": (1.0, "not federated"),
    "rounds": (10, "9.9 epochs, to the next whole one"),
    "epochs": (1, "a round each"),
    "batch_size": (1024, "airbench94.py"),
    "lr": (1.5, "1024 examples x 11.5 / (1024 x (1 + 1 / 0.15)): the loss is summed there, and a mean here"),
    "momentum": (0.85, "airbench94.py"),
    "weight_decay": (0.0153 / 11.5, "0.0153 over the rate, and a mean in place of a sum"),
    "augment": ("altflip", "airbench94.py: flips alternate, shifts of 2 pixels are reflected"),
    "imbalance": (1.0, "all of CIFAR-10"),
    "partition": ("iid", "one client"),
    "alpha": (None, "one client"),
    "eval_every": (10, "ours: the code tests after each epoch, outside its clock"),
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


def test_rates_of_airbench_are_the_codes_for_a_mean_in_place_of_a_sum() -> None:
    found = named("airbench", DATASETS["cifar10"]())
    scale = 1024 * (1 + 1 / (1 - 0.85))
    assert scale == pytest.approx(7850.67, abs=0.01)
    lr, decayed = 11.5 / scale, 0.0153 * 1024 / scale  # of a summed loss; what one step takes of a weight
    assert (lr, decayed, decayed / lr) == pytest.approx((1.464844e-3, 1.995652e-3, 1.362365), rel=1e-6)
    assert (found.lr, found.weight_decay) == pytest.approx((1024 * lr, decayed / lr / 1024), rel=1e-12)


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
    "dataset", ["digits", "mnist", "fashion_mnist", "emnist", "svhn", "cinic10", "cifar10", "cifar100", "tiny_imagenet"]
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


# The learning rate ------------------------------------------------------------------------------------------


def scheduled(**fields: Any) -> list[float]:
    setting = replace(toy.SETTING, **{"rounds": 8, "lr": 1.0, **fields})
    return [setting.lr_at(round) for round in range(setting.rounds)]


def test_a_schedule_is_that_computed_by_hand() -> None:
    assert scheduled() == [1.0] * 8
    assert scheduled(lr_decay=0.5, rounds=4) == [1, 0.5, 0.25, 0.125]
    assert scheduled(lr_steps=((0.5, 0.1), (0.75, 0.1))) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert scheduled(lr_cosine=True, rounds=4) == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    assert scheduled(lr_steps=((0.8, 0.05),), rounds=2000)[1599:1601] == pytest.approx([1, 0.05])


def test_all_schedules_together_are_their_product() -> None:
    pieces = ({"lr_decay": 0.9}, {"lr_steps": ((0.4, 0.3),)}, {"lr_cosine": True})
    product = [math.prod(rates) for rates in zip(*(scheduled(**piece) for piece in pieces), strict=True)]
    assert scheduled(**{key: value for piece in pieces for key, value in piece.items()}) == pytest.approx(product)


@pytest.mark.parametrize("rounds", [3, 7, 10, 29, 100, 333])
@pytest.mark.parametrize("percent", [10, 29, 50, 58, 75, 80])
def test_a_step_begins_with_the_round_at_which_its_share_is_reached(rounds: int, percent: int) -> None:
    rates = scheduled(rounds=rounds, lr_steps=((percent / 100, 0.5),))
    assert rates.index(0.5) == percent * rounds // 100


def test_a_run_with_a_step_is_two_runs_one_after_the_other() -> None:
    setting = replace(toy.SETTING, weight_decay=1e-3)
    whole = toy.finish(toy.run(ALGORITHMS["fedavg"](), setting=replace(setting, lr_steps=((0.5, 0.1),))))
    first = toy.run(ALGORITHMS["fedavg"](), setting=setting)
    first.step(), first.step()
    second = toy.run(ALGORITHMS["fedavg"](), setting=replace(setting, lr=setting.lr * 0.1))
    second.progress.server, second.progress.round = first.progress.server, 2
    assert tree.digest([toy.finish(second).progress.server]) == tree.digest([whole.progress.server])
    assert tree.digest([toy.finish(first).progress.server]) != tree.digest([whole.progress.server])


STEPS = ((0.5, 0.1), (0.75, 0.1))


@pytest.mark.parametrize(
    "written",
    ["{0.5: 0.1, 0.75: 0.1}", "{0.75: 0.1, 0.5: 0.1}", "[[0.5, 0.1], [0.75, 0.1]]", "{'0.5': .1, '0.75': .1}"],
)
def test_steps_are_written_as_a_person_does(written: str) -> None:
    setting = resolve_setting("quick", DATASETS["digits"](), parse_assignments([f"lr_steps={written}"]))
    assert setting.lr_steps == STEPS


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("lr_steps=0.5", "lr_steps = 0.5: pairs of a share of the rounds and a factor are wanted, such as {0.5: 0.1"),
        ("lr_steps=half", "lr_steps = 'half': pairs"),
        ("lr_steps={0.5}", "pairs of a share"),
        ("lr_steps=[[0.5, 0.1, 0.2]]", "pairs of a share"),
        ("lr_steps=None", "pairs of a share"),
        ("lr_steps={0.5: 'x'}", "pairs of a share"),
        ("lr_steps={1.0: 0.1}", "must be a list, each (a number above 0 and below 1, a number above 0"),
        ("lr_steps={0: 0.1}", "must be a list, each (a number above 0 and below 1, "),
        ("lr_steps={0.5: 0}", "must be a list, each (a number above 0 and below 1, "),
        ("lr_steps={0.5: 1e999}", "must be a list, each (a number above 0 and below 1, "),
        ("lr_cosine=1", "must be True or False"),
        ("decayed=norms", "must be one of all, weights"),
        ("split_seed=-1", "split_seed = -1: must be a whole number from 0 to below 4,294,967,296, or None"),
        ("client_test=even", "must be one of matched, fedloge, balanced, global, own"),
        ("groups=halves", "must be one of thirds, count, cumulative"),
    ],
)
def test_a_wrong_value_is_answered_in_a_sentence(field: str, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        resolve_setting("quick", DATASETS["digits"](), parse_assignments([field]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def told_by(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([*words], prog_name="bench")
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    return json.loads(captured.out)


def test_a_schedule_is_stored_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text("""
algos = "fedavg"
rounds = 2
clients = 4
out = "stored"
[set]
lr_steps = {"0.75" = 0.1, "0.5" = 0.1}
split_seed = 3
client_test = "balanced"
""")
    told_by("run", "--from", "sweep.toml", "--json", capsys=capsys)
    (folder,) = Path("stored").glob("*/run.json")
    record = records.read(folder.parent)
    assert json.loads(folder.read_text())["setting"]["lr_steps"] == [[0.5, 0.1], [0.75, 0.1]]
    run = rebuild(record).run(Path())
    assert (run.setting.lr_steps, run.setting.split_seed, run.id) == (STEPS, 3, record.id)
    again = rerun(record, run)
    assert again.agrees and again.because is None


# What decays ------------------------------------------------------------------------------------------------


SMALL = (20, 9, 0, 0, 0, 0, 0, 0)
HEAVY = replace(toy.SETTING, model="resnet8", rounds=1, participation=1.0, epochs=1, weight_decay=0.5)


def trained(engine: str, **fields: Any) -> Tree:
    run = toy.run(ALGORITHMS["fedavg"](), engine, setting=replace(HEAVY, **fields), sizes=SMALL)
    return toy.finish(run).progress.server


@dataclass(frozen=True)
class Compared(Algorithm):
    """FedAvg, whose clients compare their SGD with torch's."""

    decayed_vectors: float

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        batches = list(data.batches(1))
        mine = task.sgd(task.loss, shared, batches)
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(shared).items()}
        vectors = [leaf for path, leaf in leaves.items() if path.endswith("bias") or is_norm(path)]
        others = [leaf for leaf in leaves.values() if not any(leaf is vector for vector in vectors)]
        groups: list[dict[str, Any]] = [{"params": vectors, "weight_decay": self.decayed_vectors}, {"params": others}]
        optimiser = torch.optim.SGD(groups, task.lr, task.momentum, weight_decay=task.weight_decay)
        for batch in batches:
            optimiser.zero_grad()
            task.loss(tree.unflatten(leaves), batch).backward()
            optimiser.step()
        assert tree.largest_difference(mine, tree.map(torch.Tensor.detach, tree.unflatten(leaves))) < 1e-6
        return shared, private


@pytest.mark.parametrize(("decayed", "vectors"), [("weights", 0.0), ("all", 0.5)])
def test_what_decays_is_what_torch_is_told_in_groups_of_parameters(decayed: str, vectors: float) -> None:
    toy.finish(toy.run(Compared(vectors), setting=replace(HEAVY, decayed=decayed), sizes=SMALL))


def test_both_engines_leave_biases_and_norm_layers_alone() -> None:
    serial, stacked = trained("serial", decayed="weights"), trained("stacked", decayed="weights")
    assert tree.largest_difference(serial, stacked) < TOLERANCE
    apart = tree.flatten(tree.add(serial, trained("serial"), -1.0))
    assert min(float(apart[path].abs().max()) for path in apart if is_norm(path) and path.endswith("weight")) > 0.01


# Cohorts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 7, 20, 50, 100, 333])
def test_a_cohort_is_the_share_of_the_clients_rounded_down_exactly(clients: int) -> None:
    for percent in range(1, 101):
        setting = replace(toy.SETTING, clients=clients, participation=percent / 100)
        size = max(percent * clients // 100, 1)
        assert setting.cohort_size(clients) == size
        assert len(draw_cohort(setting, clients, keys.key(0), 0)) == size


def test_clients_held_out_are_no_part_of_the_share() -> None:
    setting = replace(toy.SETTING, clients=110, unseen=10, participation=0.29)
    assert (
        setting.cohort_size(110) == 29
        and replace(setting, clients=50, unseen=0, participation=0.58).cohort_size(50) == 29
    )


# Precision --------------------------------------------------------------------------------------------------


@pytest.fixture
def rounding() -> Iterator[list[Any]]:
    """Have torch round in products and convolutions, as it may on a GPU, and put back what was."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = True
    yield places
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.mark.parametrize(("device", "allowed"), [("cuda", False), ("cpu", True)])
def test_float32_on_a_gpu_is_float32(
    device: str, allowed: bool, rounding: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.training.job.Population", stop)  # there may be no GPU
    job = replace(toy._job(ALGORITHMS["fedavg"](), "serial", 0, toy.SETTING, toy.Toy(), toy.SIZES), device=device)
    with pytest.raises(KeyboardInterrupt):
        surroundings(job)
    assert [place.allow_tf32 for place in rounding] == [allowed, allowed]
