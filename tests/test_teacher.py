"""A teacher's features: from which file, to whom, what a run says of them, and that nobody else's run is touched."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bench as door
from bench import Algorithm, LocalData, Task, Tree, keys
from bench.contract import checks, toy
from bench.contract.promises import ContractBroken
from bench.models import teacher
from bench.models.teacher import BadTeacher, Features, Teacher
from bench.plugins.registry import DATASETS, load_plugin
from bench.protocol.identity import identify
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms, parse_dataset
from bench.results import records
from bench.results.entrants import entrants
from bench.results.leaderboard import leaderboards
from bench.sweep import driver, execution, forecast
from bench.sweep.config import Sweep
from bench.sweep.pool import InProcess
from bench.sweep.run import Run
from bench.tracking.described import of_record, of_run
from bench.training.crew import Surroundings
from bench.training.job import Job, surroundings
from bench.training.rounds import Run as Going
from bench.validation.rebuilding import rebuild
from bench.validation.report import validate
from bench.validation.rerun import candidates, obstacle
from tests.test_crew import hired, left
from tests.test_plugins import OFF, Bench
from tests.test_plugins import bench as bench
from tests.test_population import Lent
from tests.trees import odd

NO_DATA = Path("no data here")
"""Digits need none."""
IMAGES, CLASSES, WIDTH = 1297, 10, 4
"""Of digits' training part."""

TAUGHT = '''
"""Taught: FedAvg that draws its head to the texts, and its features' sums to those of the teacher.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, register, tree
from bench.losses import mean


@register("taught")
@dataclass(frozen=True, kw_only=True)
class Taught(Algorithm):
    tier: ClassVar[str] = "V"
    needs: ClassVar[frozenset[str]] = frozenset({"body", "teacher"})
    pull: float = 0.1

    def local_update(self, task, shared, private, data):
        def loss(params, batch):
            z = task.model.features(params["body"], batch.x)
            apart = (z.sum(1) - data.teacher[batch.example].sum(1)).square()
            return task.criterion(task.model.logits(params["head"], z), z, batch) + self.pull * mean(apart, batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task, server, uploads):
        model = uploads.mean()
        bias = model["head"]["bias"] + task.teacher.mean(1)
        return tree.merge(server, {**model, "head": {**model["head"], "bias": bias}})
'''


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method that needs a teacher."""
    file = tmp_path_factory.mktemp("plugins") / "taught.py"
    file.write_text(TAUGHT)
    load_plugin(file)
    return file


def written(file: Path, seed: int = 0, **changes: Tensor | None) -> Path:
    """Write a teacher of digits, with other tensors, or without one."""
    key = keys.key(seed)
    usual = {"images": keys.normal(key, IMAGES, WIDTH), "texts": keys.normal(keys.fold(key, 1), CLASSES, WIDTH)}
    save_file({name: leaf.contiguous() for name, leaf in (usual | changes).items() if leaf is not None}, file)
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("teachers") / "clip.safetensors")


def sweep(algos: str, file: Path | None, **more: Any) -> Sweep:
    return Sweep(
        algorithms=tuple(parse_algorithms(algos)),
        datasets=(parse_dataset("digits"),),
        overrides={"rounds": 2, "epochs": 1, **more.pop("overrides", {})},
        teacher=file,
        **{"data_root": NO_DATA, **more},
    )


def only(file: Path | None, algos: str = "taught", **more: Any) -> Run:
    (run,) = sweep(algos, file, **more).expand()
    return run


# The file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_features_are_read_as_they_were_written(dtype: torch.dtype, tmp_path: Path) -> None:
    images, texts = torch.arange(6.0).reshape(3, 2), torch.tensor([[0.5, -2.0]])
    save_file({"images": images.to(dtype), "texts": texts.to(dtype)}, tmp_path / "mine")
    found = teacher.named(tmp_path / "mine").read(3, 1)
    assert torch.equal(found.images, images) and torch.equal(found.texts, texts)
    assert {leaf.dtype for leaf in found} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": torch.zeros(5, WIDTH)}, r"images is \(5, 4\) float32, and \(1297, d\) floats are wanted, a row for "
         "each training image"),
        ({"texts": torch.zeros(3, WIDTH)}, r"texts is \(3, 4\) float32, and \(10, d\) floats are wanted, a row for "
         "each class"),
        ({"texts": torch.zeros(CLASSES, 5)}, r"images is \(1297, 4\).*d alike for both"),
        ({"texts": torch.zeros(CLASSES)}, "wanted"),
        ({"texts": torch.zeros(())}, "wanted"),
        ({"images": torch.zeros(IMAGES, 0), "texts": torch.zeros(CLASSES, 0)}, r"images is \(1297, 0\)"),
        ({"images": torch.zeros(IMAGES, WIDTH).int()}, r"images is \(1297, 4\) int32"),
        ({"texts": torch.full((CLASSES, WIDTH), float("nan"))}, "texts is not finite"),
        ({"images": torch.full((IMAGES, WIDTH), 1e300, dtype=torch.float64)}, "images is not finite"),
        ({"texts": None}, "holds images; a file of safetensors with `images` and `texts` is wanted, and no more"),
        ({"labels": torch.zeros(2)}, "holds images, labels, texts; a file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_dataset_is_said_before_anything_runs(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = only(written(tmp_path / "clip.safetensors", **changes))
    for look in (lambda: driver.check_data([run]), lambda: execution.job(run)):
        with pytest.raises(BadTeacher, match=said):
            look()


@pytest.mark.parametrize("content", [b"", b"words", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(BadTeacher, match=r"mine cannot be read \(\w+\); a file of safetensors"):
        teacher.named(tmp_path / "mine").read(3, 1)


def test_what_cannot_be_opened_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadTeacher, match=r"absent cannot be read \(No such file or directory\); a file of"):
        teacher.named(tmp_path / "absent")
    for kind in ("pipe", "link to a device"):
        with pytest.raises(BadTeacher, match="it is a pipe or a device, and no file"):
            teacher.named(odd(tmp_path / kind, kind))
    monkeypatch.setattr("bench.system.reading.MOST", 1000)
    with pytest.raises(BadTeacher, match="more than 1,000 bytes"):
        teacher.named(written(tmp_path / "large"))


def test_a_file_that_changes_in_between_is_not_read(tmp_path: Path) -> None:
    run = only(written(tmp_path / "clip.safetensors"))
    execution.job(run)
    written(tmp_path / "clip.safetensors", seed=1)
    with pytest.raises(BadTeacher, match="has changed since it was named"):
        execution.job(run)


# Who is given what ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looks(Algorithm):
    """FedAvg that notes what it is shown."""

    tier: ClassVar[str] = "V"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        assert data.teacher is not None
        for batch in data.batches(1, views=2):
            self.seen.append((batch.x, data.teacher[batch.example]))
        return shared, private


def toy_job(algorithm: Algorithm, engine: str = "serial", lent: bool = False) -> Job:
    splits = toy.Toy().load()
    features, dealt = toy.teacher(splits, algorithm), toy.split(splits)
    if lent:
        splits = replace(splits, train_x=Lent(splits.train_x))
    return Job(algorithm, toy.Toy(), splits, dealt, toy.SHORT, 0, engine, teacher=features)


def test_every_image_has_its_own_row_and_every_class_its_own() -> None:
    Looks.seen.clear()
    run = toy.finish(Going(toy_job(Looks())))
    splits = toy.Toy().load()
    features = toy.teacher(splits, Looks())
    assert features is not None and isinstance(splits.train_x, Tensor)
    everything = (splits.train_x / 255 - 0.5) / 0.2
    found = 0
    for x, rows in Looks.seen:
        for image, row in zip(x, rows, strict=True):
            (place,) = torch.nonzero((everything - image).abs().amax((1, 2, 3)) < 1e-5).flatten().tolist()
            assert torch.equal(row, features.images[place])
            found += 1
    assert found > 100 and run.task.teacher is not None and torch.equal(run.task.teacher, features.texts)


def test_who_does_not_ask_is_given_none() -> None:
    (fedavg,) = parse_algorithms("fedavg")
    job = toy_job(fedavg)
    splits = toy.Toy().load()
    here = surroundings(replace(job, teacher=toy.teacher(splits, Looks())))
    assert here.task.teacher is None and here.population.images.teacher is None
    with pytest.raises(BadConfig, match="Looks needs a teacher, and this run has none"):
        surroundings(replace(job, algorithm=Looks()))


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_images_may_stay_in_a_file(engine: str) -> None:
    (taught,) = parse_algorithms("taught")
    assert left(Going(toy_job(taught, engine, lent=True))) == left(Going(toy_job(taught, engine)))


def _others(engine: str) -> Surroundings:
    (taught,) = parse_algorithms("taught")
    return surroundings(toy_job(taught, engine))


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_every_process_of_a_crew_has_it(engine: str) -> None:
    crew, ray = hired(partial(_others, engine), size=2)
    (taught,) = parse_algorithms("taught")
    assert left(Going(toy_job(taught, engine), crew=crew)) == left(Going(toy_job(taught, engine)))
    assert ray.handed_out > 0


@pytest.mark.parametrize(("tier", "kept"), [("V", True), ("L", False)])
def test_the_contract_wants_the_tier_of_pretrained_models(tier: str, kept: bool) -> None:
    promise = checks.ALGORITHM_PROMISES["its tier says what the server has"]
    kind = type("Mine", (Looks,), {"tier": tier})
    if kept:
        promise(kind)
        return
    with pytest.raises(ContractBroken, match="needs teacher, which is tier V"):
        promise(kind)


# Runs that need it, and runs that do not --------------------------------------------------------------------


def test_a_method_that_needs_one_is_refused_without_and_one_that_nobody_needs_too(clip: Path) -> None:
    with pytest.raises(BadConfig, match=r"taught needs a teacher's features .*; name their file with --teacher"):
        only(None)
    optional = sweep("fedavg,taught", None, optional=tuple(parse_algorithms("taught")))
    assert [run.label for run in optional.expand()] == ["fedavg"]
    assert optional.left_out()[0].startswith("left out of the set: taught needs a teacher's features")
    with pytest.raises(BadConfig, match=r"--teacher clip\.safetensors: nothing that is run needs a teacher"):
        sweep("fedavg,ditto", clip).expand()
    with pytest.raises(BadConfig, match="shift = blur: the teacher of taught saw the images as they are; leave the"):
        only(clip, overrides={"shift": "blur"})


def test_other_runs_are_what_they_were_and_stand_in_the_same_table(clip: Path, tmp_path: Path) -> None:
    alone = only(None, "fedavg")
    beside, taught = sweep("fedavg,taught", clip).expand()
    assert (beside.id, beside.identity()) == (alone.id, alone.identity())
    assert execution.document(beside, None).keys() == execution.document(alone, None).keys()
    assert beside.teacher is None and taught.protocol == alone.protocol
    digest = teacher.named(clip).digest
    assert taught.identity()["algorithm"]["teacher"] == digest and "teacher" not in taught.identity()
    assert taught.label == f"taught [teacher {digest[:8]}]" and "teacher" not in taught.overrides()
    assert execution.document(taught, None)["teacher"] == "clip.safetensors"
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(clip.read_bytes())
    assert only(copied).id == taught.id != only(written(tmp_path / "clip.safetensors", seed=1)).id


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """Real runs: one without, two with different teachers of one name."""
    out = tmp_path_factory.mktemp("published")
    other = written(tmp_path_factory.mktemp("others") / "clip.safetensors", seed=1)
    runs = [*sweep("fedavg,taught", clip).expand(), only(other)]
    assert {result.status for result in driver.run(runs, out, pool=InProcess(), keep_models=True)} == {"done"}
    return out


def taught_in(out: Path) -> list[records.Record]:
    return [record for record in records.read_all(out)[0] if record.algorithm == "taught"]


def test_results_hold_together_and_the_board_cannot_run_them_again(published: Path) -> None:
    report = validate(published, NO_DATA)
    assert [problem.file for problem in report.problems] == ["README.md"]  # of which there is none
    assert len({record.document["digest"] for record in taught_in(published)}) == 2
    assert [run.algorithm.tier for run in candidates(report.inspected, NO_DATA).values()] == ["S"]
    for one in report.inspected:
        if one.record is not None and one.record.algorithm == "taught":
            assert obstacle(one, NO_DATA) == "it learns from somebody's own file of a teacher's features"
    for record in taught_in(published):
        again = rebuild(record).run(NO_DATA)
        assert again.id == record.id and of_record(record) == of_run(again)
        assert of_record(record).params["algorithm.teacher"] == again.identity()["algorithm"]["teacher"]


def test_different_teachers_are_different_rows(published: Path) -> None:
    (board,) = leaderboards(records.read_all(published)[0])
    assert len(board.rows) == 3 and "teacher" not in board.overrides
    assert len(entrants([board])) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["identity"]["algorithm"].pop("teacher"), "algorithm.teacher"),
        (lambda d: d["identity"]["algorithm"].update(teacher="clip.safetensors"), "must be the SHA-256 of a file"),
        (lambda d: d["identity"]["algorithm"].update(teacher="0" * 64), "label"),
        (lambda d: d.update(label="taught"), "label"),
        (lambda d: d.update(teacher="a\x1b[2J"), "must be text that can be seen"),
    ],
)
def test_what_is_said_of_it_must_hold_together(published: Path, change: Any, said: str, tmp_path: Path) -> None:
    document = json.loads((taught_in(published)[0].folder / "run.json").read_text())
    change(document)
    document["id"] = identify(document["identity"])
    folder = tmp_path / document["id"]
    folder.mkdir()
    for file in taught_in(published)[0].folder.glob("*.parquet"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "run.json").write_text(json.dumps(document))
    assert said in "\n".join(map(str, validate(tmp_path, NO_DATA, [folder]).problems))


def test_a_run_without_a_need_has_no_teacher(published: Path, tmp_path: Path) -> None:
    (record,) = (each for each in records.read_all(published)[0] if each.algorithm == "fedavg")
    document = json.loads((record.folder / "run.json").read_text())
    document["identity"]["algorithm"]["teacher"] = "0" * 64
    document["id"] = identify(document["identity"])
    (tmp_path / document["id"]).mkdir()
    (tmp_path / document["id"] / "run.json").write_text(json.dumps(document))
    found = validate(tmp_path, NO_DATA, [tmp_path / document["id"]]).problems
    assert any("has it if it needs a teacher" in str(problem) for problem in found)


def test_a_run_can_be_probed_and_its_teacher_is_read_for_it(clip: Path, tmp_path: Path) -> None:
    assert forecast.probe(only(clip)).seconds > 0
    with pytest.raises(BadTeacher, match="images is"):
        forecast.probe(only(written(tmp_path / "small", images=torch.zeros(3, WIDTH))))


# As a person uses it ----------------------------------------------------------------------------------------


def test_the_command_runs_tells_tunes_and_tests(bench: Bench, plugin: Path, clip: Path, tmp_path: Path) -> None:
    given = ("--plugin", plugin, "--rounds", "2")
    _, refused = bench("run", "--algos", "taught", *given, *OFF, status=2)
    assert "name their file with --teacher" in refused
    _, refused = bench("run", "--algos", "taught", "--teacher", tmp_path / "none", *given, *OFF, status=2)
    assert "none cannot be read (No such file or directory)" in refused
    small = written(tmp_path / "small", texts=torch.zeros(2, WIDTH))
    for verb in (("run", *OFF), ("tune", "--trials", "1", "--ray", "off", "--json")):
        _, refused = bench(verb[0], "--algos", "taught,fedavg", "--teacher", small, *given, *verb[1:], status=2)
        assert "texts is (2, 4) float32" in refused
    out, _ = bench("run", "--algos", "fedavg,taught", "--teacher", clip, "--keep-models", *given, *OFF)
    first, second = json.loads(out)["runs"]
    assert (first["call"], second["call"]) == ("fedavg", f"taught [{teacher.named(clip)}]")
    assert second["status"] == "done"
    out, _ = bench("eval", second["id"], "--plugin", plugin, "--json")
    assert sum(map(sum, json.loads(out)["models"]["generic"]["total"])) == 500
    tune = ("tune", "--algos", "taught", "--teacher", clip, "--trials", "2", "--fields", "lr", *given)
    out, _ = bench(*tune, "--ray", "off", "--json")
    assert "taught" in out


def test_python_takes_the_same_file(clip: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"ray": "off", "tracking_uri": "off", "rounds": 2, "out": tmp_path / "out"}
    (record,) = door.run("taught", teacher=str(clip), **how)
    assert record.label == f"taught [{teacher.named(clip)}]"
    assert isinstance(teacher.named(clip), Teacher) and isinstance(teacher.named(clip).read(IMAGES, CLASSES), Features)
    assert len(DATASETS["digits"]().load(NO_DATA).train_y) == IMAGES
