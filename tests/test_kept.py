"""Kept models: written in the last evaluation, read again here and by strangers, and the same counts by them."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bench import tree
from bench.data import Images
from bench.plugins.registry import DATASETS, load_plugin
from bench.results import kept, records
from bench.results.kept import Kept, Module, NotKept
from bench.results.record import DamagedResult, Record
from bench.results.retest import retest
from bench.sweep import config, driver, execution
from bench.sweep.config import parse_algorithms, parse_datasets
from bench.sweep.pool import InProcess
from bench.sweep.run import Run
from bench.training import keeping, rounds
from bench.training.outcome import Report
from bench.training.rounds import train
from bench.validation import submission
from bench.validation.report import validate
from tests.test_command import Bench, bench, process
from tests.test_crew import SETTING, _job, hired, toys

__all__ = ["bench"]  # a fixture

ROOT = Path(__file__).parents[1] / "no-such-data"
"""Digits are read from scikit-learn."""


def run(algorithms: str = "fedrep(head_epochs=1)", **asked: Any) -> Run:
    overrides = {"rounds": 2, "epochs": 1, **asked.pop("overrides", {})}
    return config.Sweep(
        algorithms=tuple(parse_algorithms(algorithms)),
        datasets=tuple(parse_datasets("digits")),
        overrides=overrides,
        data_root=ROOT,
        **asked,
    ).expand()[0]


def sweep(asked: Run, out: Path, **how: Any) -> driver.Result:
    [result] = driver.run([asked], out, pool=InProcess(), **how)
    return result


def done(asked: Run, out: Path, **how: Any) -> Record:
    """Do a run, and read it; that its identity says nothing of models is in the folder's name."""
    result = sweep(asked, out, **how)
    assert result.status == "done", result.reason
    return records.read(out / asked.id)


def counted(record: Record) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Give (correct, total) of the last evaluation by model, client and class."""
    frame = record.counts()
    frame = frame[frame["round"] == frame["round"].max()]
    cells = frame[["model", "client", "class", "correct", "total"]].itertuples(index=False)
    return {(model, client, c): (right, images) for model, client, c, right, images in cells}


def anew(asked: Run, record: Record) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Give the same of the kept models, by the run's own images and clients."""
    job, models = execution.job(asked), kept.load(record)
    network = models.network
    images = Images(job.splits.test_x, job.splits.test_y, network.mean, network.std, scale=network.scale)
    cells = {}
    for name, found in retest(models, images, job.split.tests).items():
        for k, client in enumerate(found.clients):
            for c in torch.nonzero(found.total[k]).flatten().tolist():
                cells[name, client, c] = int(found.correct[k, c]), int(found.total[k, c])
    return cells


def digest(models: Kept) -> str:
    states = (models.tree("clients", client) for client in models.clients("clients"))
    return tree.digest([models.tree("server"), *states])


STORED = run(overrides={"unseen": 2}, seeds=(1,))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedRep with two clients held out."""
    out = tmp_path_factory.mktemp("kept")
    done(STORED, out, keep_models=True)
    return out


@pytest.fixture
def out(stored: Path, tmp_path: Path) -> Path:
    """A copy to do things to."""
    return Path(shutil.copytree(stored, tmp_path / "runs"))


def only(out: Path) -> Record:
    [record], damaged = records.read_all(out)
    assert not damaged
    return record


# The same counts -----------------------------------------------------------------------------------------------------

SHORT = {"rounds": 1}
KINDS: dict[str, Run] = {
    "private heads, newcomers": run(overrides={"unseen": 2, "eval_clients": 7, "final_visit": True}),
    "stacked": run("ditto", engine="stacked", overrides=SHORT),
    "serial": run("ditto", engine="serial", overrides=SHORT),
    "adapted, with a curve": run("fedbabu(finetune_epochs=2)", overrides=SHORT),
    "corrected by a part": run("fedavg+tau_norm", overrides=SHORT),
    "variants": run("fedloge", overrides=SHORT),
    "scores of its own": run("knnper", overrides=SHORT),
    "a variant with scores of its own": run("fedproto", overrides=SHORT),
    "models written by the server": run("pfedhn", overrides=SHORT),
    "nothing sent": run("local", overrides=SHORT),
    "one place": run("centralised", overrides=SHORT),
    "an empty body": run("fedavg_prior", overrides={**SHORT, "model": "linear"}),
    "half the precision": run("fedavg", precision="bf16", overrides=SHORT),
    "statistics at the client": run(
        "fedavg",
        imbalance=(100.0,),
        overrides={**SHORT, "model": "resnet8", "norm": "batch", "statistics": "personal", "clients": 3},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_models_give_the_counts_and_the_digest_of_the_run(kind: str, tmp_path: Path) -> None:
    asked = KINDS[kind]
    record = done(asked, tmp_path, keep_models=True)
    wanted = {key: cell for key, cell in counted(record).items() if not key[0].endswith(".masked")}
    assert anew(asked, record) == wanted
    models = kept.load(record)
    assert digest(models) == record.document["digest"]
    assert {name for name, _, _ in wanted} == set(models.names())


BY_HAND = """
import json, sys
from pathlib import Path

import numpy, pandas, torch
from safetensors import safe_open

{recipe}

images = numpy.load("images.npz")
about = json.loads(safe_open("models/server.safetensors", "pt").metadata()["about"])["network"]
scale, mean, std = (torch.tensor(about[key])[..., None, None] for key in ("scale", "mean", "std"))
x = torch.from_numpy(images["x"]).float() * (1 / (scale * std)) - mean / std
predictions = pandas.read_parquet("predictions.parquet")
predictions = predictions[~predictions["model"].str.endswith(".masked")]
for (model, client), rows in predictions.groupby(["model", "client"]):
    own = images[f"rows {{client}}"]
    of = lambda path: tensors[f"{{model}}/{{client}}/{{path}}"]
    z = (x[own].flatten(1) @ of("body/hidden/weight").T + of("body/hidden/bias")).relu()
    scores = z @ of("head/weight").T + of("head/bias")
    found, told = numpy.zeros((2, 10, 10), dtype=int)
    numpy.add.at(found, (images["y"][own], scores.argmax(1).numpy()), 1)
    told[rows["class"], rows["predicted"]] = rows["count"]
    assert (found == told).all(), (model, client)
    print(model, client, told.trace(), told.sum())
assert not [name for name in sys.modules if name.partition(".")[0] == "bench"]
"""


def recipe() -> str:
    """Give the lines by which the docstring says how to read the files."""
    assert keeping.__doc__ is not None
    return textwrap.dedent(re.search(r"\n\n(    tensors = .*?)\n\n", keeping.__doc__, re.DOTALL)[1])  # type: ignore[index]


def test_strangers_need_torch_and_safetensors_alone(out: Path) -> None:
    record = only(out)
    job = execution.job(STORED)
    rows: dict[str, Any] = {f"rows {client}": own.numpy() for client, own in enumerate(job.split.tests)}
    assert isinstance(job.splits.test_x, Tensor)
    np.savez(record.folder / "images.npz", x=job.splits.test_x.numpy(), y=job.splits.test_y.numpy(), **rows)
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BY_HAND.format(recipe=recipe())]
    told = subprocess.run(command, cwd=record.folder, env=environment, capture_output=True, text=True, timeout=180)
    assert told.returncode == 0, told.stderr
    assert {line.split()[0] for line in told.stdout.splitlines()} >= {"personal", "personal:after", "unseen"}
    assert len(told.stdout.splitlines()) == 18 + 18 + 2 + 2


def test_a_fresh_process_gives_the_same_counts(out: Path) -> None:
    record = only(out)
    answer = process("eval", record.id[:5], "--clients", 20, "--out", out, "--json", cwd=out)
    assert answer.status == 0, answer.err
    told = json.loads(answer.out)
    found = {
        (name, client, c): (model["correct"][k][c], total)
        for name, model in told["models"].items()
        for k, client in enumerate(model["clients"])
        for c, total in enumerate(model["total"][k])
        if total
    }
    assert found == {key: cell for key, cell in counted(record).items() if not key[0].endswith(".masked")}
    for key, metric in (("right", ""), ("balanced", ".balanced"), ("worst_decile", ".worst_decile")):
        assert told["models"]["personal"][key] == record.metrics[f"personal{metric}"]


# What is in the files ------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


def test_equal_tensors_are_stored_once_and_keys_are_paths(out: Path) -> None:
    found = tensors(only(out).folder / "models")
    assert len({tree.digest([{"": leaf}]) for leaf in found.values()}) == len(found)
    bodies = sorted(key for key in found if key.endswith("body/hidden/weight") and not key.startswith("personal:after"))
    assert bodies == ["server/body/hidden/weight"]
    assert {"clients/initial/head/weight", "clients/3/head/weight", "personal:after/3/body/hidden/bias"} <= set(found)
    assert not [
        key for key in found if key.startswith("personal/3/")
    ]  # its body is the server's, its head the client's


def test_many_clients_are_several_files_and_none_refers_to_another(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_FILE_BYTES", 150_000)
    asked = STORED
    record = done(asked, tmp_path / "small", keep_models=True)
    names = ["clients-00000.safetensors", "clients-00001.safetensors", "clients-00002.safetensors"]
    assert sorted(record.models) == [*names, "server.safetensors"]
    assert all((record.folder / "models" / name).stat().st_size < 300_000 for name in names)
    whole, parts = kept.load(only(out)), kept.load(record)
    for name in ("personal", "personal:after", "unseen", "clients"):
        assert parts.clients(name) == whole.clients(name) != []
        for client in whole.clients(name):
            assert tree.digest([parts.tree(name, client)]) == tree.digest([whole.tree(name, client)])
    shared = set(tensors_of(record, "server.safetensors"))
    for name in names:
        with safe_open(record.folder / "models" / name, "pt") as opened:
            aliases = json.loads(opened.metadata()["about"])["aliases"]
        here = {*shared, *tensors_of(record, name), *aliases}
        assert all(any(f"{key}/".startswith(f"{place}/") for key in here) for place in aliases.values())


def tensors_of(record: Record, name: str) -> list[str]:
    with safe_open(record.folder / "models" / name, "pt") as opened:
        return list(opened.keys())


def test_states_in_a_file_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each is read into memory of its own, that the next one may have: what is equal is told by content.
    monkeypatch.setattr("bench.training.states.IN_MEMORY_BYTES", 0)
    record = done(run(overrides={"eval_clients": 2}), tmp_path, keep_models=True)
    models = kept.load(record)
    assert digest(models) == record.document["digest"]
    assert len(models.clients("clients")) > len(models.clients("personal")) == 2


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_a_crew_keeps_the_same_files(kind: str, tmp_path: Path) -> None:
    def files(crew: Any, folder: Path) -> dict[str, str]:
        one = rounds.Run(_job("ditto", kind, SETTING), crew=crew, models=folder)
        while one.progress.round < SETTING.rounds:
            one.step()
        return one.outcome().models

    crew, ray = hired(partial(toys, "ditto", kind, SETTING), size=3)
    assert files(crew, tmp_path / "crew") == files(None, tmp_path / "alone") != {}
    assert ray.handed_out > 0


# When they are written -----------------------------------------------------------------------------------------------


def test_models_are_no_part_of_the_identity_and_change_no_number(out: Path, tmp_path: Path) -> None:
    with_models = only(out)
    without = done(STORED, tmp_path / "plain")
    assert without.id == with_models.id
    assert without.tables == with_models.tables
    assert without.metrics == with_models.metrics
    assert without.document["digest"] == with_models.document["digest"]
    assert "models" not in without.document
    assert not (without.folder / "models").exists()
    assert sorted(path.name for path in with_models.folder.iterdir()) == [
        "counts.parquet", "models", "predictions.parquet", "rounds.parquet", "run.json",
    ]  # fmt: skip


def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the rounds that are computed."""
    computed: list[int] = []
    step = rounds.Run.step

    def noted(self: rounds.Run) -> dict[str, float | None] | None:
        computed.append(self.progress.round)
        return step(self)

    monkeypatch.setattr(rounds.Run, "step", noted)
    return computed


@pytest.mark.parametrize("in_file", [False, True])
def test_a_run_that_was_killed_keeps_the_same_models(
    in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_file:
        monkeypatch.setattr("bench.training.states.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(rounds.Run, "_is_due", lambda self: True)
    asked = run()
    wanted = train(execution.job(asked), models=tmp_path / "straight").models
    checkpoint, models = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.models"
    computed = steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(execution.job(asked), checkpoint=checkpoint, models=models, report=_killed_after(1))
    with pytest.raises(KeyboardInterrupt):  # after the last round, before the result is written
        train(execution.job(asked), checkpoint=checkpoint, models=models, report=_killed_after(2))
    assert computed == [0, 1]
    assert train(execution.job(asked), checkpoint=checkpoint, models=models).models == wanted
    assert computed == [0, 1]
    (models / "server.safetensors").write_bytes(b"half")
    (models / "clients-00007.safetensors").write_bytes(b"of a run in more files")
    (models / "inner").mkdir()
    assert train(execution.job(asked), checkpoint=checkpoint, models=models).models == wanted
    assert computed == [0, 1, 0, 1]
    for linked in (models, models / "server.safetensors"):
        linked.rename(tmp_path / linked.name.replace("checkpoint", "elsewhere"))
        linked.symlink_to(tmp_path / linked.name.replace("checkpoint", "elsewhere"))
        assert train(execution.job(asked), checkpoint=checkpoint, models=models).models == wanted
        assert not linked.is_symlink()
    assert computed == [0, 1] * 4
    assert {path.name: keeping.sha256(path) for path in models.iterdir()} == wanted


def _killed_after(stop: int) -> Callable[[Report], None]:
    def report(news: Report) -> None:
        if news.round == stop:
            raise KeyboardInterrupt

    return report


def test_a_checkpoint_of_a_run_that_was_over_without_models_begins_anew_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, checkpoint = run(), tmp_path / "checkpoint.pt"
    plain = train(execution.job(asked), checkpoint=checkpoint)
    computed = steps(monkeypatch)
    again = train(execution.job(asked), checkpoint=checkpoint, models=tmp_path / "models")
    assert computed == [0, 1]
    assert again.digest == plain.digest
    assert len(again.models) == 2


def test_a_finished_run_is_run_again_for_its_models_and_only_for_them(tmp_path: Path) -> None:
    asked = run()
    first = done(asked, tmp_path)
    assert sweep(asked, tmp_path).status == "cached"
    assert sweep(asked, tmp_path, keep_models=True).status == "done"
    second = records.read(first.folder)
    assert (second.metrics, second.files) == (first.metrics, first.files)
    assert len(second.models) == 2
    for keep_models in (True, False):
        assert sweep(asked, tmp_path, keep_models=keep_models).status == "cached"
    (first.folder / "models" / "server.safetensors").unlink()
    assert sweep(asked, tmp_path).status == "cached"
    assert sweep(asked, tmp_path, keep_models=True).status == "done"
    assert kept.load(records.read(first.folder)).names() == ["personal", "personal:after"]
    sweep(asked, tmp_path, force=True)  # without models: those of another result must not stay
    assert not records.read(first.folder).models
    assert not (first.folder / "models").exists()


def test_a_run_that_comes_out_otherwise_is_left_as_it_is(tmp_path: Path) -> None:
    asked = run()
    record = done(asked, tmp_path)
    document = json.loads((record.folder / "run.json").read_text())
    text = json.dumps({**document, "digest": "0" * 64})
    (record.folder / "run.json").write_text(text)
    result = sweep(asked, tmp_path, keep_models=True)
    assert result.status == "failed"
    assert "another digest" in str(result.reason) and "--force" in str(result.reason)
    assert (record.folder / "run.json").read_text() == text
    assert sorted(path.name for path in record.folder.iterdir()) == [
        "counts.parquet",
        "predictions.parquet",
        "rounds.parquet",
        "run.json",
    ]
    assert sweep(asked, tmp_path, keep_models=True, force=True).status == "done"
    assert records.read(record.folder).document["digest"] == document["digest"]


def test_a_run_that_fails_leaves_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("no outcome")

    monkeypatch.setattr(rounds.Run, "outcome", broken)
    assert sweep(run(), tmp_path, keep_models=True).status == "failed"
    assert [path.name for path in (tmp_path / run().id).iterdir()] == ["run.json"]


def test_a_full_disk_is_said_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bench.training.keeping.durable.put", full)
        result = sweep(run(), tmp_path, keep_models=True)
    assert "models cannot be written to" in str(result.reason) and "No space left" in str(result.reason)
    assert sweep(run(), tmp_path, keep_models=True).status == "done"


def test_the_command_says_what_is_run_again(bench: Bench) -> None:
    words = ["run", "--algos", "fedrep", "--rounds", 1, "--ray", "off", "--tracking-uri", "off"]
    assert "run again" not in bench(*words).err
    answer = bench(*words, "--keep-models", "--dry-run", "--no-probe", "--json")
    assert [each["status"] for each in json.loads(answer.out)["runs"]] == ["to do"]
    assert "as no models were kept: 1 of 1 runs" in bench(*words, "--keep-models").err
    assert "run again" not in bench(*words, "--keep-models").err
    assert kept.load(only(Path("runs"))).clients("personal") == list(range(20))


# Published, checked, damaged -----------------------------------------------------------------------------------------


def test_models_are_checked_when_they_are_read(out: Path) -> None:
    record = only(out)
    file = record.folder / "models" / "clients-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert only(out).metrics == record.metrics  # tables do not read gigabytes
    with pytest.raises(
        DamagedResult, match=r"clients-00000.safetensors is not the file that run.json was written with"
    ):
        kept.load(record)
    file.unlink()
    assert not only(out).has_models
    with pytest.raises(DamagedResult, match="cannot be read: No such file"):
        kept.load(record)
    with pytest.raises(NotKept, match="kept no models; the same 'bench run' with --keep-models"):
        kept.load(replace(record, models={}))
    others = {name: sum for name, sum in record.models.items() if not name.startswith("server")}
    with pytest.raises(DamagedResult, match=r"lists models without server\.safetensors; run again with --force"):
        kept.load(replace(record, models=others))


def test_models_that_are_listed_are_valid_and_others_are_not(out: Path) -> None:
    assert not validate(out, ROOT, [only(out).folder]).problems
    document = only(out).folder / "run.json"
    document.write_text(json.dumps({key: value for key, value in only(out).document.items() if key != "models"}))
    told = [str(each) for each in validate(out, ROOT, [document.parent]).problems]
    assert told == [f"{document.parent.name}/models: is not listed in run.json; remove it"]


def test_models_are_not_submitted(out: Path, tmp_path: Path) -> None:
    record = only(out)
    packed = submission.gather([record.folder])
    assert sorted(packed[record.id]) == ["counts.parquet", "predictions.parquet", "rounds.parquet", "run.json"]
    submission.write(packed, tmp_path / "packed")
    handed_in = only(tmp_path / "packed")
    assert not handed_in.models
    assert handed_in.document == {key: value for key, value in record.document.items() if key != "models"}


# As modules ----------------------------------------------------------------------------------------------------------


def test_a_module_is_in_evaluation_mode_and_takes_what_networks_take(out: Path) -> None:
    job, record = execution.job(STORED), only(out)
    module = kept.module(record, "personal", 3)
    assert not module.training
    pixels = job.splits.test_x[torch.arange(5)]
    images = Images(job.splits.test_x, job.splits.test_y, job.dataset.mean, job.dataset.std, scale=job.dataset.scale)
    x = module.normalise(pixels)
    assert torch.equal(x, images.plain(torch.arange(5)))
    scores = module(x)
    assert scores.shape == (5, 10) and scores.dtype == torch.float32 and not scores.requires_grad
    body, head = (kept.load(record).tree("personal", 3)[part] for part in ("body", "head"))
    z = torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])
    assert torch.allclose(scores, z @ head["weight"].T + head["bias"], atol=1e-6)
    assert set(module.state_dict()) == {
        "body/hidden/weight", "body/hidden/bias", "head/weight", "head/bias",
    }  # fmt: skip


def test_the_state_of_a_module_is_what_it_computes_with(out: Path) -> None:
    record = only(out)
    one, other = kept.module(record, "personal", 3), kept.module(record, "personal", 4)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(one(x), other(x))
    saved = io.BytesIO()
    torch.save(one.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    assert one.double().state_dict()["head/weight"].dtype == torch.float64


def test_pixels_are_normalised_to_the_bit_as_in_a_run(out: Path) -> None:
    look: dict[str, Any] = {"scale": 255.0, "mean": (0.49139968, 0.48215827, 0.44653124), "std": (0.247, 0.243, 0.261)}
    module = Module({}, replace(kept.load(only(out)).network, **look), lambda model, x: x)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    wanted = Images(pixels, torch.zeros(1, dtype=torch.int64), look["mean"], look["std"], scale=255.0)
    assert torch.equal(module.normalise(pixels), wanted.plain(torch.tensor([0])))


def test_what_is_no_floating_point_number_and_what_is_a_statistic_are_buffers() -> None:
    model = {"norm": {"weight": torch.ones(2), "stats": {"mean": torch.zeros(2)}}, "labels": torch.arange(2)}
    module = Module(model, None, lambda model, x: x)  # type: ignore[arg-type]
    assert dict(module.named_parameters()).keys() == {"norm/weight"}
    assert dict(module.named_buffers()).keys() == {"norm/stats/mean", "labels"}


def test_what_there_is_not_is_said(out: Path) -> None:
    models = kept.load(only(out))
    assert models.names() == ["personal", "personal:after", "unseen", "unseen:5 epochs"]
    assert models.clients("unseen") == [18, 19]
    with pytest.raises(NotKept, match="kept no model 'generic'; there are personal, personal:after, unseen"):
        models.tree("generic")
    with pytest.raises(NotKept, match="kept no unseen of client 3; there are those of 18, 19"):
        models.tree("unseen", 3)
    with pytest.raises(NotKept, match="each client has its own, so say whose"):
        models.module("personal")
    with pytest.raises(NotKept, match="it is the same for all clients"):
        models.tree("server", 3)
    assert models.clients("server") == []


def test_a_method_that_scores_otherwise_must_be_the_one_of_the_run(tmp_path: Path) -> None:
    plugin = tmp_path / "knn2.py"
    text = (Path(__file__).parents[1] / "algorithms" / "knnper.py").read_text().replace('"knnper"', '"knn2"')
    plugin.write_text(text)
    load_plugin(plugin)
    record = done(run("knn2(neighbours=3)", plugins=(plugin,)), tmp_path / "runs", keep_models=True)
    models = kept.load(record)
    x = torch.zeros(2, *models.network.shape)
    assert models.module("personal", 0)(x).shape == (2, 10)
    told: Any = copy.deepcopy(record.identity)
    told["algorithm"]["source"] = "0" * 64
    with pytest.raises(NotKept, match="scores images in its own way, and is another version here"):
        kept.module(replace(record, identity=told), "personal", 0)


# bench eval ----------------------------------------------------------------------------------------------------------


def test_models_are_tested_on_all_images_and_on_new_clients(out: Path, bench: Bench) -> None:
    record = only(out)

    def told(*words: object) -> Mapping[str, Any]:
        answer = bench("eval", record.id, "--out", out, "--json", *words)
        assert answer.status == 0, answer.err
        found: Mapping[str, Any] = json.loads(answer.out)
        return found

    def images(found: Mapping[str, Any], name: str) -> list[int]:
        return [sum(row) for row in found["models"][name]["total"]]

    own = told()
    assert (own["dataset"], own["part"], own["new_clients"]) == ("digits", "test", False)
    assert set(images(own, "personal")) == set(images(own, "unseen")) == {500}
    trained = bench("eval", record.id, "--out", out, "--dataset", "digits:train", "--partition", "iid", "--json")
    assert "was trained on some of these images" in trained.err
    dealt = json.loads(trained.out)
    job, models = execution.job(run(overrides={"unseen": 2, "partition": "iid"}, seeds=(1,))), kept.load(record)
    look = models.network.mean, models.network.std
    found = retest(models, Images(job.splits.train_x, job.splits.train_y, *look, scale=16.0), job.split.clients)
    for name in ("personal", "unseen"):
        assert dealt["models"][name]["correct"] == found[name].correct.tolist()
        assert dealt["models"][name]["total"] == found[name].total.tolist()
    job = execution.job(run(overrides={"unseen": 2, "alpha": 5.0}, seeds=(3,)))
    assert images(told("--alpha", 5.0, "--seed", 3), "personal") == [len(own) for own in job.split.tests[:18]]


def test_other_images_are_normalised_as_the_runs_were(
    out: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same test images in a dataset whose own mean and deviation are others.
    splits = DATASETS["digits"]().load(ROOT)
    assert isinstance(splits.test_x, Tensor)
    monkeypatch.setattr(DATASETS["arrays"], "scale", 16.0)
    x, y = splits.test_x.numpy(), splits.test_y.numpy()
    np.savez(tmp_path / "mine.npz", train_x=x // 2, train_y=y, test_x=x, test_y=y)
    words = ("eval", only(out).id, "--out", out, "--json")
    own, other = bench(*words), bench(*words, "--dataset", f"arrays(path='{tmp_path / 'mine.npz'}')")
    assert json.loads(own.out)["models"] == json.loads(other.out)["models"]
    halved = bench(*words, "--dataset", f"arrays(path='{tmp_path / 'mine.npz'}'):train")
    assert "trained on" not in halved.err
    assert json.loads(own.out)["models"] != json.loads(halved.out)["models"]


def test_the_table_is_short_and_says_what_it_shows(out: Path, bench: Bench) -> None:
    answer = bench("eval", only(out).id[:4], "--out", out, "--seed", 1)
    lines = answer.out.splitlines()
    assert lines[0] == f"fedrep(head_epochs=1) ({only(out).id}) on digits, test part: new clients have their own images"
    metrics = only(out).metrics
    shares = [f"{100 * float(str(metrics[f'personal{key}'])):.1f}" for key in ("", ".balanced", ".worst_decile")]
    assert next(line.split() for line in lines if line.startswith(" personal "))[3:] == shares


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--dataset cifar100", "has 100 classes, and the models tell 10 apart"),
        ("--dataset svhn", "has images of 3×32×32 (channels, height, width), and the models take 1×8×8"),
        ("--dataset digit", "digits"),
        ("--clients 7", "there are 7 new clients, and the run has 20"),
        ("--partition users", "does not say whose images it has"),
    ],
)
def test_what_cannot_be_tested_is_answered_with_a_sentence(out: Path, bench: Bench, words: str, said: str) -> None:
    answer = bench("eval", only(out).id, "--out", out, *words.split())
    assert answer.status == 2
    assert said in answer.err
    assert answer.err.count("\n") == 1


def test_runs_that_are_not_meant_and_models_that_were_not_kept_are_said(
    out: Path, bench: Bench, tmp_path: Path
) -> None:
    record = only(out)
    assert f"zzz: no run of {out} has an id like it" in bench("eval", "zzz", "--out", out).err
    other = done(run(), out)
    assert "kept no models" in bench("eval", other.id, "--out", out).err
    beginning = record.id[0]
    shutil.copytree(record.folder, out / f"{beginning}00000000000")
    assert f"several runs of {out} begin so" in bench("eval", beginning, "--out", out).err
