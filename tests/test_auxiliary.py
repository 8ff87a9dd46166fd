"""Images at the server: which they are, who may see them, what they cost, and that nobody else's run is touched."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Algorithm, LocalData, Splits, Task, Tree, tree
from bench.contract import checks, toy
from bench.contract.promises import ContractBroken
from bench.data import Uploads
from bench.dataset import DataMissing
from bench.files import pack, source
from bench.plugins.registry import ALGORITHMS, DATASETS, UnknownPlugin, label, load_plugin
from bench.protocol.identity import identify
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import parse_algorithms, parse_dataset
from bench.results import records
from bench.results.leaderboard import leaderboards
from bench.splits import auxiliary
from bench.splits.longtail import subsample
from bench.splits.split import make_split
from bench.sweep import driver, execution, forecast
from bench.sweep.config import Sweep
from bench.sweep.pool import InProcess
from bench.sweep.run import Run
from bench.sweep.schedule import cell
from bench.tracking.described import of_record, of_run
from bench.training.crew import Surroundings
from bench.training.job import Job, surroundings
from bench.training.rounds import Run as Going
from bench.validation.rebuilding import CannotRebuild, rebuild
from bench.validation.report import validate
from bench.validation.rerun import candidates, rerun
from tests.test_crew import hired, left
from tests.test_plugins import OFF, Bench
from tests.test_plugins import bench as bench
from tests.test_population import Lent

NO_DATA = Path("no data here")
"""Digits need none."""

TUNED = '''
"""Tuned: FedAvg whose server goes on training on balanced images of its own.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, register, tree
from bench.ranges import Steps


@register("tuned")
@dataclass(frozen=True, kw_only=True)
class Tuned(Algorithm):
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"auxiliary"})
    steps: Steps = 3
    warm: bool = False

    def init_server(self, task):
        return task.sgd(task.loss, task.init(), task.auxiliary.batches(1)) if self.warm else task.init()

    def local_update(self, task, shared, private, data):
        assert task.auxiliary is None, "what lies at the server is not at a client"
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task, server, uploads):
        batches = task.auxiliary.batches(steps=self.steps, batch_size=7)
        return task.sgd(task.loss, tree.merge(server, uploads.mean()), batches)
'''
DISTILLED = '''
"""Distilled: FedAvg whose clients stay near the broadcast on public images, and whose server averages there.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E + 2 × 8 / n
Departs        nowhere
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, register, tree
from bench.losses import mean


@register("distilled")
@dataclass(frozen=True, kw_only=True)
class Distilled(Algorithm):
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"public"})

    def local_update(self, task, shared, private, data):
        def apart(model, batch):
            return mean((task.logits(model, batch.x) - task.logits(shared, batch.x)).square().mean(1), batch)

        model = task.sgd(task.loss, shared, data.batches(task.epochs))
        near = task.sgd(apart, model, task.public.batches(steps=2, batch_size=8))
        some = data.n > 0
        return tree.map(lambda new, old: new * some + old * ~some, near, shared), private

    def aggregate(self, task, server, uploads):
        for batch in task.public.plain_batches():
            assert (batch.y == -1).all()
        return tree.merge(server, uploads.mean())
'''
PAIRED = '''
"""Paired: forty of the digits' training images, twenty of their test images, and noise of the same kind."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench import Dataset, Splits, keys, register
from bench.plugins.registry import DATASETS


@register("paired")
@dataclass(frozen=True, kw_only=True)
class Paired(Dataset):
    num_classes = 10
    image_shape = (1, 8, 8)
    mean = (0.5,)
    std = (0.2,)
    scale = 16.0
    flip = False
    each: int = 9

    def load(self, root: Path) -> Splits:
        digits = DATASETS["digits"]().load(root)
        noise = keys.integers(keys.key(1), 17, 10 * self.each, 1, 8, 8).to(torch.uint8)
        x = torch.cat([digits.train_x[:40], digits.test_x[:20], noise])
        y = torch.cat([digits.train_y[:40], digits.test_y[:20], torch.arange(10).repeat(self.each)])
        return Splits(x, y, x[:10], torch.arange(10))
'''


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two methods and a dataset, in files."""
    folder = tmp_path_factory.mktemp("plugins")
    files = {}
    for name, text in (("tuned", TUNED), ("distilled", DISTILLED), ("paired", PAIRED)):
        files[name] = folder / f"{name}.py"
        files[name].write_text(text)
        load_plugin(files[name])
    return files


@dataclass(frozen=True, kw_only=True)
class Looks(Algorithm):
    """FedAvg that needs both kinds, and notes what it is shown where."""

    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"auxiliary", "public"})
    seen: ClassVar[list[tuple[str, int, Any]]] = []

    def init_server(self, task: Task) -> Tree:
        assert task.auxiliary is not None
        return task.sgd(task.loss, task.init(), task.auxiliary.batches(1))

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        assert task.auxiliary is None and task.public is not None
        self.seen.append(("client", task.round, stream(task.public)))
        return shared, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        assert task.auxiliary is not None and task.public is not None
        self.seen.append(("public", task.round, stream(task.public)))
        self.seen.append(("auxiliary", task.round, stream(task.auxiliary)))
        self.seen.append(("part", task.round, task.auxiliary.part(0.5, "v")[1].index.tolist()))
        return server


def stream(data: LocalData) -> Any:
    """What the first two batches are, and their labels."""
    return [(batch.example.tolist(), batch.y.tolist()) for batch in data.batches(steps=2)]


def digests(images: Tensor) -> set[bytes]:
    return {hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images}


def only(algos: str = "tuned", **more: Any) -> Run:
    (run,) = sweep(algos, **more).expand()
    return run


def sweep(algos: str, auxiliary: str | None = "own:4", dataset: str = "digits", **more: Any) -> Sweep:
    given = {} if auxiliary is None else {"auxiliary": auxiliary}
    overrides = {"rounds": 2, "epochs": 1, **given, **more.pop("overrides", {})}
    return Sweep(
        algorithms=tuple(parse_algorithms(algos)),
        datasets=(parse_dataset(dataset),),
        overrides=overrides,
        **{"data_root": NO_DATA, **more},
    )


def digits() -> Splits:
    splits: Splits = DATASETS["digits"]().load(NO_DATA)
    return splits


# In a run of the toy problem --------------------------------------------------------------------------------


def test_labelled_images_are_at_the_server_and_public_ones_everywhere_the_same() -> None:
    Looks.seen.clear()
    outcome = toy.finish(toy.run(Looks(), setting=replace(toy.SETTING, rounds=2))).outcome()
    told: dict[tuple[str, int], set[str]] = {}
    for where, round, what in Looks.seen:
        told.setdefault((where, round), set()).add(str(what))
    assert all(len(found) == 1 for found in told.values())  # the same to every client
    assert told["client", 0] == told["public", 0] != told["client", 1] == told["public", 1]
    assert told["auxiliary", 0] != told["auxiliary", 1] and told["auxiliary", 0] != told["public", 0]
    assert told["part", 0] == told["part", 1]
    assert labels("client") == {-1} and labels("auxiliary") == set(range(6))
    counted = 60 + 2 * (2 * 16 + 2 * 16)  # before the first round, and two batches of each in both
    assert outcome.cost["server_samples"] == counted


def labels(where: str) -> set[int]:
    return {y for place, _, what in Looks.seen if place == where for _, ys in what for y in ys}


def test_images_at_the_server_are_nobodys() -> None:
    splits = toy.Toy().load()
    split = toy.split(splits)
    task = toy.run(Looks()).task
    assert task.auxiliary is not None and task.public is not None
    assert task.auxiliary.class_counts.tolist() == [10] * 6 and not task.public.class_counts.any()
    assert isinstance(splits.train_x, Tensor) and isinstance(splits.test_x, Tensor)
    reserve = toy.reserve(splits, split, Looks())
    assert reserve is not None and torch.equal(splits.train_y[reserve.labelled], task.auxiliary.y)
    apart = [splits.train_x[torch.cat(split.clients)], splits.test_x]
    apart += [splits.train_x[rows] for rows in (reserve.labelled, reserve.public)]
    found = [digests(images) for images in apart]
    assert len(set.union(*found)) == sum(map(len, apart)) == 192 + 180 + (480 - 192)


def test_what_the_server_processes_is_a_cost_of_its_own() -> None:
    cost = toy.finish(toy.run(ALGORITHMS["tuned"]())).outcome().cost
    plain = toy.finish(toy.run(ALGORITHMS["fedavg"]())).outcome().cost
    assert cost["server_samples"] == toy.SETTING.rounds * 3 * 7
    assert plain["server_samples"] == 0 and cost["train_samples"] == plain["train_samples"]


def test_public_images_at_clients_are_their_samples_in_both_engines() -> None:
    for engine in ("serial", "stacked"):
        run = toy.finish(toy.run(ALGORITHMS["distilled"](), engine, setting=replace(toy.SETTING, rounds=1)))
        plain = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=replace(toy.SETTING, rounds=1)))
        cost = run.outcome().cost
        more = (cost["train_samples"] or 0) - (plain.outcome().cost["train_samples"] or 0)
        assert more == 2 * 8 * len(run.population.cohort(0))
        assert cost["server_samples"] == pytest.approx((480 - 192 - 60) / 3)


@pytest.mark.parametrize("name", ["tuned", "distilled"])
def test_a_method_with_images_at_the_server_keeps_the_contract(name: str) -> None:
    left_out = ("learns the toy problem", "test data stay out of training")
    found = {promise: keep for promise, keep in checks.ALGORITHM_PROMISES.items() if promise not in left_out}
    for keep in found.values():
        keep(ALGORITHMS[name])


def test_a_method_with_images_at_the_server_says_so_in_its_tier() -> None:
    class Modest(Looks):
        tier: ClassVar[str] = "S"

    with pytest.raises(ContractBroken, match="tier A"):
        checks.ALGORITHM_PROMISES["its tier says what the server has"](Modest)


def test_the_server_does_without_where_the_run_has_none() -> None:
    splits = toy.Toy().load()
    job = Job(ALGORITHMS["tuned"](), toy.Toy(), splits, toy.split(splits), toy.SETTING, 0, "serial")
    with pytest.raises(BadConfig, match="Tuned needs images at the server, and this run has none"):
        surroundings(job)


def toy_job(name: str, lent: bool = False, engine: str = "stacked") -> Job:
    splits = toy.Toy().load()
    split, algorithm = toy.split(splits), ALGORITHMS[name]()
    reserve = toy.reserve(splits, split, algorithm)
    assert reserve is not None
    if lent:
        x = Lent(splits.train_x)
        splits, reserve = replace(splits, train_x=x), replace(reserve, x=x)
    return Job(algorithm, toy.Toy(), splits, split, toy.SETTING, 0, engine, reserve=reserve)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("name", ["tuned", "distilled"])
def test_images_at_the_server_may_stay_in_a_file(name: str, engine: str) -> None:
    assert left(Going(toy_job(name, True, engine))) == left(Going(toy_job(name, False, engine)))


def _others(name: str) -> Surroundings:
    return surroundings(toy_job(name))


@pytest.mark.parametrize("name", ["tuned", "distilled"])
def test_every_process_of_a_crew_has_them(name: str) -> None:
    crew, ray = hired(partial(_others, name), size=2)
    assert left(Going(toy_job(name), crew=crew)) == left(Going(toy_job(name)))
    assert ray.handed_out > 0


def test_a_run_that_is_taken_up_counts_on(tmp_path: Path) -> None:
    run = toy.run(Looks(), checkpoint=tmp_path / "run.pt")
    run.saved = -math.inf
    run.step()
    taken_up = toy.finish(toy.run(Looks(), checkpoint=tmp_path / "run.pt"))
    assert taken_up.outcome().cost["server_samples"] == toy.finish(toy.run(Looks())).outcome().cost["server_samples"]


# Which images -----------------------------------------------------------------------------------------------


def chosen(text: str, splits: Splits, needs: frozenset[str] = auxiliary.NEEDS, **changes: Any) -> auxiliary.Reserve:
    setting: Setting = replace(only().setting, **changes)
    return auxiliary.reserve(auxiliary.parse(text), needs, DATASETS["digits"](), splits, setting, NO_DATA)


@pytest.mark.parametrize("seed", [0, 1])
def test_own_images_are_those_that_the_tail_cut_away(seed: int) -> None:
    splits = digits()
    assert isinstance(splits.train_x, Tensor) and isinstance(splits.test_x, Tensor)
    found = chosen("own:4", splits)
    assert torch.bincount(found.y, minlength=10).tolist() == [4] * 10
    assert torch.equal(found.y, splits.train_y[found.labelled])
    split = make_split(splits.labels, 10, only().setting, seed)
    dealt = torch.cat(split.clients)
    everybody = torch.cat([dealt, found.labelled, found.public])
    assert torch.equal(everybody.sort().values, torch.arange(len(splits.train_y)))
    pictures = [digests(splits.train_x[rows]) for rows in (dealt, found.labelled, found.public)]
    pictures.append(digests(splits.test_x))
    assert len(set.union(*pictures)) == sum(map(len, pictures))


def test_fewer_own_images_are_among_more_and_a_kind_that_is_not_needed_is_left_out() -> None:
    splits = digits()
    few, more = (set(chosen(text, splits).labelled.tolist()) for text in ("own:2", "own:4"))
    assert len(few) == 20 and few < more
    found = chosen("own:4", splits, frozenset({"auxiliary"}))
    assert len(found.public) == 0 and len(found.labelled) == 40
    found = chosen("own:0", splits, frozenset({"public"}))
    assert len(found.labelled) == len(found.y) == 0
    assert len(found.public) == 1297 - len(subsample(splits.train_y, 10, "exponential", 10.0))


def test_own_images_are_found_where_only_some_are_held() -> None:
    splits = digits()
    assert isinstance(splits.train_x, Tensor)
    kept = torch.from_numpy(subsample(splits.train_y, 10, "exponential", 10.0))
    whole = chosen("own:4", splits, frozenset({"auxiliary"}))
    held = torch.cat([kept, whole.labelled]).sort().values
    part = chosen("own:4", replace(splits, train_x=splits.train_x[held], held=held), frozenset({"auxiliary"}))
    assert isinstance(part.x, Tensor) and torch.equal(part.x[part.labelled], splits.train_x[whole.labelled])
    assert torch.equal(part.y, whole.y)


def test_images_of_another_dataset_are_none_of_the_runs_own() -> None:
    splits, other = digits(), DATASETS["paired"]().load(NO_DATA)
    assert (
        isinstance(splits.train_x, Tensor) and isinstance(splits.test_x, Tensor) and isinstance(other.train_x, Tensor)
    )
    kept = splits.train_x[torch.from_numpy(subsample(splits.train_y, 10, "exponential", 10.0))]
    known = digests(kept) | digests(splits.test_x)
    free = [hashlib.sha256(image.numpy().tobytes()).digest() not in known for image in other.train_x]
    assert 0 < sum(free) - 90 < 40  # those that the tail cut away may be taken, and no test image
    found = chosen("paired:3", splits)
    assert torch.bincount(found.y, minlength=10).tolist() == [3] * 10
    rows = torch.cat([found.labelled, found.public]).sort().values
    assert rows.tolist() == np.flatnonzero(free).tolist()
    assert digests(other.train_x[rows]).isdisjoint(known)
    assert sorted(chosen("paired", splits, frozenset({"auxiliary"})).labelled.tolist()) == rows.tolist()
    held = torch.from_numpy(np.sort(subsample(splits.train_y, 10, "exponential", 10.0)))
    again = chosen("paired:3", replace(splits, train_x=splits.train_x[held], held=held))
    assert torch.equal(again.labelled, found.labelled)


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("own:5", {}, "auxiliary = own:5: 5 images of each class are wanted that nobody has, and of class 0 there are "
         "4; ask for 4 at most, or for those of another dataset"),
        ("own:1", {"imbalance": 1.0}, "of class 0 there are 0; use those of another dataset"),
        ("own:0", {"imbalance": 1.0}, "no public image is left"),
        ("paired:99", {}, "99 images of each class are wanted"),
        ("paired", {}, "no public image is left"),
    ],
)  # fmt: skip
def test_too_few_images_are_said_from_labels_alone(text: str, changes: dict[str, Any], said: str) -> None:
    setting = replace(only().setting, **changes)
    look = partial(auxiliary.rows_wanted, auxiliary.parse(text), auxiliary.NEEDS, DATASETS["digits"]())
    with pytest.raises(BadConfig, match=said):
        look(digits().labels, setting, NO_DATA)
    with pytest.raises(BadConfig, match=said):
        chosen(text, digits(), **changes)


@pytest.mark.parametrize("text", ["own", "own:", "own:x", "own:-1", "own:2:3", "", ":4"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="own:N, DATASET or DATASET:N is wanted"):
        auxiliary.parse(text)


def test_a_dataset_is_spelt_in_one_way() -> None:
    spelt = {" own : 4 ": "own:4", "paired()": "paired", "paired(each=9):07": "paired:7", "paired(each=3)": None}
    for text, wanted in spelt.items():
        assert str(auxiliary.parse(text)) == (wanted or text)
    with pytest.raises(UnknownPlugin, match="did you mean paired"):
        auxiliary.parse("pairs:3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digits:3", "those are the run's own images; say own:N"),
        ("cifar10:3", r"its image_shape is \(3, 32, 32\), that of digits \(1, 8, 8\); they must be equal"),
        ("femnist:3", "its num_classes is 62"),
        ("folder(path='x'):3", "those are somebody's own files"),
    ],
)
def test_a_dataset_of_another_kind_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        only(auxiliary=text)


def test_pixels_of_another_scale_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS["paired"], "scale", 255.0)
    with pytest.raises(BadConfig, match=r"its scale is 255\.0, that of digits 16\.0"):
        only(auxiliary="paired:3")


# Runs that need them, and runs that do not ------------------------------------------------------------------


def test_a_method_that_needs_some_is_refused_without() -> None:
    with pytest.raises(BadConfig, match=r"tuned needs images at the server \(auxiliary\); say which with --auxiliary"):
        only(auxiliary=None)
    with pytest.raises(BadConfig, match="auxiliary = own:0, and tuned needs labelled images"):
        only(auxiliary="own:0")
    with pytest.raises(BadConfig, match=r"auxiliary = paired, and distilled needs public images.*: paired:0"):
        only("distilled", auxiliary="paired")


def test_what_nobody_needs_is_refused() -> None:
    with pytest.raises(BadConfig, match="--auxiliary own:4: nothing that is run needs images at the server"):
        sweep("fedavg,ditto").expand()


def test_other_runs_are_what_they_were_and_stand_in_the_same_table() -> None:
    alone = only("fedavg", auxiliary=None)
    beside, tuned = sweep("fedavg,tuned").expand()
    assert (beside.id, beside.identity(), execution.document(beside, None)["setting"]) == (
        alone.id, alone.identity(), execution.document(alone, None)["setting"],
    )  # fmt: skip
    assert beside.setting.auxiliary is None and tuned.protocol == alone.protocol
    assert tuned.identity()["algorithm"]["auxiliary"] == {"images": "own:4"}
    assert "auxiliary" not in tuned.identity()["setting"] and "auxiliary" not in tuned.overrides()
    assert tuned.label == "tuned [auxiliary own:4]"
    others = [only(auxiliary="own:3"), only(auxiliary="paired:3"), only(auxiliary="paired"), tuned]
    assert len({run.id for run in others}) == 4 and len({run.protocol for run in others}) == 1
    assert only(auxiliary="paired():3").id == others[1].id
    assert others[1].identity()["algorithm"]["auxiliary"]["dataset"]["name"] == "paired"


def test_too_few_are_said_before_anything_runs() -> None:
    driver.check_data(sweep("fedavg,tuned").expand())
    for runs in (sweep("tuned", auxiliary="own:5").expand(), sweep("fedavg,tuned", auxiliary="own:5").expand()):
        with pytest.raises(BadConfig, match="of class 0 there are 4"):
            driver.check_data(runs)


def test_the_images_of_every_dataset_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(source, "verify", lambda dataset, root: compared.append(f"{label(dataset)} in {root}"))
    driver.verify_data([*sweep("fedavg,tuned").expand(), only(auxiliary="paired:3"), only("fedavg", auxiliary=None)])
    assert compared == [f"digits in {NO_DATA}", f"paired in {NO_DATA}"]


def test_another_dataset_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(dataset: object, root: Path) -> None:
        raise DataMissing("its photographs are not prepared")

    monkeypatch.setattr(DATASETS["paired"], "require", missing)
    with pytest.raises(DataMissing, match="not prepared"):
        driver.check_data(sweep("tuned", auxiliary="paired:3").expand())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, plugins: dict[str, Path]) -> Path:
    """Real runs on digits: one without, two with images at the server, one with those of another dataset."""
    out = tmp_path_factory.mktemp("published")
    runs = sweep("fedavg,tuned,tuned(warm=True),distilled").expand() + sweep("tuned", auxiliary="paired:3").expand()
    assert {result.status for result in driver.run(runs, out, pool=InProcess())} == {"done"}
    return out


@pytest.fixture
def out(published: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(published, tmp_path / "results"))


def problems(out: Path, folder: Path) -> str:
    return "\n".join(map(str, validate(out, NO_DATA, [folder]).problems))


def test_their_results_stand_in_one_table_and_hold_together(published: Path) -> None:
    found, _ = records.read_all(published)
    (board,) = leaderboards(found)
    assert {row.label: row.tier for row in board.rows} == {
        "fedavg": "S",
        "tuned [auxiliary own:4]": "A",
        "tuned(warm=True) [auxiliary own:4]": "A",
        "tuned [auxiliary paired:3]": "A",
        "distilled [auxiliary own:4]": "A",
    }
    assert "auxiliary" not in board.overrides and "auxiliary" not in board.setting
    for record in found:
        assert bool(record.cost["server_samples"]) == (record.algorithm != "fedavg")
        assert not problems(published, record.folder)
        assert rebuild(record).run(NO_DATA).id == record.id


def test_published_runs_can_be_run_again(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspected = validate(published, NO_DATA, sorted(path for path in published.iterdir() if path.is_dir())).inspected
    runs = candidates(inspected, NO_DATA)
    assert len(runs) == 5
    for one in inspected:
        if one.record is not None and one.record.label == "tuned [auxiliary own:4]":
            assert rerun(one.record, runs[one.record.id]).agrees

    def missing(dataset: object, root: Path) -> None:
        raise DataMissing("its photographs are not prepared")

    monkeypatch.setattr(DATASETS["paired"], "require", missing)
    assert len(candidates(inspected, NO_DATA)) == 4


def test_a_tracked_run_says_which_images(published: Path) -> None:
    for record in records.read_all(published)[0]:
        described = of_record(record)
        assert described == of_run(rebuild(record).run(NO_DATA))
        images = described.params.get("algorithm.auxiliary", "")
        assert ("own:4" in images or "paired:3" in images) == (record.algorithm != "fedavg")


@pytest.mark.parametrize(
    ("label", "change", "said"),
    [
        ("tuned [auxiliary own:4]", lambda d: d["cost"].update(server_samples=None), "cost.server_samples"),
        ("fedavg", lambda d: d["cost"].update(server_samples=1.0), "cost.server_samples"),
        ("fedavg", lambda d: d["identity"]["algorithm"].update(auxiliary={"images": "own:4"}), "algorithm.auxiliary"),
        ("tuned [auxiliary own:4]", lambda d: d["identity"]["algorithm"].pop("auxiliary"), "algorithm.auxiliary"),
        ("tuned [auxiliary own:4]", lambda d: d["identity"]["algorithm"].update(auxiliary="own:4"), "names no images"),
        ("tuned [auxiliary own:4]", lambda d: d["identity"]["algorithm"].update(auxiliary={"images": 4}), "names no"),
        (
            "tuned [auxiliary own:4]",
            lambda d: d["identity"]["algorithm"].update(auxiliary={"images": "own:04"}),
            "identity.algorithm is not as this code writes it",
        ),
        (
            "tuned [auxiliary own:4]",
            lambda d: d["identity"]["algorithm"].update(auxiliary={"images": "folder(path='/'):2"}),
            "somebody's own files",
        ),
        (
            "tuned [auxiliary paired:3]",
            lambda d: d["identity"]["algorithm"]["auxiliary"]["dataset"].update(version=2),
            "identity.algorithm is not as this code writes it",
        ),
        ("tuned [auxiliary own:4]", lambda d: d.update(label="tuned"), "label"),
        ("tuned [auxiliary own:4]", lambda d: d["setting"].update(auxiliary="own:9"), "setting.auxiliary"),
    ],
)  # fmt: skip
def test_what_is_said_of_them_must_hold_together(out: Path, label: str, change: Any, said: str) -> None:
    (folder,) = (record.folder for record in records.read_all(out)[0] if record.label == label)
    document = json.loads((folder / "run.json").read_text())
    change(document)
    document["id"] = identify(document["identity"])
    (folder / "run.json").write_text(json.dumps(document))
    assert said in problems(out, folder.rename(out / document["id"]))


def test_an_identity_that_names_none_is_not_rebuilt(published: Path) -> None:
    (record,) = (each for each in records.read_all(published)[0] if each.algorithm == "distilled")
    algorithm: Any = record.identity["algorithm"]
    wrong = replace(record, identity={**record.identity, "algorithm": {**algorithm, "auxiliary": None}})
    with pytest.raises(CannotRebuild, match="has it if it needs images at the server"):
        rebuild(wrong)


def test_a_pack_must_hold_them_too(tmp_path: Path) -> None:
    splits, dataset = digits(), DATASETS["digits"]()
    kept = torch.from_numpy(subsample(splits.train_y, 10, "exponential", 10.0))
    pack.write(tmp_path / "tail.npz", dataset, splits, kept, "exponential", 10.0)
    pack.write(tmp_path / "whole.npz", dataset, splits, torch.arange(len(splits.train_y)), "exponential", None)
    driver.check_data(sweep("fedavg", auxiliary=None, data_root=tmp_path / "tail.npz").expand())
    for look in (driver.check_data, lambda runs: execution.job(runs[0])):
        with pytest.raises(DataMissing, match="lacks 40 images of this run"):
            look(sweep("tuned", data_root=tmp_path / "tail.npz").expand())
    rows = torch.cat([kept, chosen("own:4", splits).labelled])
    pack.write(tmp_path / "some.npz", dataset, splits, rows, "exponential", 10.0)
    driver.check_data(sweep("fedavg,tuned", data_root=tmp_path / "some.npz").expand())
    with pytest.raises(DataMissing, match="lacks"):
        driver.check_data(sweep("tuned,distilled", data_root=tmp_path / "some.npz").expand())
    for algos in ("tuned", "distilled"):
        packed, plain = only(algos, data_root=tmp_path / "whole.npz"), only(algos)
        driver.check_data([packed])
        assert packed.id == plain.id
        a, b = (execution.job(run).reserve for run in (packed, plain))
        assert a is not None and b is not None and isinstance(a.x, Tensor) and isinstance(b.x, Tensor)
        assert torch.equal(a.x[a.labelled], b.x[b.labelled]) and torch.equal(a.x[a.public], b.x[b.public])


def test_a_run_that_needs_some_can_be_probed() -> None:
    assert forecast.probe(only("distilled")).seconds > 0
    one, other = (cell(only(auxiliary=text)) for text in ("own:3", "own:4"))
    assert one != other


def test_states_differ_where_the_server_has_other_images(published: Path) -> None:
    found = {record.label: record.document["digest"] for record in records.read_all(published)[0]}
    assert len(set(found.values())) == 5


def test_engines_agree_on_a_real_split() -> None:
    ended = []
    for engine in ("serial", "stacked"):
        run = replace(only("distilled"), engine=engine)
        going = toy.finish(Going(execution.job(run)))
        ended.append((going.progress.server, going.outcome().cost["train_samples"]))
    assert tree.largest_difference(ended[0][0], ended[1][0]) < 2e-4
    assert ended[0][1] == ended[1][1]


# As a person uses it ----------------------------------------------------------------------------------------


def test_the_command_runs_tells_and_tunes(bench: Bench, plugins: dict[str, Path]) -> None:
    given = ("--plugin", plugins["tuned"], "--rounds", "2")
    _, refused = bench("run", "--algos", "tuned", *given, *OFF, status=2)
    assert "tuned needs images at the server (auxiliary); say which with --auxiliary, such as own:10" in refused
    _, refused = bench("run", "--algos", "tuned", "--auxiliary", "own:10", *given, *OFF, status=2)
    assert "of class 0 there are 4; ask for 4 at most" in refused
    _, refused = bench("run", "--set", "auxiliary=own:4", *given, *OFF, status=2)
    assert "--set auxiliary: use --auxiliary" in refused
    out, _ = bench("run", "--algos", "fedavg,tuned", "--auxiliary", "own:4", *given, *OFF)
    assert [run["call"] for run in json.loads(out)["runs"]] == ["fedavg", "tuned [auxiliary own:4]"]
    bench("run", "--algos", "tuned", "--auxiliary", "own:3", *given, *OFF)
    out, _ = bench("compare", "--metric", "generic", "--json")
    assert "tuned [auxiliary own:3]" in out and "tuned [auxiliary own:4]" in out
    out, _ = bench("table", "--format", "md")
    assert "`tuned [auxiliary own:4]` | A" in out
    asked = ("tune", "--algos", "tuned", "--auxiliary", "own:4", "--trials", "2", "--fields", "steps", *given)
    out, _ = bench(*asked, "--ray", "off", "--json")
    assert "tuned" in out
    both = ("tune", "--algos", "tuned,fedavg", "--auxiliary", "own:5", "--trials", "2", *given)
    _, refused = bench(*both, "--ray", "off", "--json", status=2)
    assert "of class 0 there are 4" in refused
