"""How things are spelt, and what a sweep expands to."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.models import BadModel, build
from bench.plugins.registry import UnknownPlugin
from bench.protocol import spelling, words
from bench.protocol.identity import canonical
from bench.protocol.presets import DEFAULT, PAPER, Choice, Preset
from bench.protocol.settings import FIELDS, LATER, BadConfig
from bench.sweep import config
from bench.sweep.config import Sweep
from bench.sweep.run import Run
from bench.training import engine as engines


def sweep(algorithms: str = "fedavg", dataset: str = "digits", **more: object) -> Sweep:
    options: dict[str, object] = {
        "algorithms": tuple(config.parse_algorithms(algorithms)),
        "datasets": tuple(config.parse_datasets(dataset)),
        "data_root": Path("data"),
        **more,
    }
    return Sweep(**options)  # type: ignore[arg-type]


# Spelling


def test_an_algorithm_is_written_as_a_python_call() -> None:
    plain, changed = config.parse_algorithms("fedrep, fedrep(head_epochs=5, body_epochs=2)")
    assert repr(plain) == "FedRep(head_epochs=10, body_epochs=None)"
    assert repr(changed) == "FedRep(head_epochs=5, body_epochs=2)"


@settings(deadline=None)  # the first example imports the algorithm
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(["fedrep", "fedrep "]))
def test_a_label_is_read_back_as_the_same_algorithm(head: int, body: int, written: str) -> None:
    (algorithm,) = config.parse_algorithms(f"{written}(head_epochs={head},body_epochs={body})")
    assert config.parse_algorithms(spelling.label(algorithm)) == [algorithm]


@settings(deadline=None)  # the first example imports the algorithm
@given(st.floats(0, 0.99), st.sampled_from(["P0", "P1", "P2"]), st.booleans())
def test_numbers_text_and_truth_values_survive_the_call_syntax(share: float, rule: str, flag: bool) -> None:
    text = f"fedloge(sparsity={share!r}, personal_rule={rule!r}, faithful={flag})"
    (algorithm,) = config.parse_algorithms(text)
    values = {key: getattr(algorithm, key) for key in ("sparsity", "personal_rule", "faithful")}
    assert values == {"sparsity": share, "personal_rule": rule, "faithful": flag}
    assert config.parse_algorithms(spelling.label(algorithm)) == [algorithm]


@settings(deadline=None)  # the first example imports the algorithm
@given(st.lists(st.text("ab(){}[]'\",=\\ ", max_size=12), max_size=4))
def test_no_text_breaks_the_parser(items: list[str]) -> None:
    with pytest.raises((BadConfig, UnknownPlugin)):
        config.parse_algorithms("x" + ",".join(items))


def test_commas_in_brackets_and_quotes_do_not_split() -> None:
    assert words.split_list("a(x=(1, 2),y='),('), b ,,c") == ["a(x=(1, 2),y='),(')", "b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fedrep(head_epoch=5)", "fedrep(head_epoch=5): no such parameter; fedrep takes head_epochs, body_epochs"),
        ("fedavg(x=1)", "fedavg takes no parameters"),
        ("fedrep(head_epochs='abc')", "head_epochs must be a whole number from 0 to 1,000"),
        ("fedrep(head_epochs=True)", "head_epochs must be a whole number from 0 to 1,000"),
        ("fedrep(head_epochs=1.5)", "head_epochs must be a whole number from 0 to 1,000"),
        ("fedrep(head_epochs=abc)", "abc is not a Python literal"),
        ("fedrep(head_epochs=__import__('os'))", "is not a Python literal"),
        ("fedrep(5)", "by name"),
        ("fedrep(**{})", "by name"),
        ("fedrep(head_epochs=1)(2)", "Python call"),
        ("fedrep(head_epochs=", "not a name or a call"),
        ("fedrep(head_epochs=)", "Python call"),
        ("fedloge(sparsity=1e999)", "must be a number from 0 to below 1"),
        ("fedloge(sparsity=1.5)", "must be a number from 0 to below 1"),
        ("fedloge(personal_rule='P9')", "'P0', 'P1' or 'P2'"),
        ("1fed", "not a name or a call"),
        (" , ", "is empty; there are afl, airbench, apfl, balancefl"),
    ],
)
def test_a_wrong_call_is_answered_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        config.parse_algorithms(text)
    assert said in str(caught.value)


def test_a_wrong_name_is_answered_with_the_near_ones() -> None:
    with pytest.raises(UnknownPlugin, match="did you mean fedrep"):
        config.parse_algorithms("fedrap")


def test_whole_numbers_go_into_float_fields_and_give_the_same_run() -> None:
    (whole,), (real,) = map(config.parse_algorithms, ("fedprox(mu=0)", "fedprox(mu=0.0)"))
    assert whole == real and repr(whole) == repr(real)


def test_a_hyphen_in_a_name_is_an_underscore() -> None:
    assert config.parse_algorithms("fedavg-ft") == config.parse_algorithms("fedavg_ft")
    assert config.parse_dataset("fashion-mnist") == config.parse_dataset("fashion_mnist")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("1", [0]), ("0,4,7", [0, 4, 7]), ("3407,", [3407]), ("5,5", [5]), ("0,", [0])],
)
def test_a_lone_number_counts_seeds_and_a_comma_names_them(text: str, seeds: list[int]) -> None:
    assert config.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "-1,", "x", "1.5", "", "4294967296,", "3407"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="--seeds"):
        config.parse_seeds(text)


def test_an_imbalance_below_one_is_its_inverse_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.parse_imbalance("50") == 50
    assert capsys.readouterr().err == ""
    assert config.parse_imbalance("0.02") == 50
    assert capsys.readouterr().err == "imbalance 0.02 is understood as its inverse, 50\n"


@pytest.mark.parametrize("text", ["0", "-0.1", "-5", "x", "nan", "inf", ""])
def test_an_imbalance_of_zero_or_below_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="imbalance"):
        config.parse_imbalance(text)


# Sweeps and runs


def test_a_sweep_is_the_product_of_its_lists_with_algorithms_innermost() -> None:
    asked = sweep("fedavg,fedrep", imbalance=(10.0, 50.0), alpha=(0.1,), seeds=(0, 7))
    cells = [(run.setting.imbalance, run.setting.alpha, run.seed, config.name(run.algorithm)) for run in asked.expand()]
    assert cells == [
        (10, 0.1, 0, "fedavg"),
        (10, 0.1, 0, "fedrep"),
        (10, 0.1, 7, "fedavg"),
        (10, 0.1, 7, "fedrep"),
        (50, 0.1, 0, "fedavg"),
        (50, 0.1, 0, "fedrep"),
        (50, 0.1, 7, "fedavg"),
        (50, 0.1, 7, "fedrep"),
    ]  # fmt: skip


def test_a_run_asked_for_twice_is_one_run() -> None:
    assert len(sweep("fedprox(mu=1),fedprox(mu=1.0)").expand()) == 1


def one(**more: object) -> Run:
    (run,) = sweep(**more).expand()  # type: ignore[arg-type]
    return run


def test_the_identity_holds_what_changes_numbers_and_nothing_else() -> None:
    run = one()
    same = replace(run, data_root=Path("elsewhere"), setting=replace(run.setting, name="other"))
    assert same.id == run.id and same.protocol == run.protocol and len(run.id) == 12
    (other,) = config.parse_algorithms("fedprox")
    changes: list[Run] = [
        replace(run, seed=1),
        replace(run, algorithm=other),
        replace(run, engine="serial"),
        replace(run, precision="bf16"),
        replace(run, device="cuda"),
    ]
    assert len({run.id, *(each.id for each in changes)}) == 6
    assert {each.protocol for each in changes} == {run.protocol}
    longer = replace(run, setting=replace(run.setting, rounds=41))
    assert longer.id != run.id and longer.protocol != run.protocol


def test_runs_without_a_preset_are_told_as_before_there_were_presets() -> None:
    run = one(overrides={"rounds": 3})
    assert set(run.identity()) == {"algorithm", "dataset", "setting", "seed", "engine", "precision", "device"}
    assert set(run.identity()["algorithm"]) == {"name", "version", "fields"}
    assert (run.lr, run.preset, run.label, run.trained_by()) == (None, "default", "fedavg", run.setting)


def preset(call: str, lr: float | None = None) -> Preset:
    return Preset(name="mine", algorithms={"fedrep": Choice(call=call, lr=lr)})


def test_a_learning_rate_of_its_own_is_another_run_under_the_same_protocol() -> None:
    plain, own = sweep("fedrep", presets=(DEFAULT, preset("fedrep", 0.2))).expand()
    assert own.id != plain.id and own.protocol == plain.protocol
    assert own.setting == plain.setting and own.setting.lr == 0.05
    assert own.trained_by() == replace(plain.setting, lr=0.2)
    assert own.identity()["algorithm"] == {**plain.identity()["algorithm"], "lr": 0.2}
    assert own.label == "fedrep [mine, lr 0.2]" and str(own).startswith("fedrep [mine, lr 0.2] on digits")
    assert one(algorithms="fedrep", presets=(preset("fedrep", 0.3),)).id not in (own.id, plain.id)


def test_fields_that_a_preset_chose_are_the_run_that_asks_for_them() -> None:
    chosen = one(algorithms="fedrep", presets=(preset("fedrep(head_epochs=5)"),))
    assert chosen.id == one(algorithms="fedrep(head_epochs=5)").id
    assert chosen.label == "fedrep(head_epochs=5) [mine]"


def test_a_preset_that_chose_the_default_is_the_default() -> None:
    plain = one(algorithms="fedrep")
    same = sweep("fedrep", presets=(preset("fedrep", 0.05), DEFAULT, preset("fedrep"), PAPER)).expand()
    assert same == [plain]
    assert plain.label == "fedrep"


def test_a_learning_rate_out_of_range_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"lr=-0\.1\): lr must be a number above 0"):
        sweep("fedrep", presets=(preset("fedrep", -0.1),)).expand()


def test_presets_stand_beside_each_other_within_a_seed() -> None:
    runs = sweep("fedrep,fedloge", presets=(DEFAULT, PAPER), seeds=(0, 1)).expand()
    assert [(run.seed, run.label) for run in runs] == [
        (seed, label) for seed in (0, 1) for label in ("fedrep", "fedloge", "fedloge(scale=1.0) [paper]")
    ]


def test_a_version_bump_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = one()
    before = run.identity()
    monkeypatch.setattr(type(run.algorithm), "version", 99)
    assert run.identity() != before


def test_an_identity_is_json_and_survives_pickling() -> None:
    run = one(algorithms="fedloge(sparsity=0.5)")
    assert json.loads(canonical(run.identity())) == json.loads(json.dumps(run.identity()))
    assert pickle.loads(pickle.dumps(run)).id == run.id


def test_fields_of_the_setting_are_replaced_and_the_run_knows_it() -> None:
    run = one(overrides={"rounds": 3, "norm": "batch", "lr": 1, "clip": None})
    assert run.overrides() == {"rounds": 3, "norm": "batch", "lr": 1.0}
    assert isinstance(run.setting.lr, float)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"round": 3}, "did you mean rounds"),
        ({"rounds": 0}, "rounds = 0: must be a whole number from 1 to 100,000"),
        ({"rounds": "3"}, "whole number"),
        ({"lr": float("inf")}, "lr = inf: must be a number above 0 and up to 1,000,000"),
        ({"lr": -1.0}, "above 0"),
        ({"clip": -1.0}, "above 0"),
        ({"model": "resnet9"}, "did you mean resnet8"),
        ({"partition": "dirichle"}, "did you mean dirichlet"),
        ({"norm": "instance"}, "one of group, layer, batch"),
        ({"name": "mine"}, "cannot be set"),
        ({"clients": 5, "unseen": 5}, "unseen = 5"),
    ],
)
def test_a_wrong_field_of_a_setting_is_answered_in_a_sentence(overrides: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        sweep(overrides=overrides).expand()
    assert said in str(caught.value)


def test_a_wrong_setting_is_answered_with_the_near_ones() -> None:
    with pytest.raises(BadConfig, match="did you mean quick"):
        sweep(setting="quik").expand()


def test_an_algorithm_that_needs_a_body_is_refused_on_a_model_without() -> None:
    with pytest.raises(BadConfig, match="fedrep needs a model with a body and a head, and linear has no body"):
        sweep("fedrep", overrides={"model": "linear"}).expand()
    assert sweep("fedavg", overrides={"model": "linear"}).expand()


def test_a_model_too_large_for_the_images_is_refused() -> None:
    with pytest.raises(BadModel, match="fedavg_cnn"):
        sweep(overrides={"model": "fedavg_cnn"}).expand()


def test_the_engine_is_resolved_and_recorded() -> None:
    assert one().engine == "stacked"
    small = {"model": "small_cnn", "batch_size": 32}
    assert one(overrides=small).engine == "stacked"
    assert one(overrides=small | {"model": "resnet8"}).engine == "serial"
    assert one(engine="serial").engine == "serial"


@pytest.mark.parametrize(
    ("model", "classes", "shape", "batch", "engine"),
    [
        ("mlp", 10, (1, 28, 28), 10, "stacked"),  # 50,890 weights
        ("mlp", 10, (3, 32, 32), 31, "serial"),  # 197,322
        ("mlp", 10, (3, 32, 32), 32, "stacked"),
        ("frozen", 10, (1280, 1, 1), 10, "stacked"),
        ("frozen", 32, (4095, 1, 1), 10, "stacked"),  # 131,072, the most
        ("frozen", 32, (4096, 1, 1), 10, "serial"),
        ("frozen", 64, (4095, 1, 1), 32, "stacked"),  # 262,144
        ("frozen", 64, (4096, 1, 1), 32, "serial"),
        ("small_cnn", 10, (1, 8, 8), 10, "stacked"),  # 13,706
        ("small_cnn", 10, (1, 12, 12), 64, "serial"),  # 23,946
        ("lenet5", 10, (1, 28, 28), 10, "serial"),
        ("light_cnn", 10, (1, 28, 28), 64, "stacked"),  # 14,862
        ("light_cnn", 10, (3, 32, 32), 10, "serial"),  # 19,622
    ],
)
def test_auto_stacks_networks_of_few_weights(
    model: str, classes: int, shape: tuple[int, int, int], batch: int, engine: str
) -> None:
    assert engines.choose("auto", build(model, classes, shape), batch, "cpu") == engine


def test_assignments_are_literals_or_text() -> None:
    items = ["norm=batch", "clip=None", "momentum = 0.9", "eval-every=5"]
    read = {"norm": "batch", "clip": None, "momentum": 0.9, "eval_every": 5}
    assert spelling.parse_assignments(items) == read
    for wrong in (["norm"], ["=3"], ["norm=group", "norm=batch"]):
        with pytest.raises(BadConfig, match="--set"):
            spelling.parse_assignments(wrong)


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """A dataclass with a union and a tuple."""

    share: float | None = None
    widths: tuple[int, ...] = ()


def test_types_are_checked_strictly() -> None:
    good = {"share": 1, "widths": (1, 2)}
    assert spelling.check_fields(Ranged, good, "x") == {"share": 1.0, "widths": (1, 2)}
    for wrong in ({"share": "1"}, {"widths": (1, "2")}, {"share": True}):
        with pytest.raises(BadConfig, match="must be"):
            spelling.check_fields(Ranged, wrong, "x")


# Natural tails and natural clients --------------------------------------------------------------------------


def only(**more: object) -> Run:
    (run,) = sweep(**more).expand()  # type: ignore[arg-type]
    return run


def test_a_natural_tail_and_natural_users_are_what_a_dataset_is_run_with() -> None:
    inat = only(dataset="inat").setting
    assert (inat.imbalance, inat.partition, inat.alpha, inat.clients) == (None, "dirichlet", 0.5, 20)
    writers = only(dataset="femnist").setting
    assert (writers.imbalance, writers.partition, writers.alpha, writers.clients) == (None, "users", None, None)
    assert writers.client_test == "own"
    assert only(dataset="inat", imbalance=(None,)).id == only(dataset="inat").id
    assert "imbalance natural" in str(only(dataset="inat")) and "alpha" not in str(only(dataset="femnist"))


@pytest.mark.parametrize("setting", ["quick", "fedloge", "creff", "gbme", "redgrape"])
def test_every_setting_leaves_natural_tails_and_users_as_they_are(setting: str) -> None:
    assert only(dataset="inat", setting=setting).setting.imbalance is None
    writers = only(dataset="femnist", setting=setting)
    assert (writers.setting.partition, writers.setting.clients, writers.setting.alpha) == ("users", None, None)
    assert writers.overrides() == {}


def test_writers_can_be_forgotten_for_a_dirichlet_partition() -> None:
    dealt = only(dataset="femnist", overrides={"partition": "dirichlet", "clients": 10}).setting
    assert (dealt.alpha, dealt.clients, dealt.client_test) == (0.5, 10, "matched")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": "inat", "imbalance": (50.0,)}, "--imbalance 50: inat is long-tailed by nature"),
        ({"dataset": "digits", "imbalance": (None,)}, "--imbalance natural: digits is balanced"),
        ({"dataset": "femnist", "alpha": (0.5,)}, "--alpha 0.5: clients are its natural users"),
        ({"dataset": "inat", "alpha": (0.5,), "overrides": {"partition": "users"}}, "which no alpha shapes"),
        ({"alpha": (0.5,), "overrides": {"partition": "iid"}}, "--alpha 0.5: images are dealt evenly"),
        ({"dataset": "femnist", "overrides": {"partition": "lda"}}, "say among how many clients with --clients"),
        ({"overrides": {"client_test": "own"}}, "needs natural users as clients, not --partition dirichlet"),
        ({"overrides": {"eval_clients": 0}}, "eval_clients = 0: must be a whole number from 1"),
        ({"overrides": {"unseen_labels": False}}, "unseen_labels = False: no client is held out; say how many with"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        sweep(**options).expand()  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_every_field_of_the_setting_is_part_of_the_identity_and_one_told_at_its_usual_value_changes_nothing() -> None:
    told = only().identity()["setting"]
    assert {*told, "name", "auxiliary", *LATER} == set(FIELDS)
    assert all(only(overrides={key: value}).id == only().id for key, value in LATER.items())
    assert all(only(overrides={key: value}).id == only().id for key, value in told.items() if key != "alpha")
    for changed in ({"eval_clients": 5}, {"split_seed": 3}, {"client_test": "global"}, {"lr_steps": ((0.5, 0.1),)}):
        assert only(overrides=changed).id != only().id
    assert only(overrides={"unseen": 2, "unseen_labels": False}).id != only(overrides={"unseen": 2}).id


def test_weights_are_told_by_their_contents(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for file, content in zip(files, (b"one", b"one", b"other"), strict=True):
        file.write_bytes(content)
    ids = [only(weights=file).id for file in files]
    assert ids[0] == ids[1] != ids[2] and only().id not in ids
    assert only(weights=files[0]).protocol != only().protocol
    assert only(weights=files[0]).overrides() == {"weights": "a.pth"}
