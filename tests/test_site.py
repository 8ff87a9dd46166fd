"""The site: its pages, without a browser and in a real one."""

from __future__ import annotations

import base64
import gzip
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bench.command.site import site_command
from bench.protocol.identity import identify
from bench.results import classes, columns, layout, packed, records, standing
from bench.results.leaderboard import leaderboards
from bench.results.standing import Standing
from bench.site import build as building
from bench.site import charts
from bench.site.build import MARKER, build
from bench.site.counts import MOST, count
from bench.site.matrix import matrices
from tests.answers import from_rows, parted

WILD = "<img src=x onerror=\"window.wild=1\"> & 'quoted' </script><script>window.wild=2</script>"
"""What a label, a reason or a person's notes may hold."""
NOTES = f"# Notes\n\nSeen *by hand*. {WILD}\n\n![a picture](https://example.org/picture.png)\n\n| a |\n|--|\n| 1 |\n"

# A planted folder of results --------------------------------------------------------------------------------

CLASSES = (400, 90, 30, 8)
GROUPS = {"many": [0], "medium": [1, 2], "few": [3]}
STRENGTH = {"alpha": 0.8, "beta": 0.6, "gamma": 0.4}
"""Algorithms and about how accurate they are; gamma has no generic model."""


def cell(correct: float, total: int) -> tuple[int, int]:
    return round(max(0.0, min(1.0, correct)) * total), total


def plant(
    out: Path,
    algorithm: str = "alpha",
    seed: int = 0,
    *,
    dataset: str = "digits",
    imbalance: float | None = 10.0,
    clients: int = 12,
    evaluations: int = 4,
    label: str | None = None,
    reason: str | None = None,
    unseen: bool = False,
    counts: Sequence[int] = CLASSES,
) -> str:
    """Store a finished or failed run, its metrics computed from its counts, and give its id."""
    import torch

    from bench.training import metrics

    setting: dict[str, Any] = {"model": "mlp", "norm": "group", "clients": clients, "participation": 0.5}
    setting |= {"rounds": 2 * evaluations, "epochs": 1, "batch_size": 8, "lr": 0.1, "partition": "dirichlet"}
    setting |= {"imbalance": imbalance, "alpha": None if imbalance is None else 0.5}
    described = {"name": dataset, "version": 1, "fields": {}}
    strength = STRENGTH.get(algorithm, 0.5) + 0.01 * seed
    tested = {"generic": [-1], "personal": range(clients), "personal.masked": range(clients)}
    tested |= {"unseen": [clients], "unseen.masked": [clients]} if unseen else {}
    if algorithm == "gamma":
        del tested["generic"]
    groups = GROUPS if len(counts) == 4 else {"many": list(range(len(counts))), "medium": [], "few": []}
    tensors = {name: torch.tensor(members, dtype=torch.int64) for name, members in groups.items()}
    rows: list[dict[str, int | str]] = []
    curve: list[Mapping[str, float | int | None]] = []
    for step in range(1, evaluations + 1):
        now: list[dict[str, int | str]] = []
        whose = [(model, client) for model, those in tested.items() for client in those]
        for (model, client), place in itertools.product(whose, range(len(counts))):
            images = 50 if client < 0 else 0 if client == 3 else 4 + 2 * place  # one client has nothing to test on
            right, total = cell((strength - 0.6 * place / len(counts) + 0.02 * client) * step / evaluations, images)
            drawn = int(client < clients - 2) if model.startswith("personal") else -1
            if total:
                now.append({"round": 2 * step, "model": model, "client": client, "class": place, "drawn": drawn})
                now[-1] |= {"correct": right, "total": total}
        tallies, took_part = from_rows(now, len(counts))
        curve.append({"round": 2 * step, **metrics.summarise(tallies, tensors, took_part)})
        rows += now
    measured = {key: value for key, value in curve[-1].items() if key != "round"}
    cell_of = {"engine": "serial", "precision": "fp32", "device": "cpu"}
    document = {
        "protocol": identify({"dataset": described, "setting": setting}),
        "identity": {
            "algorithm": {"name": algorithm, "version": 1, "fields": {"label": label}},
            "dataset": described,
            "setting": setting,
            "seed": seed,
            **cell_of,
        },
        "algorithm": algorithm,
        "call": f"{algorithm.title()}()",
        "label": label or algorithm,
        "tier": "L" if algorithm == "beta" else "S",
        "dataset": dataset,
        "imbalance": imbalance,
        "alpha": setting["alpha"],
        "seed": seed,
        "setting": {"name": "quick", **setting},
        "overrides": {},
        **cell_of,
        "versions": {"bench": "0.1.0", "python": "3.11.7"},
        "hardware": {"machine": "x86_64", "cpu": "a processor", "cores": 2, "gpu": None},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "digest": f"{seed:064x}",
        "finished": "2026-02-03T04:05:06+00:00",
    }
    run = identify(document["identity"])
    if reason is not None:
        records.fail(out, run, document, reason)
        return run
    document |= {
        "fingerprint": f"{seed:016x}",
        "class_counts": list(counts),
        "groups": groups,
        "metrics": measured,
        "cost": {
            "bytes_down": 1e6 * (1 + len(algorithm)),
            "bytes_up": 1e6,
            **dict.fromkeys(("train_flops", "adaptation_flops", "server_flops"), 1e9 * (2 - strength)),
            "train_samples": 1000.0 * (2 - strength),
            "adaptation_samples": 0.0,
            "server_samples": 0.0,
            "wall_seconds": 10 * strength,
            "peak_memory_bytes": 3e8,
            "client_state_bytes": 0.0,
        },
    }
    document["tested"] = {"clients": clients - 1, "images": [28, 28], "worst_decile": 2, "one_class": 0}
    document["tested"] |= {"drawn": clients - 3, "never": 2}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    records.write(out, run, document, curve, *parted(columns))
    return run


@dataclass
class Planted:
    """A folder of results and the site made of it."""

    out: Path
    site: Path
    ids: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Two comparisons, three seeds; a failed run, a wild label, unseen clients, verified runs, notes."""
    out = tmp_path_factory.mktemp("planted") / "results"
    ids = {}
    for seed in range(3):
        for algorithm in STRENGTH:
            ids[f"{algorithm} {seed}"] = plant(out, algorithm, seed)
        for algorithm in ("alpha", "beta"):
            ids[f"other {algorithm} {seed}"] = plant(out, algorithm, seed, dataset="faces", imbalance=None, unseen=True)
    ids["failed"] = plant(out, "delta", 0, reason=f"the loss is not a number {WILD}")
    ids["wild"] = plant(out, "epsilon", 0, label=WILD, evaluations=1)
    again = Standing(kind="verified", date="2026-03-04", commit="ffff0123456789", versions={}, hardware={}, document="")
    checked = [ids[f"alpha {seed}"] for seed in range(3)]
    standing.note(
        out, {run: replace(again, document=records.digest(out, run) or "") for run in [*checked, ids["beta 0"]]}
    )
    (out / "NOTES.md").write_text(NOTES)
    return Planted(out=out, site=made(out, out.parent / "site"), ids=ids)


def made(out: Path, to: Path) -> Path:
    found, damaged = records.read_all(out)
    assert not damaged
    build(found, to, notes=records.prose(out))
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Page(html.parser.HTMLParser):
    """What a page links to, loads, draws and tabulates."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.scripts: list[str] = []
        self.specs: list[dict[str, Any]] = []
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "a":
            self.links.append(given["href"] or "")
        for name in ("src", "srcset", "data", "poster", *(["href"] if tag != "a" else [])):
            if given.get(name):
                self.loaded.append(given[name] or "")
        assert not any(name.startswith("on") for name in given), f"{tag} runs a script: {given}"
        if tag == "table":
            self.tables.append([])
        if tag == "tr" and self.tables:
            self.tables[-1].append([])
        if tag in ("td", "th") and self.tables:
            self.tables[-1][-1].append("")
        if tag == "script":
            self.scripts.append("")
            self._json = given.get("type") == "application/json"
        if tag not in ("meta", "link", "br", "wbr", "input", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-3:]}"
        self._open.pop()
        if tag == "script" and self._json:
            self.specs.append(json.loads(self.scripts[-1]))

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
            return
        self.text += data
        if ("td" in self._open or "th" in self._open) and self.tables:
            self.tables[-1][-1][-1] += data


def pages(site: Path) -> dict[str, Page]:
    """All pages, those of runs and of pairs by their addresses."""
    files = {str(file.relative_to(site)): file.read_text(encoding="utf-8") for file in sorted(site.rglob("*.html"))}
    return {name: Page(text) for name, text in {**files, **shelved(site), **against(site)}.items()}


def shelved(site: Path) -> dict[str, str]:
    """What is shown of each run, as it lies compressed in a script, by the run's address."""
    found = {}
    for file in sorted((site / "runs").glob("*.js")):
        told = re.fullmatch(r"shelve\((.*)\);\n", file.read_text(), re.DOTALL)
        assert told is not None
        for run, text in json.loads(told[1]).items():
            assert run[:2] == file.stem
            found[f"run.html?{run}"] = gzip.decompress(base64.b64decode(text)).decode()
    return found


def against(site: Path) -> dict[str, str]:
    """What is shown of each pair of rows, as it lies compressed in a script, by the pair's address."""
    found: dict[str, str] = {}
    for file in sorted((site / "versus").glob("*/*.js")):
        told = re.fullmatch(r"shelve\((.*)\);\n", file.read_text())
        assert told is not None
        if file.name != "rows.js":
            pairs = json.loads(gzip.decompress(base64.b64decode(json.loads(told[1]))))
            found |= {f"versus.html?{file.parent.name}&{file.stem}&{other}": text for other, text in pairs.items()}
    return found


# Without a browser ------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(planted: Planted, tmp_path: Path) -> None:
    shutil.copytree(planted.out, tmp_path / "elsewhere")
    found, _ = records.read_all(tmp_path / "elsewhere")
    build(reversed(found), tmp_path / "site", notes=NOTES)
    assert contents(tmp_path / "site") == contents(planted.site)


def test_a_second_build_touches_nothing(planted: Planted) -> None:
    before = {file: file.stat().st_mtime_ns for file in planted.site.rglob("*.*") if file.name != MARKER}
    made(planted.out, planted.site)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_every_link_leads_to_a_file_and_nothing_is_loaded_from_elsewhere(planted: Planted) -> None:
    known = pages(planted.site)
    assert len(shelved(planted.site)) == len(planted.ids)
    for name, page in known.items():
        home = (planted.site / name).parent
        for target in page.links + page.loaded:
            parts = urlsplit(target)
            if parts.scheme == "data" or (target in page.links and target.startswith("https://example.org/")):
                continue  # a link in a person's notes: it is followed only by who clicks on it
            assert not parts.scheme and not parts.netloc, f"{name} refers to {target}"
            file = home / unquote(parts.path) if parts.path else planted.site / name
            assert file.is_file(), f"{name} refers to {target}"
            asked = {*parts.query.split("&")}
            assert not parts.query or any(asked <= {*address.partition("?")[2].split("&")} for address in known), target
            if parts.fragment and file.suffix == ".html":
                assert f'id="{parts.fragment}"' in file.read_text(), f"{name} refers to {target}"


def test_the_numbers_are_those_of_the_table(planted: Planted) -> None:
    found, _ = records.read_all(planted.out)
    boards = leaderboards(found)
    known = pages(planted.site)
    assert len(boards) == 4
    for board in boards:
        heading, cells = layout.grid(board, str, str)
        for line in (heading, *cells) if "standing" in heading else ():
            del line[2]  # on a page it is the last column
        (page,) = [
            page
            for name, page in known.items()
            if name.startswith("comparisons/")
            and squeezed(layout.title(board)) in squeezed(page.text)
            and f"protocol{board.protocol}" in squeezed(page.text)
        ]
        head, *rows = [[squeezed(cell) for cell in row] for row in page.tables[0]]
        compared = ["compare"] * (len(rows) > 1)
        assert head == [squeezed(name) for name in ("algorithm", "tier", "seeds", *compared, *heading[3:], "standing")]
        assert [[row[0], row[1], *row[3 + len(compared) : -1]] for row in rows] == [
            [squeezed(cell) for cell in (line[0], line[1], *line[3:])] for line in cells
        ]


def by_id(found: Sequence[records.Record]) -> dict[str, records.Record]:
    return {record.id: record for record in found}


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_the_leaderboard_of_all_comparisons_has_every_row(planted: Planted) -> None:
    found, _ = records.read_all(planted.out)
    boards = leaderboards(found)
    head, *rows = pages(planted.site)["index.html"].tables[0]
    names = [squeezed(cell) for cell in head]
    assert [squeezed(row[1]) for row in rows] == [squeezed(row.label) for board in boards for row in board.rows]
    personal = [columns.Column("", "personal").show(row) for board in boards for row in board.rows]
    assert [squeezed(row[names.index("personal")]) for row in rows] == [squeezed(cell) for cell in personal]


def test_wild_text_is_shown_and_never_run(planted: Planted) -> None:
    for name, page in pages(planted.site).items():
        assert "<img" not in page.source and "window.wild=2</script>" not in page.source, name
        assert all(not script.strip() or script.lstrip().startswith("{") for script in page.scripts), name
    known = pages(planted.site)
    assert squeezed(WILD) in squeezed(known[f"run.html?{planted.ids['wild']}"].text)
    assert squeezed(WILD) in squeezed(known[f"run.html?{planted.ids['failed']}"].text)
    assert "Seen by hand" in known["index.html"].text
    assert squeezed(WILD) in squeezed(known["index.html"].text)


def test_a_method_of_ours_has_a_page_of_what_its_file_says_and_of_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "results"
    plant(out, "fedrep", label="fedrep(head_epochs=5)+topk")
    plant(out, "fedavg", 0)
    plant(out, "alpha", 0, label="../bench/task")
    site = made(out, tmp_path / "site")
    files = {str(file.relative_to(site)) for file in site.rglob("*.html") if file.parent.name != "comparisons"}
    assert files == {
        "index.html",
        "run.html",
        "versus.html",
        *(f"methods/{name}.html" for name in ("index", "fedavg", "fedrep", "topk")),
    }
    known = pages(site)
    fedrep, topk, index = (known[name] for name in ("methods/fedrep.html", "methods/topk.html", "index.html"))
    for told in ("Collins, Hassani, Mokhtari", "E + head_epochs", "head_epochs = 10", "FedBABU's copy"):
        assert squeezed(told) in squeezed(fedrep.text), told
    assert "https://arxiv.org/abs/2102.07078" in fedrep.links
    assert any(link.startswith("../run.html?") for link in fedrep.links)
    assert "fedrep(head_epochs=5)+topk" in squeezed(topk.text) and "fedavg" not in squeezed(topk.text)
    assert {"methods/fedavg.html", "methods/fedrep.html", "methods/topk.html"} <= set(index.links)
    asked = "import sys; from bench.site.methods import described; described(['fedrep+topk'])"
    done = subprocess.run([sys.executable, "-c", f"{asked}; print('torch' in sys.modules)"], capture_output=True)
    assert done.stdout == b"False\n", done


def test_all_that_runs_left_lies_in_a_pack(planted: Planted) -> None:
    known = pages(planted.site)
    assert {file.name for file in (planted.site / "data").iterdir()} == {*packed.FILES}
    there, damaged = records.read_all(planted.site / "data")
    assert not damaged and {record.id for record in there} == {*planted.ids.values()}
    for record in there:
        own = records.read(planted.out / record.id)
        page = known[f"run.html?{record.id}"]
        assert records.text_of(record) == records.text_of(own)
        assert all(record.table(name).equals(own.table(name)) for name in own.tables)
        assert all(digest in page.text for digest in own.tables.values())
        assert {f"data/{name}" for name in packed.FILES} <= {*page.links}


def test_a_run_says_where_it_comes_from(planted: Planted) -> None:
    text = squeezed(pages(planted.site)[f"run.html?{planted.ids['alpha 1']}"].text)
    for word in (
        "0123456789abcdef0123456789abcdef01234567",
        f"{1:016x}",
        "aprocessor",
        "python3.11.7",
        "seed1",
        f"{1:064x}",
    ):
        assert word in text
    assert "verified:runagainon2026-03-04withcommitffff012345,thesametothebit" in text


def test_a_failed_run_says_why_and_has_no_pictures(planted: Planted) -> None:
    page = pages(planted.site)[f"run.html?{planted.ids['failed']}"]
    assert "This run failed." in page.text and "the loss is not a number" in page.text
    assert not page.specs


def test_an_entry_is_verified_only_if_all_its_runs_are(planted: Planted) -> None:
    _, *rows = pages(planted.site)["index.html"].tables[0]
    standing = {squeezed(row[1]): row[-1].strip() for row in rows if "faces" not in row[0]}
    assert standing["alpha"] == "✓ verified"
    assert standing["beta"] == "self-reported, 1 of 3 runs better"
    assert standing["gamma"] == "self-reported"


def test_every_picture_is_one_that_vega_lite_draws_and_has_its_numbers_as_a_table(planted: Planted) -> None:
    import vl_convert

    seen = 0
    chosen = kinds(planted)
    for name, page in pages(planted.site).items():
        text = page.source
        assert text.count('<figure class="figure"') == text.count("The numbers as a table"), name
        assert len(page.specs) == text.count('<div class="chart" role="img" aria-label="')
        for spec in page.specs if name in chosen else ():
            fixed = json.loads(json.dumps(spec).replace('"container"', "400"))
            assert "<svg" in vl_convert.vegalite_to_svg(fixed)
            seen += 1
    assert seen > 25


def test_the_tables_of_pictures_hold_what_is_drawn(planted: Planted) -> None:
    record = records.read(planted.out / planted.ids["beta 2"])
    curves, counted = charts.curves(record.rounds()), count(record)
    assert curves is not None
    assert [row[0] for row in curves.rows] == ["2", "4", "6", "8"]
    personal = record.metrics["personal"]
    assert personal is not None
    assert curves.heading[:3] == ("round", "balanced", "personal")
    assert curves.rows[-1][2] == f"{100 * personal:.1f}"
    balanced = record.metrics["personal.balanced"]
    assert balanced is not None and abs(balanced - personal) > 0.002
    found, _ = records.read_all(planted.out)
    board = next(board for board in leaderboards(found) if board.dataset == "digits" and len(board.rows) > 2)
    shown = {figure.name: {row[0]: row for row in figure.rows} for figure in charts.spread(board)}
    assert f"2: {100 * balanced:.1f}" in shown["spread-balanced"]["beta"][4]
    assert {figure.name for figure in charts.cost(board)} == {"cost-balanced", "cost-generic"}
    followed = charts.progress(board, {each.id: charts.graded(each.rounds()) if each.tables else {} for each in found})
    assert followed is not None
    lines = {(line[0], line[1]): line[2:] for line in followed.rows}
    of_seeds = [each.rounds().set_index("round")["personal.balanced"] for each in found
                if each.algorithm == "gamma" and each.dataset == "digits"]  # fmt: skip
    assert lines["gamma", "4"] == (f"{100 * math.fsum(seed[4] for seed in of_seeds) / 3:.1f}", columns.ABSENT)
    drawn = {(value["round"], value["model"]): value["value"] for value in curves.specs[0]["data"]["values"]}
    assert drawn[8, "personal"] == pytest.approx(100 * personal, abs=1e-3)
    clients = [part.accuracy["personal"] or 0.0 for part in counted.clients]
    assert clients == sorted(clients) and len(clients) == 11
    assert math.fsum(clients) / 11 == pytest.approx(personal)
    generic = [part.accuracy["generic"] or 0.0 for part in counted.classes]
    assert math.fsum(generic) / 4 == pytest.approx(record.metrics["generic"])
    assert [part.group for part in counted.classes] == ["many", "medium", "medium", "few"]
    assert [part.group for part in counted.clients].count("worst decile") == 2


def test_a_confusion_matrix_is_drawn_as_it_is_counted(planted: Planted) -> None:
    record = records.read(planted.out / planted.ids["beta 2"])
    generic, personal = matrices(record)
    assert (generic.name, personal.name) == ("confusion-generic", "confusion-personal")
    counted = record.confusion("generic")
    cells, *_, numbers = generic.specs[0]["layer"]
    drawn = {(cell["row"], cell["column"]): cell for cell in cells["data"]["values"]}
    assert {place: cell["count"] for place, cell in drawn.items()} == {
        (k + 1, c + 1): counted[k, c] for k, c in zip(*counted.nonzero(), strict=True)
    }
    assert drawn[1, 1]["share"] == pytest.approx(100 * counted[0, 0] / counted[0].sum(), abs=1e-3)
    assert 0 < min(cell["shade"] for cell in drawn.values()) < max(cell["shade"] for cell in drawn.values()) <= 1
    assert numbers["mark"]["type"] == "text" and numbers["data"] == cells["data"]
    assert [row[1] for row in generic.rows] == ["many", "medium", "medium", "few"]
    assert generic.rows[0][5] == f"{100 * (classes.by_class(record, 'generic')[0].f1 or 0):.1f}"
    assert generic.rows[0][6] == f"1 ({counted[0, 1]})"
    assert [figure.name for figure in matrices(records.read(planted.out / planted.ids["gamma 1"]))] == [personal.name]


def test_of_many_classes_neighbours_are_put_together_in_the_matrix(tmp_path: Path) -> None:
    run = plant(tmp_path, "many", 0, counts=[500 - k for k in range(250)])
    record = records.read(tmp_path / run)
    (spec,) = matrices(record)[0].specs
    cells = spec["layer"][0]["data"]["values"]
    assert max(cell["row"] for cell in cells) == 84 and len(matrices(record)[0].rows) == 250
    assert sum(cell["count"] for cell in cells) == record.confusion("generic").sum()
    assert "text" not in [layer["mark"]["type"] for layer in spec["layer"] if layer["data"]["values"] is cells]


def test_a_run_of_an_earlier_format_has_no_matrix_and_says_so(tmp_path: Path) -> None:
    out = Path(shutil.copytree(Path(__file__).parent / "formats" / "2", tmp_path / "out"))
    (run,) = (path.name for path in out.iterdir())
    text = shelved(made(out, tmp_path / "site"))[f"run.html?{run}"]
    assert "confusion" not in text and "1 run of format 2 has no counts by predicted class." in text
    assert f"data/{run}/clients.parquet" in text


def test_many_classes_and_clients_are_put_together_and_keep_their_means(tmp_path: Path) -> None:
    classes = [5000 - place for place in range(1000)]
    run = plant(tmp_path, "alpha", clients=1, counts=classes)
    counted = count(records.read(tmp_path / run))
    assert len(counted.classes) == MOST
    assert sum(part.members for part in counted.classes) == 1000
    means = [part.accuracy["generic"] or 0.0 for part in counted.classes]
    assert math.fsum(means) / MOST == pytest.approx(records.read(tmp_path / run).metrics["generic"])


def test_a_run_evaluated_once_has_no_curve_and_says_so(planted: Planted) -> None:
    text = pages(planted.site)[f"run.html?{planted.ids['wild']}"].text
    assert "there is no curve" in text and "Accuracy by round" not in text


points = st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float)), min_size=1, max_size=9)


@given(points)
def test_the_front_holds_exactly_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    named = [(str(index), paid, got) for index, (paid, got) in enumerate(pairs)]
    chosen = charts.front(named)
    assert chosen
    for name, paid, got in named:
        beaten = any((p < paid and g >= got) or (p <= paid and g > got) for _, p, g in named)
        assert (name in chosen) != beaten


def test_what_is_no_longer_wanted_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    first, second = plant(tmp_path / "out", "alpha"), plant(tmp_path / "out", "beta", dataset="faces")
    site = made(tmp_path / "out", tmp_path / "site")
    (site / "CNAME").write_text("somewhere")
    shutil.rmtree(tmp_path / "out" / second)
    made(tmp_path / "out", site)
    assert (site / "CNAME").read_text() == "somewhere"
    assert {*shelved(site)} == {f"run.html?{first}"}
    assert [record.id for record in records.read_all(site / "data")[0]] == [first]
    assert len(list((site / "comparisons").iterdir())) == 1
    (site / "CNAME").unlink()
    assert contents(site) == contents(made(tmp_path / "out", tmp_path / "fresh"))


def test_a_folder_that_is_no_site_is_refused_and_left_alone(tmp_path: Path) -> None:
    plant(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(records.OutputUnwritable, match="is no site of ours"):
        made(tmp_path / "out", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(records.OutputUnwritable, match=r"cannot be written|no site of ours"):
        made(tmp_path / "out", tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 0, "files": []}', '{"format": 1, "files": ["../precious"]}', '{"format": 1, "files": [3]}',
     '{"format": 1, "files": ["/etc"]}', '{"format": 1}'],
)  # fmt: skip
def test_a_list_of_files_that_is_not_ours_removes_nothing(tmp_path: Path, text: str) -> None:
    plant(tmp_path / "out")
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MARKER).write_text(text)
    with pytest.raises(records.OutputUnwritable, match="not the list of a site's files"):
        made(tmp_path / "out", tmp_path / "site")
    assert (tmp_path / "precious").read_text() == "kept"
    assert contents(tmp_path / "site") == {MARKER: text.encode()}


def test_a_site_of_a_later_version_is_not_to_be_deleted(tmp_path: Path) -> None:
    plant(tmp_path / "out")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MARKER).write_text('{"format": 2, "files": []}')
    with pytest.raises(records.OutputUnwritable, match="of a later version of bench; update bench") as error:
        made(tmp_path / "out", tmp_path / "site")
    assert "delete" not in str(error.value)


def test_a_build_that_was_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path / "out", "alpha")
    site = made(tmp_path / "out", tmp_path / "site")
    expected = contents(site)
    plant(tmp_path / "out", "beta")
    written: list[Path] = []
    real = building._put

    def dying(file: Path, content: bytes) -> None:
        if len(written) == 12:  # new pages are among them
            raise KeyboardInterrupt
        written.append(file)
        real(file, content)

    monkeypatch.setattr(building, "_put", dying)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", site)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    plant(tmp_path / "out", "alpha")
    assert contents(made(tmp_path / "out", site)) == expected


def test_the_command_builds_names_damage_and_refuses_in_a_sentence(tmp_path: Path) -> None:
    good, bad = plant(tmp_path / "out", "alpha"), plant(tmp_path / "out", "beta")
    with (tmp_path / "out" / bad / "rounds.parquet").open("ab") as stream:
        stream.write(b" ")
    options = ["--out", str(tmp_path / "out"), "--to", str(tmp_path / "site")]
    done = CliRunner().invoke(site_command, options)
    assert done.exit_code == 0, done.output
    assert bad in done.output and "is no Parquet file" in done.output
    assert {*shelved(tmp_path / "site")} == {f"run.html?{good}"}
    (tmp_path / "out" / standing.FILE).write_text("{}")
    done = CliRunner().invoke(site_command, options)
    assert done.exit_code == 0 and f"{standing.FILE} cannot be read" in done.output
    done = CliRunner().invoke(site_command, ["--out", str(tmp_path / "nowhere")])
    assert done.exit_code != 0 and "there is no such folder" in done.output


def test_no_runs_make_a_site_that_says_so(tmp_path: Path) -> None:
    build([], tmp_path / "site")
    assert "There are no finished runs." in pages(tmp_path / "site")["index.html"].text


def test_the_libraries_licences_are_carried(planted: Planted) -> None:
    notices = (planted.site / "static" / "licences.txt").read_text()
    assert notices.count("Permission") + notices.count("Redistribution") >= 1
    assert "University of Washington" in (planted.site / "static" / "vega-licence.txt").read_text()
    assert "SpryMedia" in (planted.site / "static" / "datatables.js").read_text()


# In a browser -----------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium that was given nothing but a file's address."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for switch in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "disable-gpu",
            "disable-background-networking",
        ):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
        self.driver.set_page_load_timeout(120)

    def look(self, width: int = 1280, dark: bool = False) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def open(self, site: Path, address: str = "index.html") -> None:
        self.driver.get("about:blank")  # an address that differs after "#" only would not be loaded anew
        self.driver.get(f"{site.resolve().as_uri()}/{address}")
        self.settle()

    def settle(self) -> None:
        drawn = "return document.documentElement.dataset.ready !== undefined && " + (
            "!document.querySelector('.chart:not([data-drawn])')"
        )
        self.until(lambda: self.run(drawn))

    def until(self, holds: Any, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"still not so after {seconds} s at {self.driver.current_url}"
            time.sleep(0.05)

    def run(self, script: str, *given: object) -> Any:
        return self.driver.execute_script(script, *given)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def complaints(self) -> list[str]:
        """What the page wrote to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """What was asked for since the last call, successfully or not."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        sent = [
            entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"
        ]
        sockets = [entry["params"]["url"] for entry in entries if entry["method"] == "Network.webSocketCreated"]
        return sent + sockets

    def rows(self) -> list[list[str]]:
        """The visible rows of the leaderboard; a row above a comparison has one cell."""
        return self.run(  # type: ignore[no-any-return]
            "return [...document.querySelectorAll('#leaderboard tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )

    def column(self, name: str) -> list[list[float | None]]:
        """The numbers of a column, for each comparison, as they are sorted."""
        script = (
            "const heads = [...document.querySelectorAll('#leaderboard thead th')];"
            "const at = heads.findIndex(head => head.dataset.name === arguments[0]);"
            "const groups = [];"
            "for (const row of document.querySelectorAll('#leaderboard tbody tr')) {"
            "  if (row.cells.length === 1) groups.push([]);"
            "  else { const order = row.cells[at].dataset.order;"
            "         groups.at(-1).push(order === '' ? null : Number(order)); } }"
            "return groups;"
        )
        return self.run(script, name)  # type: ignore[no-any-return]

    def head(self, name: str) -> Any:
        return self.find(f'#leaderboard thead th[data-name="{name}"]')

    def state(self) -> dict[str, str]:
        """What the address says behind "#"."""
        return dict(parse_qsl(urlsplit(self.driver.current_url).fragment))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("there is no Chromium here: install the packages chromium and chromium-driver")
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.look()
    chromium.complaints()
    chromium.requests()
    return chromium


def kinds(planted: Planted) -> list[str]:
    """The addresses of a page of every kind; those of runs stand last."""
    comparisons = sorted(f"comparisons/{file.name}" for file in (planted.site / "comparisons").iterdir())
    runs = [planted.ids[name] for name in ("alpha 0", "gamma 1", "failed", "wild", "other beta 2")]
    pair = next(iter(against(planted.site)))
    return ["index.html", pair, *comparisons, *(f"run.html?{run}" for run in runs)]


def absent_last(values: Sequence[float | None], descending: bool) -> list[float | None]:
    there = sorted((value for value in values if value is not None), reverse=descending)
    return [*there, *[None] * (len(values) - len(there))]


def test_a_click_on_a_heading_sorts_within_each_comparison_and_another_turns_round(
    planted: Planted, browser: Browser
) -> None:
    browser.open(planted.site)
    browser.head("generic").click()
    best_first = browser.column("generic")
    assert len(best_first) == 4 and max(map(len, best_first)) == 3
    assert best_first == [absent_last(group, True) for group in best_first]
    assert any(None in group and group != [None] for group in best_first)
    assert browser.head("generic").get_attribute("aria-sort") == "descending"
    browser.head("generic").click()
    assert browser.column("generic") == [absent_last(group, False) for group in best_first]
    assert browser.head("generic").get_attribute("aria-sort") == "ascending"
    browser.head("bytes").click()
    assert browser.column("bytes") == [absent_last(group, False) for group in browser.column("bytes")]
    assert browser.head("generic").get_attribute("aria-sort") is None


def test_filters_leave_the_rows_that_pass_and_are_kept_in_the_address(planted: Planted, browser: Browser) -> None:
    from selenium.webdriver.support.select import Select

    browser.open(planted.site)
    everything = browser.rows()
    Select(browser.find("#filter-dataset")).select_by_visible_text("faces")
    assert [row[0] for row in browser.rows()] == ["faces, imbalance natural, setting quick", "alpha", "beta"]
    Select(browser.find("#filter-tier")).select_by_visible_text("L")
    assert [row[0] for row in browser.rows()][1:] == ["beta"]
    assert browser.find(".dt-info").text == "1 entry of 7"
    assert browser.state() == {"dataset": "faces", "tier": "L"}
    Select(browser.find("#filter-dataset")).select_by_visible_text("digits")
    browser.find("#find").send_keys("GAM")
    assert browser.rows() == [["No entry passes all filters."]]
    browser.find(".reset").click()
    browser.until(lambda: browser.rows() == everything)
    assert browser.state() == {}
    Select(browser.find("#filter-standing")).select_by_visible_text("verified")
    assert [row[0] for row in browser.rows()][1:] == ["alpha"]
    assert browser.complaints() == []


def test_the_view_chooses_the_columns(planted: Planted, browser: Browser) -> None:
    browser.open(planted.site)

    def shown() -> set[str]:
        return set(
            browser.run("return [...document.querySelectorAll('#leaderboard thead th')].map(h => h.dataset.name)")
        )

    for view, has, lacks in (
        ("generic", "generic.few", "personal"),
        ("personal", "personal.worst_decile", "generic"),
        ("unseen", "unseen", "personal"),
        ("cost", "train_flops", "unseen"),
    ):
        browser.find(f'input[name=view][value="{view}"]').click()
        assert has in shown() and lacks not in shown(), view
        assert browser.state() == {"view": view}
    browser.find('input[name=view][value="everything"]').click()
    assert {"generic.few", "personal.worst_decile", "unseen", "train_flops"} <= shown()


def test_a_deep_link_opens_what_it_says(planted: Planted, browser: Browser) -> None:
    link = "#dataset=digits&view=generic&order=generic.few.asc&find=a"
    browser.open(planted.site, f"index.html{link}")
    assert browser.find("#filter-dataset").get_attribute("value") == "digits"
    assert browser.find("#find").get_attribute("value") == "a"
    assert browser.head("generic.few").get_attribute("aria-sort") == "ascending"
    groups = browser.column("generic.few")
    assert groups == [absent_last(group, False) for group in groups] and max(map(len, groups)) >= 3
    assert browser.state() == dict(parse_qsl(link[1:]))
    browser.run("location.hash = 'dataset=faces'")
    browser.until(lambda: [row[0] for row in browser.rows()][1:] == ["alpha", "beta"])
    browser.open(planted.site, "index.html#dataset=nonsense&view=nonsense&order=nonsense.desc&other=1")
    assert browser.run("return document.getElementById('filter-dataset').selectedIndex") == 0
    assert len(browser.rows()) > 7
    assert browser.complaints() == []


def test_a_run_opens_from_the_leaderboard_and_draws_its_pictures(planted: Planted, browser: Browser) -> None:
    browser.open(planted.site, "index.html#dataset=digits&find=beta")
    browser.find('#leaderboard a[aria-label="beta, seed 2"]').click()
    browser.until(lambda: planted.ids["beta 2"] in browser.driver.current_url)
    browser.settle()
    assert "beta" in browser.find("h1").text and "seed 2" in browser.find("h1").text
    assert browser.run("return document.querySelectorAll('.chart svg').length") == 7
    marks = browser.run("return document.querySelectorAll('#clients .mark-symbol path').length")
    assert marks >= 2 * 11
    raw = browser.find('a[href$="predictions.parquet"]').get_attribute("href")
    assert Path(unquote(urlsplit(raw).path)).read_bytes()[:4] == b"PAR1"
    browser.driver.back()
    browser.until(lambda: browser.state() == {"dataset": "digits", "find": "beta"})
    browser.settle()
    assert [row[0] for row in browser.rows()][1:] == ["beta"]


def test_the_page_of_a_run_loads_what_it_shows_and_nothing_else(planted: Planted, browser: Browser) -> None:
    run = planted.ids["alpha 0"]
    browser.open(planted.site, f"run.html?{run}#clients")
    names = {url.rpartition("/")[2] for url in browser.requests() if "/runs/" in url}
    assert names == {f"{run[:2]}.js"}
    assert browser.driver.title == "alpha, seed 0 · bench"
    assert browser.run("return document.querySelector('#run').ariaBusy") is None
    assert browser.run("return document.querySelector('#clients').getBoundingClientRect().top") < 900
    for unknown in ("0123456789ab", "../../etc/passwd", "<img src=x>", ""):
        browser.open(planted.site, f"run.html?{unknown}")
        assert browser.find("h1").text == "No such run", unknown


def test_the_seeds_of_many_runs_are_folded_away(tmp_path: Path, browser: Browser) -> None:
    for seed in range(14):
        plant(tmp_path / "out", "alpha", seed, evaluations=1)
    site = made(tmp_path / "out", tmp_path / "site")
    browser.open(site)
    assert browser.rows()[1][2] == "14"
    browser.find("#leaderboard summary").click()
    browser.find('#leaderboard a[aria-label="alpha, seed 13"]').click()
    browser.until(lambda: "run.html?" in browser.driver.current_url)
    browser.settle()
    assert "seed 13" in browser.find("h1").text
    assert browser.complaints() == []


def test_pages_log_nothing_and_ask_nobody(planted: Planted, browser: Browser) -> None:
    for address in kinds(planted):
        browser.open(planted.site, address)
        assert browser.complaints() == [], address
        asked = [url for url in browser.requests() if not url.startswith(("data:", "about:"))]
        assert len(asked) >= 3
        home = planted.site.resolve().as_uri()
        assert all(url.startswith(home) for url in asked), asked
        assert browser.run("return window.wild") is None


def test_the_network_is_forbidden_to_pages_themselves(planted: Planted, browser: Browser) -> None:
    browser.open(planted.site)
    script = (
        "const done = arguments[arguments.length - 1];"
        "fetch('http://127.0.0.1:9/').then(() => done('sent'), error => done(String(error)))"
    )
    assert browser.driver.execute_async_script(script) != "sent"
    assert "Content Security Policy" in " ".join(browser.complaints())


def test_the_keyboard_alone_filters_sorts_and_opens_a_run(planted: Planted, browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    def focused() -> str:
        script = "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.innerText"
        return str(browser.run(script))

    def tab_to(wanted: str, most: int = 60) -> None:
        for _ in range(most):
            browser.press(Keys.TAB)
            if wanted in focused():
                outline = str(browser.run("return getComputedStyle(document.activeElement).outlineStyle"))
                assert outline != "none", f"the focus on {wanted} is not seen"
                return
        raise AssertionError(f"{wanted} is never reached")

    browser.open(planted.site)
    browser.press(Keys.TAB)
    assert focused() == "Skip to content"
    browser.press(Keys.ENTER)
    assert focused() == "content"
    tab_to("find")
    browser.press("alpha")
    tab_to("filter-dataset")
    browser.press("d")
    assert [row[0] for row in browser.rows()][1:] == ["alpha"]
    browser.find("#find").clear()
    browser.press(Keys.SPACE, Keys.BACKSPACE)
    tab_to("personal")
    browser.press(Keys.ENTER)
    browser.until(lambda: browser.head("personal").get_attribute("aria-sort") in ("ascending", "descending"), 10)
    tab_to("beta, seed 0")
    browser.press(Keys.ENTER)
    browser.until(lambda: planted.ids["beta 0"] in browser.driver.current_url)
    browser.settle()
    tab_to("The numbers as a table")
    browser.press(Keys.ENTER)
    assert browser.run("return document.activeElement.parentElement.open")


@pytest.mark.parametrize("width", [390, 320])
def test_a_narrow_page_never_scrolls_sideways_and_its_table_does(
    planted: Planted, browser: Browser, width: int
) -> None:
    browser.look(width)
    for address in kinds(planted):
        browser.open(planted.site, address)
        browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
        wide, seen = browser.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen == width, address
    browser.open(planted.site)
    box = "const box = document.querySelector('.scroll.leaderboard');"
    assert browser.run(f"{box} return box.scrollWidth > box.clientWidth")
    left = f"{box} box.scrollLeft = 300; return box.querySelector('tbody th[scope=row]').getBoundingClientRect().left"
    assert 0 <= browser.run(left) < 40  # the algorithm's name stays in sight


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)], ids=["wide", "narrow", "dark"])
def test_axe_finds_nothing_that_a_screen_reader_would_miss(
    planted: Planted, browser: Browser, width: int, dark: bool
) -> None:
    axe = (resources("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    browser.look(width, dark)
    for address in [*kinds(planted)[:3], *kinds(planted)[-5:-2]]:
        browser.open(planted.site, address)
        browser.run(axe)
        found = browser.driver.execute_async_script(
            "axe.run(document, {resultTypes: ['violations']}).then(arguments[arguments.length - 1])"
        )
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]] == [], address


def test_the_dark_scheme_is_dark_in_pictures_too(planted: Planted, browser: Browser) -> None:
    def colours() -> tuple[str, str]:
        return tuple(
            browser.run(
                "const style = e => getComputedStyle(e);"
                "return [style(document.body).backgroundColor,"
                " style(document.querySelector('.chart .mark-symbol path')).fill]"
            )
        )

    browser.open(planted.site, f"run.html?{planted.ids['alpha 0']}")
    light = colours()
    browser.look(dark=True)
    dark = colours()
    assert sum(map(int, re.findall(r"\d+", light[0])[:3])) > 700 > 100 > sum(map(int, re.findall(r"\d+", dark[0])[:3]))
    assert light[1] != dark[1]


def test_without_javascript_all_rows_and_columns_are_there(planted: Planted, browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.get((planted.site / "index.html").resolve().as_uri())
        text = browser.find("#leaderboard").text
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    for word in ("faces, imbalance natural", "gamma", "worst decile", "adaptation TFLOP", "self-reported"):
        assert word in text
    assert not browser.find("#filters").is_displayed()
    assert text.count("alpha") >= 2
