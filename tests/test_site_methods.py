"""The methods' family tree, the search by paper, and how a method was reproduced."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.plugins import declared
from bench.plugins.registry import ALGORITHMS
from bench.results import records
from bench.site import family_tree
from bench.site.build import build
from bench.site.methods import described
from tests.test_site import Browser, pages, plant, squeezed
from tests.test_site import browser as browser
from tests.test_site import chromium as chromium


def site_of(out: Path, *labels: str) -> Path:
    for label in labels:
        plant(out, label, label=label, evaluations=1)
    found, _ = records.read_all(out)
    build(found, out.parent / "site", reproductions=records.reproductions(out))
    return out.parent / "site"


def test_methods_stand_by_family_and_year_with_what_they_build_on(tmp_path: Path) -> None:
    site = site_of(tmp_path / "out", "fedavg", "clip2fl", "creff", "fedasam", "gpfl", "local", "fedloge+topk", "zzz9")
    known = pages(site)
    page = known["methods/index.html"]
    source = page.source
    order = ["family-references", "local.html", "family-generic", "fedavg.html", "fedasam.html", "family-pfl"]
    order += ["gpfl.html", "family-fedlt", "creff.html", "clip2fl.html", "fedloge.html"]
    places = [source.index(word) for word in order]
    assert places == sorted(places)
    text = squeezed(page.text)
    assert squeezed("no paper of its own local") in text and "topk" not in text and "zzz9" not in text
    for told in ("Builds on CReFF.", "Builds on FedSAM.", "To be compared with fedper.", "IJCAI 2022"):
        assert squeezed(told) in text, told
    assert page.links.count("../methods/creff.html") == 2  # its own line, and that of what builds on it
    assert not any("fedsam.html" in link or "fedper.html" in link for link in page.links), "they have no rows"
    assert "methods/index.html" in known["index.html"].links


def test_what_a_method_declares_or_begins_with_is_what_is_told() -> None:
    known = described(["fedavg_prior", "fedloge", "fedbn", "fedavg"])
    leaves = {name: family_tree._leaf(known[name], known, {"FedAvg": "fedavg", "Fed": "fed"}) for name in known}
    assert [title for title, _ in leaves["fedbn"].extends] == ["FedAvg"] and leaves["fedbn"].extends[0][1] is not None
    assert leaves["fedavg"].extends == ()
    own = [row for row in declared.controls("fedloge") if row.startswith("fedavg+")]
    assert [row for row, _ in leaves["fedloge"].answers] == own


def test_the_year_is_the_papers_and_nobodys_without_one() -> None:
    years = {name: family_tree.year_of(method.paper) for name, method in described(ALGORITHMS).items()}
    assert [name for name, year in years.items() if not year] == ["centralised", "fedavg_ft", "fedavg_prior", "local"]
    assert (years["fedavg"], years["gbme"], years["fedper"]) == ("2017", "2023", "2019")


def test_rows_are_found_by_title_and_author_of_the_paper(tmp_path: Path, browser: Browser) -> None:
    site = site_of(tmp_path / "out", "fedavg", "fedrep", "mine")
    for words in ("shokri", "Shared Representations", "collins"):
        browser.open(site, f"index.html#find={words}")
        wanted = [] if words == "shokri" else ["fedrep"]
        assert [row[0] for row in browser.rows() if len(row) > 1] == wanted, words
    browser.open(site, "index.html#find=min")
    assert [row[0] for row in browser.rows() if len(row) > 1] == ["mine"]


REPRODUCED = "# What came out\n\nTable 2 of the paper, *by its own code*. <script>window.wild=1</script>\n"


def test_a_reproduction_stands_below_the_ledger_of_its_method(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "reproductions"
    folder.mkdir(parents=True)
    (folder / "fedrep.md").write_text(REPRODUCED)
    (folder / "creff.md").write_text("Not here.")
    known = pages(site_of(tmp_path / "out", "fedavg", "fedrep"))
    page = known["methods/fedrep.html"]
    assert '<h2 id="reproduction-title">Reproduction</h2>' in page.source
    assert "<h3>What came out</h3>" in page.source and "<em>by its own code</em>" in page.source
    assert "<script>window" not in page.source and "<script>window.wild=1</script>" in page.text
    assert (
        page.source.index("ledger-title") < page.source.index("reproduction-title") < page.source.index("table-title")
    )
    assert "Reproduction" not in known["methods/fedavg.html"].text
    assert not any("Not here." in each.text for each in known.values())


def test_a_link_is_no_reproduction(tmp_path: Path) -> None:
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "secret").write_text("somebody's")
    (tmp_path / "reproductions" / "fedrep.md").symlink_to(tmp_path / "secret")
    with pytest.raises(records.DamagedResult, match=r"fedrep\.md cannot be read"):
        records.reproductions(tmp_path)
    assert records.reproductions(tmp_path / "nowhere") == {}
