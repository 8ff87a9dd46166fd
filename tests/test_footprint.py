"""What a network is in numbers, what a client is sent in a round, and where a person finds both."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from bench import Tree, keys, models, tree
from bench.command.main import main
from bench.contract import toy
from bench.models.networks import MLP, Block
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.results import chosen, columns, layout, table
from bench.results.record import Record
from bench.results.spent import with_derived
from bench.training.footprint import OF_THE_NETWORK, footprint
from bench.training.rounds import Run
from tests.test_results import document, record

MODEL = 64 * 65 + 6 * 65
"""Parameters of the toy's network."""
ALL = replace(toy.SETTING, participation=1.0)


def cost_of(name: str = "fedavg", setting: Setting = toy.SETTING, **fields: Any) -> dict[str, float | None]:
    run = toy.finish(toy.run(ALGORITHMS[name](**fields), setting=replace(setting, eval_every=setting.rounds)))
    return run.outcome().cost


def typed(*words: str) -> str:
    answer = CliRunner().invoke(main, list(words))
    assert answer.exit_code == 0, answer.output
    return answer.output


# A network ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "parameters", "products"),
    [
        ("light_cnn", (1, 28, 28), 14_862, 568_240),
        ("light_cnn", (3, 32, 32), 19_622, 1_109_760),
        ("mlp", (1, 8, 8), 4_810, 64 * 64 + 640),
        ("resnet8", (3, 32, 32), 1_227_594, 194_710_016),
        ("vit_tiny", (3, 32, 32), 5_361_216 + 3_850, 371_021_568),
        ("vit_mini", (3, 32, 32), 682_464 + 1_930, 49_109_376),
    ],
)
def test_a_network_is_measured(name: str, shape: tuple[int, ...], parameters: int, products: int) -> None:
    """By hand, two branches at 28×28: 26² · 9 · 10 + 11² · 90 · 20 + 500 · 10 each, then 20 · 32 + 32 · 10."""
    found = footprint(models.build(name, 10, shape))
    assert (found.parameters, found.nbytes, found.flops) == (parameters, 4 * parameters, 2 * products)


def test_the_published_figures_of_work() -> None:
    small, colour = (footprint(models.build("light_cnn", 10, shape)).flops for shape in ((1, 28, 28), (3, 32, 32)))
    resnet = footprint(models.build("resnet8", 10, (3, 32, 32))).flops
    assert (f"{small / 1e6:.2f}", f"{colour / 1e6:.2f}", f"{resnet / 1e6:.0f}") == ("1.14", "2.22", "389")
    assert resnet // colour == 175


def test_running_statistics_are_bytes_and_no_parameters() -> None:
    group, batch = (footprint(models.build("resnet8", 10, (3, 32, 32), norm)) for norm in ("group", "batch"))
    shapes = models.build("resnet8", 10, (3, 32, 32), "batch").init(keys.key(0, "meta"))
    assert batch.parameters == group.parameters
    assert batch.nbytes - group.nbytes == tree.nbytes(tree.split(shapes, tree.is_statistic)[0]) > 0


class Looks(MLP):
    """A network that branches on a value, which nothing without values can follow."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One that looks at its input first."""
        (hidden,) = super().blocks

        def run(body: Tree, x: Tensor) -> Tensor:
            return hidden.run(body, -x if float(x.sum()) < 0 else x)

        return (replace(hidden, run=run),)


def test_a_network_that_looks_at_numbers_is_measured_too() -> None:
    """Shapes alone would not do, and would load torch's compiler."""
    found = footprint(Looks("looks", 10, (1, 8, 8)))
    assert found == footprint(models.build("mlp", 10, (1, 8, 8)))


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_its_network_is_and_what_goes_to_a_client_in_a_round() -> None:
    cost = with_derived(cost_of())
    assert [cost[key] for key in OF_THE_NETWORK] == [MODEL, 4 * MODEL, 2 * (64 * 64 + 64 * 6)]
    assert cost["client_rounds"] == 4 * 6
    assert cost["payload_bytes_down"] == cost["payload_bytes_up"] == 4 * MODEL


def test_a_client_that_makes_two_trips_is_in_one_round() -> None:
    """GBME asks all eight in the first round, six of them besides for training; twelve are sent the model."""
    cost = with_derived(cost_of("gbme", replace(toy.SHORT, rounds=1), together=1.0))
    assert cost["client_rounds"] == 8
    assert cost["payload_bytes_down"] == pytest.approx((8 + 6) / 8 * 4 * (3 * MODEL + 6))


def test_a_final_visit_is_a_round_of_all() -> None:
    cost = with_derived(cost_of(setting=replace(toy.SETTING, final_visit=True)))
    assert cost["client_rounds"] == 4 * 6 + 8
    assert cost["payload_bytes_down"] == 4 * MODEL > (cost["payload_bytes_up"] or math.inf)


def test_cohorts_of_changing_size_are_counted_as_they_come() -> None:
    setting = replace(toy.SETTING, sampling="independent", participation=0.3, rounds=6)
    run = toy.run(ALGORITHMS["fedavg"](), setting=setting)
    there = sum(len(run.population.cohort(r)) for r in range(6))
    assert toy.finish(run).outcome().cost["client_rounds"] == there not in (0, 6 * 2)


def test_where_nothing_is_sent_nobody_takes_part() -> None:
    cost = with_derived(cost_of("centralised"))
    assert cost["client_rounds"] is None and not {"payload_bytes_down", "payload_bytes_up"} & {*cost}
    assert cost["parameters"] == MODEL


def test_a_run_that_was_stopped_counts_on(tmp_path: Path) -> None:
    first: Run = toy.run(ALGORITHMS["fedavg"](), checkpoint=tmp_path / "checkpoint.pt")
    first.saved = -math.inf
    first.step()
    second = toy.run(ALGORITHMS["fedavg"](), checkpoint=tmp_path / "checkpoint.pt")
    assert second.progress.round == 1
    assert toy.finish(second).outcome().cost["client_rounds"] == 24


# Where it is found ----------------------------------------------------------------------------------------------------


def told(**more: float | None) -> Record:
    return record("unfreeze", cost={**document()["cost"], **more})


ASKED = ["parameters", "model_bytes", "forward_flops", "payload_bytes_down", "payload_bytes_up"]
NEW = told(parameters=14_862.0, model_bytes=59_448.0, forward_flops=1_136_480.0, client_rounds=100.0)


@pytest.mark.parametrize(
    "words", [ASKED, ["k parameters", "model kB", "MFLOP an image", "kB down", "kB up"]], ids=["names", "titles"]
)
def test_columns_are_there_for_who_asks_and_a_dash_for_runs_that_do_not_tell(words: list[str]) -> None:
    (board,) = chosen.boards([NEW, record("fedavg")], "last", ",".join(words))
    heading, lines = layout.grid(board, str, str)
    assert heading[3:] == ["k parameters", "model kB", "MFLOP an image", "kB down", "kB up"]
    shown = {line[0]: line[3:] for line in lines}
    assert shown == {"unfreeze": ["14.9", "59.4", "1.1", "30.0", "20.0"], "fedavg": ["–"] * 5}
    assert any("FLOP of a forward pass are the network's" in line for line in layout.remarks(board))


def test_a_folder_of_earlier_runs_has_dashes_and_no_error() -> None:
    (board,) = chosen.boards([record("fedavg")], "last", "generic,parameters")
    assert [column.show(board.rows[0]) for column in columns.columns(board)][1] == "–"
    with pytest.raises(Exception, match="the results have none of this name"):
        chosen.boards([record("fedavg")], "last", "parametres")


def test_nobody_who_does_not_ask_sees_them() -> None:
    (board,) = table.leaderboards([NEW])
    assert not {"k parameters", "kB up"} & {column.title for column in columns.columns(board)}
    assert layout.remarks(board) == layout.remarks(table.leaderboards([told()])[0])


def test_networks_are_listed_by_what_they_are() -> None:
    entries = {entry["name"]: entry for entry in json.loads(typed("list", "models", "--json"))}
    assert list(entries) == list(models.MODELS)
    assert {key: entries["light_cnn"][key] for key in OF_THE_NETWORK} == {
        "parameters": 19_622,
        "model_bytes": 78_488,
        "forward_flops": 2_219_520,
    }
    (line,) = (line.split() for line in typed("list", "models").splitlines() if "light_cnn" in line)
    assert line[:4] == ["light_cnn", "19,622", "0.08", "2.22"]
    assert "takes          78,488 bytes, 2,219,520 FLOP to look at an image" in typed("show", "light_cnn")
