"""An error in a plug-in names the last line of the user's own file; uploads may be trees and bare tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, tree
from bench.command import scaffold
from bench.command.main import main
from bench.contract import checks, probes, sayings, toy
from bench.contract.promises import ContractBroken, findings
from bench.parts.trimmed_mean import TrimmedMean
from bench.plugins import blame
from bench.plugins.registry import ALGORITHMS, PARTS, BadPlugin, load_plugin, plugin_files
from bench.protocol.composed import Composed, _Combined
from bench.training.engine import TOLERANCE


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def error_of(broken: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as raised:
        broken()
    assert isinstance(raised.value, Exception)
    return raised.value


def written(name: str, line: str) -> tuple[Path, int]:
    """A plug-in whose client fails in this line, and the line's number."""
    file = scaffold.write("algorithm", name, Path())
    text = file.read_text().replace("        return task.sgd", f"        {line}\n        return task.sgd")
    file.write_text(text)
    return file, text.splitlines().index(f"        {line}") + 1


# Where


def test_the_last_line_of_the_plugin_is_named_however_deep_the_error_lies() -> None:
    """Not the line of the suite or of a library in which it ends."""
    file, line = written("deep", "task.model.features(private, data)")
    load_plugin(file)
    error = error_of(lambda: toy.upload_once(toy.run(ALGORITHMS["deep"]())))
    assert Path(error.__traceback__.tb_frame.f_code.co_filename).name != "deep.py"  # type: ignore[union-attr]
    assert blame.told(error, plugin_files()).endswith(f"(deep.py, line {line})")
    file, line = written("library", "np.linalg.inv(np.zeros((2, 2)))")
    file.write_text(file.read_text().replace("from bench import", "import numpy as np\nfrom bench import"))
    load_plugin(file)
    error = error_of(lambda: toy.upload_once(toy.run(ALGORITHMS["library"]())))
    assert blame.told(error, plugin_files()) == f"LinAlgError: Singular matrix (library.py, line {line + 1})"


def test_a_built_in_part_is_named_as_its_file() -> None:
    rule = PARTS["trimmed_mean"]()
    assert isinstance(rule, TrimmedMean)
    error = error_of(lambda: rule.combine(toy.task(toy.Host()), [], torch.ones(0)))
    assert "(trimmed_mean.py, line " in blame.told(error, plugin_files())
    assert "(trimmed_mean.py, line " not in blame.told(error)


def test_of_an_error_that_is_all_ours_or_a_librarys_the_last_line_is_named() -> None:
    code = compile("import numpy as np\nnp.linalg.inv(np.zeros((2, 2)))", np.__file__, "exec")
    error = error_of(lambda: exec(code, {}))
    error.__traceback__ = error.__traceback__.tb_next.tb_next.tb_next  # type: ignore[union-attr] # without this test
    assert blame.told(error, plugin_files()).startswith(
        "LinAlgError: Singular matrix ("
    ) and "test_blame" not in blame.told(error, plugin_files())
    assert blame.told(ValueError()) == "ValueError: no message"
    assert blame.told(ValueError("one\ntwo")) == "ValueError: one"


def test_a_file_that_fails_when_imported_names_its_line() -> None:
    Path("early.py").write_text("import torch\n\nx = torch.zeros(2).reshape(3)\n")
    with pytest.raises(BadPlugin, match=r"early.py fails when imported: RuntimeError: .* \(early.py, line 3\)$"):
        load_plugin(Path("early.py"))
    Path("wrong.py").write_text("x = 1\ny = (\n")
    with pytest.raises(BadPlugin, match=r"SyntaxError: '\(' was never closed \(wrong.py, line 2\)$"):
        load_plugin(Path("wrong.py"))


# Once


def test_a_check_says_an_error_once_and_how_many_promises_it_hides(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, line = written("broken", "torch.zeros(2).items()")
    file.write_text(file.read_text().replace("from bench import", "import torch\nfrom bench import"))
    said = f"AttributeError: 'Tensor' object has no attribute 'items' (broken.py, line {line + 1})"
    load_plugin(file)
    monkeypatch.setattr(checks, "ALGORITHM_PROMISES", dict([*checks.ALGORITHM_PROMISES.items()][:10]))
    found = list(checks.check(ALGORITHMS["broken"]))
    monkeypatch.setattr(checks, "check", lambda plugin: iter(found))
    hidden = [finding.promise for finding in found if finding.problem == said]
    assert len(hidden) > 2
    with pytest.raises(SystemExit) as ended:
        main(["check", "broken"], prog_name="bench")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    kept = [f"✓ {finding.promise}" for finding in found if finding.problem is None]
    others = f"✗ {len(hidden) - 1} more promises could not be looked at, for the same error: {said}"
    assert lines[-1] == others and sorted(lines) == sorted([*kept, f"✗ {hidden[0]}: {said}", others])
    with pytest.raises(SystemExit):
        main(["check", "broken", "--json"], prog_name="bench")
    rows = json.loads(capsys.readouterr().out)["findings"]
    assert [row["promise"] for row in rows if row["problem"] == said] == hidden


def test_a_broken_promise_was_looked_at_and_an_error_was_not() -> None:
    def broken(plugin: type) -> None:
        raise ContractBroken("not kept")

    def fails(plugin: type) -> None:
        raise ValueError("no")

    kept, looked, failed = findings(object, {"a": lambda plugin: None, "b": broken, "c": fails})
    assert (kept.problem, looked.problem, looked.looked_at, failed.looked_at) == (None, "not kept", True, False)
    assert failed.problem is not None and failed.problem.startswith("ValueError: no (test_blame.py, line ")


# Uploads


@dataclass(frozen=True, kw_only=True)
class Tensors(Algorithm):
    """Sends a bare tensor beside its model: a mean per class of the labels, and how many it has of each."""

    name: ClassVar[str] = "tensors"

    def init_server(self, task: Task) -> Tree:
        """Keep what comes."""
        wide = torch.zeros(task.num_classes, 2)
        return {**task.init(), "prototypes": wide, "plain": wide, "total": wide}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model."""
        return {key: server[key] for key in ("body", "head")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train, and make up a tensor of what the client has."""
        model = task.sgd(task.loss, shared, data.batches(task.epochs))
        counts = data.class_counts.float()
        return {**model, "prototypes": torch.stack([counts, counts.square()], 1), "counts": counts}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average as CONTRIBUTING's table says."""
        counts = uploads["counts"]
        prototypes = uploads.mean("prototypes", counts)
        plain, total = uploads.mean("prototypes"), uploads.sum("prototypes", counts)
        means = {"prototypes": prototypes, "plain": plain, "total": total}
        return {"body": uploads.mean("body"), "head": uploads.mean("head"), **means}


@pytest.mark.parametrize("algorithm", [Tensors(), Composed(Tensors(), (TrimmedMean(),))])
def test_an_upload_may_be_a_bare_tensor_in_both_engines_and_with_a_rule(algorithm: Algorithm) -> None:
    setting = replace(toy.SETTING, rounds=1, participation=1.0)
    one, other = (toy.finish(toy.run(algorithm, engine, setting=setting)) for engine in ("serial", "stacked"))
    assert tree.largest_difference(toy.states(one), toy.states(other)) <= TOLERANCE
    counts = torch.stack([one.population.class_counts(k) for k in range(one.population.size)]).double()
    sizes = counts.sum(1)
    sent = torch.stack([counts, counts.square()], 2)
    server = one.progress.server
    assert torch.allclose(server["total"].double(), (counts[:, :, None] * sent).sum(0))
    shares = counts / counts.sum(0)
    assert torch.allclose(server["prototypes"].double(), (shares[:, :, None] * sent).sum(0))
    assert torch.allclose(server["plain"].double(), (sizes[:, None, None] * sent).sum(0) / sizes.sum())


def sent(*values: list[float]) -> Uploads:
    trees: list[Tree] = [{"head": torch.tensor(value), "body": {"w": torch.tensor(value)}} for value in values]
    return Uploads(trees, torch.tensor([1.0, 3.0]))


def test_stacks_means_and_sums_of_a_tensor_are_those_of_a_tree_of_one_leaf() -> None:
    uploads = sent([1.0, 10.0], [5.0, 50.0])
    assert torch.equal(uploads["head"], torch.tensor([[1.0, 10.0], [5.0, 50.0]]))
    assert torch.equal(uploads["head"], uploads["body"]["w"]) and torch.equal(uploads.tensor("head"), uploads["head"])
    weights: list[Tensor | None] = [None, torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])]
    for weight in weights:
        assert torch.equal(uploads.mean("head", weight), uploads.mean("body", weight)["w"])
        assert torch.equal(uploads.sum("head", weight), uploads.sum("body", weight)["w"])
    assert uploads.mean("head", weights[2]).tolist() == [3.0, 50.0] and uploads.sum("head").tolist() == [6.0, 60.0]


@pytest.mark.parametrize(
    ("tier", "needs", "said"),
    [
        ("X", set(), "tier = 'X': must be one of S, L, A, V"),
        ("S", {"priors", "body"}, "needs priors; what can be needed is body, pixels, prior"),
        ("S", {"public"}, "needs public, which is tier A"),
    ],
)
def test_a_tier_or_need_that_is_none_is_refused(tier: str, needs: set[str], said: str) -> None:
    kind: type[Algorithm] = dataclass(frozen=True)(type("Mine", (Tensors,), {"tier": tier, "needs": frozenset(needs)}))
    with pytest.raises(ContractBroken, match=said):
        sayings.tier_is_told(kind)


def test_a_rule_takes_a_head_that_is_a_bare_tensor_and_leaves_one_that_was_not_sent() -> None:
    uploads = sent([1.0, 10.0], [5.0, 50.0])
    body = {"body": {"w": torch.zeros(2)}}
    task = toy.task(toy.Host())
    for shared, head in (({**body, "head": torch.zeros(2)}, [1.0, 10.0]), (body, [4.0, 40.0])):
        combined = _Combined(uploads, probes.First(), task, shared)
        assert combined.mean("head").tolist() == head, "the first client's where the rule has a say, else the mean"
        assert combined.mean("body")["w"].tolist() == [1.0, 10.0]
        assert combined.mean()["head"].tolist() == head
