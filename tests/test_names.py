"""Names as people type them: in whatever case, nearly right, as a call spelt in another way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.command.main import _VERBS, main
from bench.plugins.names import close, meant, near, with_article
from bench.plugins.registry import ALGORITHMS, DATASETS, BadPlugin, UnknownPlugin, label, load_plugin
from bench.protocol.presets import Choice, Preset
from bench.protocol.settings import NAMED, READ_BY, BadConfig
from bench.protocol.spelling import parse_algorithms, parse_assignments, parse_dataset, respell
from bench.sweep.resolving import resolve_setting

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Call the command in an empty folder; give status, output and what is said on standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words), prog_name="bench")
        printed = capsys.readouterr()
        return int(str(ended.value.code)), printed.out, printed.err

    return call


# One function for all


def test_a_name_is_meant_in_whatever_case_and_only_where_one_fits() -> None:
    known = ["fed_rep", "fedrep", "Mine", "mine"]
    assert meant("FED-rep", known) == "fed_rep" and meant("fedrep", known) == "fedrep"
    assert meant("Mine", known) == "Mine" and meant("mine", known) == "mine"
    assert meant("MINE", known) is None and meant("fedrap", known) is None and meant("x", []) is None


def test_what_is_near_is_offered_as_it_is_spelt() -> None:
    assert near("FEDRAP", ["FedRep", "local"]) == "did you mean FedRep?"
    assert near("zzz", ["one", "two", "one"]) == "there are one, two"
    assert near("x", []) == "there are none" and close("zzz", ["one"]) is None
    assert close("--nonsense", ["--seeds", "--rounds", "--json"]) is None, "dashes that all have make nothing near"


def test_articles() -> None:
    assert [with_article(noun) for noun in ("algorithm", "part", "dataset")] == ["an algorithm", "a part", "a dataset"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rnu", "No such command 'rnu'; did you mean run?"),
        ("data fetsh digits", "No such command 'fetsh'; did you mean fetch?"),
        ("list algoritms", "there is no 'algoritms'; did you mean algorithms or parts?"),
        ("new algoritm mine", "did you mean algorithm or part?"),
        ("show QUIK", "did you mean quick?"),
        ("show quick --kind setings", "did you mean settings"),
        ("check fedrop", "did you mean fedrod or fedrep?"),
        ("run --round 3", "No such option '--round'; did you mean --rounds"),
        ("run --engine serail", "there is no 'serail'; did you mean serial?"),
        ("run --algos fedavg+fokal", "did you mean focal?"),
        ("run --algos fedavg fedrep", "(fedrep); several values of one option are separated by commas"),
        ("run --setting quik", "did you mean quick?"),
        ("run --partition dirichlt", "did you mean dirichlet?"),
        ("run --model rsnet8", "did you mean resnet8"),
        ("run --algos fedprox(lambda=1)", "lambda is a word of Python's own and no parameter; fedprox takes mu"),
        ("run --algos fedprox(lambda=1,mu=2)", "lambda is a word of Python's own and no parameter; fedprox takes mu"),
        ("run --algos fedprox(mu=2,MU=1)", "mu is given twice"),
        ("new algorithm fedavg", "there is an algorithm called 'fedavg' already"),
        ("show a b", "Got unexpected extra argument (b); see 'bench show --help'"),
    ],
)
def test_what_was_meant_is_said(bench: Bench, words: str, said: str) -> None:
    status, out, err = bench(*words.split())
    assert status == 2 and out == "" and said in err and err.count("\n") == 1


def test_case_matters_nowhere_on_the_command_line(bench: Bench) -> None:
    exact = "run --algos fedrep(head_epochs=2)+focal --dataset digits --setting creff --partition fedloge --model mlp"
    exact += " --set client_test=balanced --set norm=group --engine serial --dry-run --no-probe --json"
    other = "RUN --Algos FedRep(Head_Epochs=2)+FOCAL --DATASET Digits --setting CReFF --partition FedLoGe --model MLP"
    other += " --Set Client-Test=Balanced --set NORM=Group --engine Serial --dry_run --no-probe --JSON"
    (status, out, _), again = bench(*exact.split()), bench(*other.split())
    assert status == again[0] == 0 and json.loads(out) == json.loads(again[1])


def test_list_and_show_ignore_case(bench: Bench) -> None:
    for exact, other in (
        ("list settings", "LIST Settings"),
        ("show fedrep", "show FedRep"),
        ("show cifar10", "show CIFAR10"),
        ("show feddf_recut", "show FedDF-recut"),
        ("show quick --dataset cifar10", "show QUICK --dataset CIFAR10"),
        ("show resnet8", "show ResNet8"),
    ):
        assert bench(*exact.split()) == bench(*other.split())


def test_a_key_of_a_sweep_file_is_an_option_in_whatever_case(bench: Bench) -> None:
    Path("sweep.toml").write_text("Algos = 'FedAvg'\nBatch-Size = 8\n")
    status, out, _ = bench("run", "--from", "sweep.toml", "--dry-run", "--no-probe", "--json")
    assert status == 0 and json.loads(out)["runs"][0]["call"] == "fedavg"


def test_every_verb_takes_its_options_in_whatever_case(bench: Bench) -> None:
    for verb in _VERBS:
        assert bench(verb.upper(), "--HELP")[0] == 0


def test_names_of_a_setting_are_stored_as_they_are_spelt() -> None:
    dataset = parse_dataset("digits")
    for field, names in NAMED.items():
        for name in names if field != "client_test" else ("matched", "balanced"):
            (typed,) = parse_assignments([f"{field.upper()}={name.upper()}"]).items()
            given = dict([typed], **({"partition": READ_BY[field]} if field in READ_BY else {}))
            assert getattr(resolve_setting("quick", dataset, given), field) == name
    (algorithm,) = parse_algorithms("fedavg+balanced_softmax(prior='GLOBAL')")
    assert label(algorithm) == "fedavg+balanced_softmax(prior='global')"


# Plug-ins of one name


def test_a_clash_names_the_files(tmp_path: Path) -> None:
    text = "from bench import Algorithm, register\n\n@register({name!r})\nclass Mine(Algorithm):\n    pass\n"
    for file, name in (("first", "clash"), ("second", "clash"), ("third", "fedavg")):
        (tmp_path / f"{file}.py").write_text(text.format(name=name))
    load_plugin(tmp_path / "first.py")
    with pytest.raises(BadPlugin) as two:
        load_plugin(tmp_path / "second.py")
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    assert str(two.value) == f"two algorithms are called 'clash': Mine of {first} and Mine of {second}; rename one"
    with pytest.raises(BadPlugin, match=f"'fedavg' of {tmp_path / 'third.py'} has the name of a built-in"):
        load_plugin(tmp_path / "third.py")


def test_a_registry_answers_as_its_names_are_meant() -> None:
    assert DATASETS["CIFAR10"] is DATASETS["cifar10"] and "Fed-AVG" not in ALGORITHMS and "FedAvg" in ALGORITHMS
    assert ALGORITHMS.meant("FedAvg-Prior") == "fedavg_prior"
    with pytest.raises(UnknownPlugin, match="did you mean cifar10"):
        DATASETS["cifar-10"]


# Calls


def test_a_preset_finds_an_algorithm_however_its_call_is_spelt() -> None:
    (asked,) = parse_algorithms("fedprox(mu=0)")
    for call in ("fedprox(mu=0)", "FedProx(mu = 0.0)", "fedprox(mu=0.0)"):
        preset = Preset(name="mine", algorithms={call: Choice(call="fedprox(mu=2)"), "gone(x=1)": Choice(call="gone")})
        assert label(preset.choose(asked)[0]) == "fedprox(mu=2.0)"
    with pytest.raises(BadConfig, match=r"has no fedprox\(mu=0.0\); it has fedavg"):
        Preset(name="mine", algorithms={"fedavg": Choice(call="fedavg")}).choose(asked)
    assert respell("gone(x=1)") == "gone(x=1)" and respell("fedavg,local") == "fedavg,local"
    for order in itertools.permutations(["+topk", "+focal(gamma=2)"]):
        assert respell("FedAvg" + "".join(order)) == "fedavg+focal+topk"
