"""Two rows head to head: what stands on their page, where it is linked from, and how it is reached by keyboard."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.results import records
from bench.results.compared import difference
from bench.results.comparison import spell_p
from bench.results.leaderboard import Leaderboard, leaderboards, measured
from bench.results.statistics import pairwise
from bench.site import versus
from bench.site.rows import id_of, page_of
from bench.site.versus import MEASURES
from tests.test_site import GROUPS, Browser, Page, Planted, against, made, plant, squeezed
from tests.test_site import browser as browser
from tests.test_site import chromium as chromium
from tests.test_site import planted as planted


def board_of(out: Path, dataset: str = "digits") -> Leaderboard:
    found, _ = records.read_all(out)
    return max((b for b in leaderboards(found) if b.dataset == dataset), key=lambda b: len(b.rows))


def page(site: Path, board: Leaderboard, first: str, second: str) -> Page:
    ids = {row.label: id_of(row) for row in board.rows}
    return Page(against(site)[f"versus.html?{page_of(board, 0).name}&{ids[first]}&{ids[second]}"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Three methods of five seeds, the first of four; one failed, one that has another seed."""
    out = tmp_path_factory.mktemp("two") / "results"
    ids = {f"{name} {seed}": plant(out, name, seed) for name in ("beta", "gamma") for seed in range(5)}
    ids |= {f"alpha {seed}": plant(out, "alpha", seed) for seed in range(4)}
    ids["failed"] = plant(out, "delta", 0, reason="the loss is not a number")
    ids["later"] = plant(out, "epsilon", 7)
    return Planted(out=out, site=made(out, out.parent / "site"), ids=ids)


def test_a_pair_has_the_differences_and_tests_of_the_results_statistics(two: Planted) -> None:
    board = board_of(two.out)
    shown = page(two.site, board, "beta", "gamma")
    head, *rows = shown.tables[0]
    assert head[1:] == ["difference", "better, equal, worse", "p", "corrected"]
    wanted = {}
    for name, key in MEASURES.items():
        pairs = {(pair.first, pair.second): pair for pair in pairwise(measured(board, key))}
        if (pair := pairs.get(("beta", "gamma"))) is not None:
            counts = f"{pair.wins}, {pair.ties}, {pair.losses}"
            wanted[name] = [difference(pair.difference), counts, spell_p(pair.p), spell_p(pair.corrected)]
    assert {row[0]: row[1:] for row in rows} == wanted and {*wanted} == {"balanced", "personal", "tail"}
    assert "gamma has no generic and no few, so that nothing is paired there." in shown.text
    assert "5 seeds cannot separate any two of 5 algorithms" in shown.text


def test_the_seeds_of_a_pair_are_differences_of_runs_of_one_seed(two: Planted) -> None:
    shown = page(two.site, board_of(two.out), "beta", "alpha")
    head, *rows = shown.tables[1]
    assert head == ["seed", *MEASURES] and [row[0] for row in rows] == ["0", "1", "2", "3"]
    for seed, *cells in rows:
        one, other = (records.read(two.out / two.ids[f"{name} {seed}"]).metrics for name in ("beta", "alpha"))
        exact = [100 * ((one[key] or 0.0) - (other[key] or 0.0)) for key in MEASURES.values()]
        assert cells == [f"{value:+.1f}" for value in exact]
    drawn = shown.specs[0]["layer"][2]["data"]["values"]
    assert Counter(dot["measure"] for dot in drawn) == dict.fromkeys(MEASURES, 4)


def own(record: records.Record) -> dict[int, float]:
    """Balanced accuracy by client, from the counts alone."""
    frame = record.counts()
    last = frame[(frame["model"] == "personal") & (frame["round"] == frame["round"].max()) & (frame["total"] > 0)]
    shares: dict[int, list[float]] = {}
    for line in last.to_dict("records"):
        shares.setdefault(line["client"], []).append(line["correct"] / line["total"])
    return {client: math.fsum(values) / len(values) for client, values in shares.items()}


def test_clients_are_paired_with_themselves(two: Planted) -> None:
    differences = []
    for seed in range(4):
        one, other = (own(records.read(two.out / two.ids[f"{name} {seed}"])) for name in ("beta", "alpha"))
        assert len(one) == len(other) == 11  # one client has nothing to test on
        differences += [one[client] - other[client] for client in one]
    shown = page(two.site, board_of(two.out), "beta", "alpha")
    better = sum(value > 1e-12 for value in differences) / len(differences)
    assert f"44 of them over 4 seeds: how many lie where. The first is better for {100 * better:.0f} %" in shown.text
    assert f"the median is {100 * median(differences):+.1f}." in shown.text
    bins = [row for row in shown.tables[2][1:] if row[1] != "0"]
    assert sum(int(row[1]) for row in bins) == 44
    for words, count in bins:
        low, high = map(float, words.split(" to "))
        assert sum(low <= round(100 * value, 9) < high for value in differences) == int(count)


def test_classes_are_paired_from_head_to_tail(two: Planted) -> None:
    shown = page(two.site, board_of(two.out), "beta", "alpha")
    head, *rows = shown.tables[3]
    assert head == ["class", "group", "training images", "beta", "alpha", "difference"]
    assert [row[:3] for row in rows] == [
        ["0", "many", "400"], ["1", "medium", "90"], ["2", "medium", "30"], ["3", "few", "8"]
    ]  # fmt: skip
    for label, *_, first, second, between in rows:
        means = [
            math.fsum(records.read(two.out / two.ids[f"{name} {seed}"]).confusion("generic")[int(label), int(label)]
                      for seed in range(4)) / (4 * 50)
            for name in ("beta", "alpha")
        ]  # fmt: skip
        assert [first, second] == [f"{100 * mean:.1f}" for mean in means]
        assert between == f"{100 * (means[0] - means[1]):+.1f}"
    assert len(GROUPS["few"]) == 1
    assert not [
        spec for spec in page(two.site, board_of(two.out), "beta", "gamma").specs if "difference" not in str(spec)
    ]


def test_where_nothing_can_be_paired_a_sentence_stands(two: Planted) -> None:
    board = board_of(two.out)
    for other in ("delta", "epsilon"):
        shown = page(two.site, board, "beta", other)
        assert "Nothing can be paired: there is no seed that both have finished" in shown.text
        assert not shown.specs and not shown.tables


def test_every_two_rows_of_a_comparison_have_a_page_and_a_lone_row_has_none(two: Planted, tmp_path: Path) -> None:
    board = board_of(two.out)
    assert len(against(two.site)) == math.comb(len(board.rows), 2)
    plant(tmp_path / "out", "alpha")
    site = made(tmp_path / "out", tmp_path / "site")
    (alone,) = (site / "comparisons").iterdir()
    assert not (site / "versus").exists() and "versus.html" not in alone.read_text()


def test_of_very_many_rows_the_highest_are_paired(
    two: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versus, "MOST", 3)
    site, board = made(two.out, tmp_path / "site"), board_of(two.out)
    best = [id_of(row) for row in board.rows[:3]]
    (comparison,) = (site / "comparisons").iterdir()
    assert {address.split("?")[1].split("&", 1)[1] for address in against(site)} == {
        f"{first}&{second}" for first, second in itertools.combinations(best, 2)
    }
    text = comparison.read_text()
    assert (
        "Any two of the 3 highest rows" in text
        and "highest rows" not in (two.site / "comparisons" / comparison.name).read_text()
    )
    assert [each for each in re.findall(r'versus.html\?[^"]*&amp;(\w+)"', text)] == best
    assert re.findall(r'<option value="(\w+)"', text) == 2 * best


def test_two_rows_are_chosen_by_the_keyboard_and_a_row_leads_to_the_choice(two: Planted, browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    board = board_of(two.out)
    (comparison,) = (two.site / "comparisons").iterdir()
    browser.open(two.site, f"comparisons/{comparison.name}")
    browser.run("document.getElementById('choice-2').focus()")
    browser.press("g", Keys.TAB)
    assert browser.run("return document.activeElement.innerText") == "Compare"
    browser.press(Keys.ENTER)
    browser.until(lambda: "versus.html?" in browser.driver.current_url)
    browser.settle()
    assert squeezed(browser.find("h1").text) == f"{board.rows[0].label}againstgamma"
    assert browser.driver.title == f"{board.rows[0].label} against gamma · bench"
    assert browser.run("return document.querySelectorAll('.chart svg').length") == len(browser.driver.find_elements(
        "css selector", ".chart"))  # fmt: skip
    browser.open(two.site, f"comparisons/{comparison.name}")
    browser.find(f"a[href$='&{id_of(board.rows[2])}']").click()
    browser.until(lambda: "versus.html?" in browser.driver.current_url)
    browser.settle()
    assert squeezed(browser.find("h1").text) == f"{board.rows[0].label}against{board.rows[2].label}"
    assert browser.complaints() == []


def test_two_rows_of_one_seed_are_drawn_without_an_interval(tmp_path: Path, browser: Browser) -> None:
    for name in ("alpha", "beta"):
        plant(tmp_path / "out", name)
    site = made(tmp_path / "out", tmp_path / "site")
    browser.open(site, next(iter(against(site))))
    assert browser.run("return document.querySelectorAll('#seeds .mark-symbol path').length") == len(MEASURES)
    assert browser.complaints() == []


def chosen(browser: Browser) -> list[Any]:
    found: list[Any] = browser.run(
        "return [...document.querySelectorAll('#choice select')].map(s => s.selectedOptions[0].text)"
    )
    return found


def test_an_address_names_two_rows_in_either_order_and_nonsense_is_told(two: Planted, browser: Browser) -> None:
    board = board_of(two.out)
    name, ids = page_of(board, 0).name, {row.label: id_of(row) for row in board.rows}
    browser.open(two.site, f"versus.html?{name}&{ids['alpha']}&{ids['gamma']}")
    assert squeezed(browser.find("h1").text) == "gammaagainstalpha" and chosen(browser) == ["alpha", "gamma"]
    browser.open(two.site, f"versus.html?{name}&{ids['gamma']}&{ids['gamma']}")
    assert browser.find("h1").text == "One row twice" and browser.find("#choice").is_displayed()
    browser.open(two.site, f"versus.html?{name}&{ids['gamma']}&00000000")
    assert browser.find("h1").text == "No such rows" and browser.find("#choice").is_displayed()
    for unknown in ("nowhere", "../../etc&1", "<img src=x>", ""):
        browser.open(two.site, f"versus.html?{unknown}")
        assert browser.find("h1").text == "No such comparison", unknown
        assert not browser.find("#choice").is_displayed()
