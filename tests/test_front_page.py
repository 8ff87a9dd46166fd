"""The front page's table and picture are what the published results give, by the command that stands beside them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bench.results import records
from bench.results.leaderboard import leaderboards
from bench.site import picture
from tests.test_command import Bench
from tests.test_command import bench as bench
from tests.test_results import record

ROOT = Path(__file__).parents[1]
KEY = "personal.balanced"


def command() -> list[str]:
    (found,) = re.findall(r"`bench (table [^`]* --into README\.md[^`]*)`", (ROOT / "README.md").read_text())
    return shlex.split(found.replace("\n", " "))


def test_the_front_page_is_what_its_command_writes(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    said = command()
    assert bench(*said).status == 0
    assert Path("README.md").read_text() == (ROOT / "README.md").read_text()
    if "--draw" in said:
        drawn = said[said.index("--draw") + 1]
        assert picture.read(Path(drawn).read_text()) == picture.read((ROOT / drawn).read_text())


def test_a_picture_holds_the_numbers_of_the_best_rows(tmp_path: Path, bench: Bench) -> None:
    shares = {"fedavg": 0.5, "local": 0.25, "ditto": 0.75}
    known = [
        record(label, seed=seed, values={KEY: share + seed / 100})
        for label, share in shares.items()
        for seed in range(5)
    ]
    known += [record("fedrep", seed=seed, values={KEY: 0.9}) for seed in range(4)]  # too few for an interval
    (part,) = picture.read(picture.drawn(leaderboards(known), KEY, 2))
    assert [value["algorithm"] for value in part["values"]] == ["ditto", "fedavg"]
    assert [value["mean"] for value in part["values"]] == [77.0, 52.0]
    assert [dot["value"] for dot in part["dots"]] == [75, 76, 77, 78, 79, 50, 51, 52, 53, 54]
    assert all(value["low"] < value["mean"] < value["high"] for value in part["values"])
    with pytest.raises(ValueError, match="no row has unheard"):
        picture.drawn(leaderboards(known), "unheard")
    with pytest.raises(ValueError, match="holds no numbers"):
        picture.read("<svg></svg>")


def test_a_picture_has_the_colours_of_the_site_and_no_other() -> None:
    svg = picture.drawn(leaderboards([record("fedavg", seed=seed) for seed in range(5)]), KEY)
    light, dark = re.findall(r":root\{(.*?)\}", svg)
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert len(used) > 3
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+): ", scheme))
    assert light != dark and "prefers-color-scheme: dark" in svg
    assert not re.findall(r'(?:fill|stroke)="#(?!000\b)\w+"', svg.replace('stroke="#ddd"', ""))


def test_how_many_rows_are_for_a_page(tmp_path: Path, bench: Bench) -> None:
    said = bench("table", ROOT / "results", "--best", 3)
    assert said.status == 2 and "--best is for --into and --draw" in said.err
    page = tmp_path / "page.md"
    page.write_text("<!-- leaderboard -->\n<!-- end of leaderboard -->\n")
    said = bench("table", ROOT / "results", "--best", 3, "--into", page, "--draw", tmp_path / "best.svg")
    assert said.status == 0 and not said.out
    (board,) = leaderboards(records.read_all(ROOT / "results")[0])[:1]
    assert f"5 seeds, the 3 best of {len(board.rows)} rows" in page.read_text()
    assert [line.split("`")[1] for line in page.read_text().splitlines() if line.startswith("| `")][:3] == [
        row.label for row in board.rows[:3]
    ]
    assert len(picture.read((tmp_path / "best.svg").read_text())[0]["values"]) == 3
    said = bench("table", tmp_path, "--draw", tmp_path / "none.svg")
    assert said.status == 2 and not (tmp_path / "none.svg").exists()
