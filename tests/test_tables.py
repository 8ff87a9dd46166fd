"""What a reader of tables must know: what differs, what is old, what is equal; and where results are looked for."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.command import stored
from bench.command.main import main
from bench.results import records, table
from bench.results.claims import claim
from bench.results.comparison import compare
from bench.results.discarding import discard
from bench.results.entrants import entrants
from bench.results.footnotes import footnotes
from bench.results.layout import remarks, title
from bench.results.leaderboard import Leaderboard, leaderboards
from bench.results.versions import stale, version
from bench.site.rows import page_of
from tests.test_results import document, record, store

SOURCES = ("ab" * 32, "cd" * 32, "ef" * 32)
TIMES = ("2026-02-03T04:05:06+00:00", "2026-02-03T04:06:07+00:00", "2026-02-04T00:00:00+00:00")


def edited(edit: int, algorithm: str = "mine", seed: int = 0, fields: dict[str, Any] | None = None, **more: Any) -> Any:
    """What a run with an own plug-in says after so many edits of the file; an edit may add a field."""
    content = document(algorithm, fields, seed, **{"finished": TIMES[edit], **more})
    content["identity"]["algorithm"]["source"] = SOURCES[edit]
    return {**content, "label": algorithm}


def bench(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="bench")


def read(out: Path) -> list[records.Record]:
    found, damaged = records.read_all(out)
    assert not damaged
    return found


# Titles -----------------------------------------------------------------------------------------------------

BASE = "digits, imbalance 10, alpha 0.5, setting quick"


@pytest.mark.parametrize(
    ("changes", "endings"),
    [
        ([{}, {"setting": {"rounds": 3}}], {"rounds = 40", "rounds = 3"}),
        ([{}, {"engine": "stacked"}, {"engine": "stacked", "precision": "bf16", "device": "cuda"}],
         {"engine = serial, precision = fp32, device = cpu", "engine = stacked, precision = fp32, device = cpu",
          "engine = stacked, precision = bf16, device = cuda"}),
        ([{}, {"setting": {"clip": 1.0}}], {"clip = –", "clip = 1.0"}),
        ([{}, {"setting": {"alpha": 0.5000000001}}], {"alpha = 0.5", "alpha = 0.5000000001"}),
        ([{"setting": {"imbalance": None}}, {"setting": {"rounds": 3}}], {""}),
        ([{}, {"protocol": "0123456789ab"}], {"protocol = 0123456789ab", f"protocol = {document()['protocol']}"}),
    ],
)  # fmt: skip
def test_a_title_says_what_differs_and_nothing_else(changes: list[dict[str, Any]], endings: set[str]) -> None:
    boards = leaderboards([record("fedavg", **change) for change in changes])
    titles = [title(board) for board in boards]
    assert len(set(titles)) == len(boards) == len(changes)
    assert {each.removeprefix(board.base).removeprefix(", ") for each, board in zip(titles, boards, strict=True)} == (
        endings
    )
    for form in ("md", "html", "latex", "json"):
        text = table.render(boards, form).replace("\\_", "_").replace("\\u2013", "–").replace("= --", "= –")
        assert all(each in text for each in titles)


def test_titles_are_those_of_the_table_wherever_boards_are_named(tmp_path: Path) -> None:
    for rounds in (2, 3):
        for name, seed in itertools.product(("fedavg", "local"), range(2)):
            content = document(name, seed=seed, setting={"rounds": rounds}, values={"personal": seed / 9})
            store(tmp_path / "o", content)
    titles = [f"{BASE}, rounds = {rounds}" for rounds in (2, 3)]
    boards = leaderboards(read(tmp_path / "o"))
    assert list(map(title, boards)) == titles == [part.title for part in compare(boards, "personal").parts]
    for words in (("table", tmp_path / "o"), ("compare", tmp_path / "o")):
        assert all(each in bench(*words).output for each in titles)
    shown = [page_of(board, 0) for board in boards]
    assert [page.title for page in shown] == titles
    alone = leaderboards([each for each in read(tmp_path / "o") if each.setting["rounds"] == 2])
    assert title(alone[0]) == BASE
    assert page_of(alone[0], 0).page == shown[0].page, "a page keeps its address"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("features(path='cifar100-tf_efficientnet_lite0-96eb4235')", "cifar100 features of tf_efficientnet_lite0"),
        ("features(path='/data/prepared/inat-resnet50.a1-0123abcd')", "inat features of resnet50.a1"),
        ("features(path='mine')", "features(path='mine')"),
        ("folder(path='cats-dogs-0123abcd')", "folder(path='cats-dogs-0123abcd')"),
    ],
)
def test_embedded_images_are_called_by_what_they_are_of(call: str, words: str) -> None:
    (board,) = leaderboards([record("fedavg", dataset=call)])
    assert board.base == f"{words}, imbalance 10, alpha 0.5, setting quick" and board.dataset == call


def test_one_of_several_datasets_of_a_name_is_chosen_as_it_is_typed(tmp_path: Path) -> None:
    calls = [f"features(path='{path}')" for path in ("cats, dogs", "birds")]
    for number, call in enumerate([*calls, "digits"]):
        store(tmp_path, document("fedavg", seed=number, dataset=call, protocol=f"{number:012x}"))
    for asked, expected in (("features", calls), (calls[0], calls[:1]), (f"{calls[1]},Digits", [calls[1], "digits"])):
        found = json.loads(bench("table", tmp_path, "--dataset", asked, "--format", "json").stdout)
        assert sorted(each["dataset"] for each in found["leaderboards"]) == sorted(expected)


def test_an_edited_dataset_is_told_from_the_one_before() -> None:
    found = []
    for edit, name in enumerate(("old", "new")):
        content = document(name, protocol=f"{edit:012x}", finished=TIMES[edit])
        content["identity"]["dataset"] |= {"version": 1 + edit}
        found.append(made(content))
    assert [title(board) for board in leaderboards(found)] == [f"{BASE}, dataset version = {k}" for k in (1, 2)]


def made(content: dict[str, Any]) -> records.Record:
    """A record that never saw a disk."""
    from bench.protocol.identity import identify
    from bench.results.record import FORMAT, check

    digests = dict.fromkeys(("rounds", "counts", "predictions"), "0")
    known = {"id": identify(content["identity"]), "format": FORMAT, "tables": digests}
    return check(Path(), {**content, **known, "status": "failed" if "reason" in content else "done"})


# Versions ---------------------------------------------------------------------------------------------------


def test_the_newest_version_stands_alone_and_the_others_are_counted() -> None:
    found = [made(edited(edit, values={"personal.balanced": 0.9 - edit / 10})) for edit in (2, 0, 1)]
    (board,) = leaderboards([*found, record("fedavg")])
    (mine,) = [row for row in board.rows if row.algorithm == "mine"]
    assert (mine.label, mine.version, mine.hidden, mine.stale) == ("mine", "1/efefef", 2, False)
    assert mine.ids == (found[0].id,) and mine.finished == TIMES[2] and not footnotes(board)[1]
    said = "2 older versions of mine are not shown: see --all-versions, and `bench clean --stale`."
    assert said in remarks(board) and stale(found) == {found[1].id, found[2].id}
    (board,) = leaderboards([*found, record("fedavg")], all_versions=True)
    assert len(board.rows) == 4 and not any("not shown" in line for line in remarks(board))
    notes = [note.partition(": ")[2] for note in footnotes(board)[1]]
    assert notes == [
        "version 1/ababab of Mine(), run 2026-02-03 04:05 UTC; a newer version is in these results.",
        "version 1/cdcdcd of Mine(), run 2026-02-03 04:06 UTC; a newer version is in these results.",
        "version 1/efefef of Mine(), run 2026-02-04 00:00 UTC; the newest version in these results.",
    ]


def test_an_edit_may_add_a_field_and_a_part_and_a_dataset_may_be_edited_too() -> None:
    old, new = made(edited(0, fields={"mu": 1})), made(edited(1, fields={"mu": 1, "pull": 2}))
    assert stale([new, old]) == {old.id}
    contents = [document("fedavg", label="fedavg+own", finished=time) for time in TIMES[:2]]
    for content, source in zip(contents, SOURCES, strict=False):
        content["identity"]["algorithm"]["parts"] = [{"name": "own", "version": 1, "fields": {}, "source": source}]
    assert stale(map(made, contents)) == {made(contents[0]).id} and version(made(contents[0])) == "1+1/ababab"
    contents = [document("fedavg", finished=TIMES[k]) for k in (0, 1)]
    contents[1]["identity"]["dataset"] = {"name": "digits", "version": 2, "fields": {}}
    assert stale(map(made, contents)) == {made(contents[0]).id}
    contents = [document("fedavg", dataset="leaves", protocol=f"{k:012x}", finished=TIMES[k]) for k in (0, 1)]
    for k, content in enumerate(contents):
        content["identity"]["dataset"] = {"name": "leaves", "version": 1, "fields": {"x": k}, "source": SOURCES[k]}
    (board,) = leaderboards(map(made, contents))
    assert board.protocol == "000000000001" and board.rows[0].hidden == 1


@pytest.mark.parametrize(
    "change",
    [{"setting": {"rounds": 3}}, {"engine": "stacked"}, {"seed": 1}, {"label": "mine(mu=2)"}, {"algorithm": "yours"}],
)
def test_what_was_asked_for_otherwise_is_no_older_version(change: dict[str, Any]) -> None:
    edit = 0 if "seed" in change else 1
    other = made(
        {
            **edited(edit, **{key: value for key, value in change.items() if key != "label"}),
            **{key: value for key, value in change.items() if key == "label"},
        }
    )
    assert stale([made(edited(0)), other]) == set()


def test_the_newest_is_the_one_that_ended_last_and_of_two_at_once_the_higher_version() -> None:
    back, seeds = made(edited(0, finished=TIMES[2])), [made(edited(1, seed=seed)) for seed in range(3)]
    assert stale([back, *seeds]) == {each.id for each in seeds}, "one went back to the first file"
    around = [made(edited(0, seed=seed, finished=TIMES[2 * seed])) for seed in range(2)]
    between = [made(edited(1, seed=seed, finished=TIMES[1])) for seed in range(2)]
    assert stale([*around, *between]) == {each.id for each in between}
    ninth, tenth = (record("fedavg", version=number) for number in (9, 10))
    assert stale([tenth, ninth]) == {ninth.id}
    assert stale([made(edited(0)), made(edited(1, reason="broken"))]) == {made(edited(0)).id}, "it is broken now"


def test_versions_of_one_file_are_no_common_algorithm_over_datasets() -> None:
    found = [made(edited(edit, setting={"imbalance": 10.0 * (edit + 1)})) for edit in range(2)]
    assert set(entrants(leaderboards(found))) == {"mine version 1/ababab", "mine version 1/cdcdcd"}


def three_edits(out: Path) -> list[str]:
    """Store a plug-in's runs after each edit, and another algorithm's; ids of the plug-in's, the oldest first."""
    for seed in range(2):
        store(out, document("fedavg", seed=seed, values={"personal": 0.1 * seed}))
    return [store(out, edited(edit)).name for edit in range(3)]


def test_older_versions_are_left_out_by_every_command_unless_asked_for(tmp_path: Path) -> None:
    ids = three_edits(tmp_path / "v")
    assert "mine #" not in bench("table", tmp_path / "v").output
    assert bench("table", tmp_path / "v", "--all-versions", "--format", "md").output.count("`mine #") == 3
    assert "mine version" not in bench("compare", tmp_path / "v", "--metric", "personal").output
    both = bench("compare", tmp_path / "v", "--metric", "personal", "--all-versions").output
    assert "mine version 1/ababab" in both and "mine version 1/efefef" in both
    for options, shown in (((), ids[2:]), (("--all-versions",), ids)):
        assert bench("site", tmp_path / "v", "--to", tmp_path / "site", *options).exit_code == 0
        assert {each.id for each in records.read_all(tmp_path / "site" / "data")[0]} & {*ids} == {*shown}
        scripts = "".join(file.read_text() for file in (tmp_path / "site" / "runs").iterdir())
        assert [run for run in ids if f'"{run}"' in scripts] == shown
    refused = bench("table", tmp_path / "v", "--all-versions", "--write")
    assert refused.exit_code == 2 and "newest versions alone" in refused.output


# Cleaning ---------------------------------------------------------------------------------------------------


def test_clean_says_what_would_go_and_removes_what_it_was_told_to(tmp_path: Path) -> None:
    out = tmp_path / "v"
    first, second, _ = three_edits(out)
    content = document("local", reason="diverged\nat last", finished=TIMES[1])
    failed = records.fail(out, made(content).id, content, "diverged\nat last").name
    (out / "0123456789ab").mkdir()
    everything = {path.name for path in out.iterdir()}
    said = bench("clean", out).output
    assert "--stale: 2 runs of 6, 0.0" in said and "--failed: 1 run of 6" in said and "nothing is removed" in said
    tried = bench("clean", "--out", out, "--stale", "--failed", "--dry-run")
    said = tried.output
    assert tried.exit_code == 0
    assert f"stale  {first}  mine version 1/ababab on digits, seed 0, 2026-02-03 04:05 UTC\n" in said
    assert f"failed  {failed}  local version 1 on digits, seed 0, 2026-02-03 04:06 UTC: diverged at last\n" in said
    assert "3 runs of 6 in" in said and {path.name for path in out.iterdir()} == everything
    refused = bench("clean", out, "--stale")
    assert refused.exit_code == 2 and "use --yes" in refused.output
    assert {path.name for path in out.iterdir()} == everything
    assert "removed 2" in bench("clean", out, "--stale", "--yes").output
    assert {path.name for path in out.iterdir()} == everything - {first, second}
    assert bench("clean", out, "--failed", "--yes").exit_code == 0
    assert {path.name for path in out.iterdir()} == everything - {first, second, failed}
    assert "0 runs of 3" in bench("clean", out, "--stale", "--failed", "--yes").output


def test_a_question_is_asked_and_no_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_edits(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("bench.command.clean.answers", lambda: True)
    for answer in ("n\n", "\n"):
        asked = CliRunner().invoke(main, ["clean", str(tmp_path), "--stale"], prog_name="bench", input=answer)
        assert asked.exit_code == 130 and "remove them?" in asked.output
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert CliRunner().invoke(main, ["clean", str(tmp_path), "--stale"], prog_name="bench", input="y\n").exit_code == 0
    assert len(list(tmp_path.iterdir())) == len(before) - 2


def test_a_run_that_a_process_does_or_has_done_meanwhile_stays(tmp_path: Path) -> None:
    first, second, third = three_edits(tmp_path)
    found = {each.id: each for each in read(tmp_path)}
    with claim(tmp_path / first):
        assert discard([found[first]]) == [first] and (tmp_path / first / "run.json").is_file()
    store(tmp_path, {**edited(1), "finished": TIMES[2]}, replace=True)
    assert discard([found[second]]) == [second] and len(read(tmp_path)) == 5
    assert discard([found[third], found[third]]) == [] and not (tmp_path / third).exists()


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_finished_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = three_edits(tmp_path)
    found = {each.id: each for each in read(tmp_path)}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard([found[first]])
    assert records.status(tmp_path, first) == "partial" and len(read(tmp_path)) == 4


# Remarks ----------------------------------------------------------------------------------------------------


def told(board: Leaderboard, word: str) -> list[str]:
    return [line for line in remarks(board) if word in line]


def test_rows_that_agree_in_every_digit_are_named() -> None:
    values = [{"personal": 0.5 + seed / 7, "personal.balanced": 0.4} for seed in range(3)]
    found = [record(name, seed=seed, values=values[seed]) for name in ("a", "b", "c") for seed in range(3)]
    found += [record("d", seed=0, values=values[0]), record("d", seed=1, values={**values[1], "personal": 0.6})]
    found += [record("e", seed=5, values=values[0])]
    (board,) = leaderboards(found)
    said = "a, b and c gave the same answers in every run: every digit of their accuracies is equal, so that what sets "
    assert told(board, "same answers") == [f"{said}them apart had no effect here."]
    known = {("a", 0): 0, ("a", 1): 0, ("z", 0): 0, ("z", 1): 1}
    chain = [record(name, seed=seed, values=values[place]) for (name, seed), place in known.items()]
    (board,) = leaderboards([*chain, record("m", seed=0, values=values[0])])
    assert [line.partition(" gave")[0] for line in told(board, "same answers")] == ["a and m"], "m has one of two runs"
    close = [record("a", values={"personal": 0.5}), record("b", values={"personal": 0.5 + 1e-12})]
    assert not told(leaderboards(close)[0], "same answers")
    elsewhere = [record("a"), record("b", fingerprint="another split")]
    assert not told(leaderboards(elsewhere)[0], "same answers"), "they have no common run"
    own = [record("a"), record("b", values={"personal:0 epochs": 0.3})]
    assert told(leaderboards(own)[0], "same answers"), "a variant that one alone has says nothing"
    nothing = dict.fromkeys(record("a").metrics)
    assert not told(leaderboards([record("a", values=nothing), record("b", values=nothing)])[0], "same answers")
    failed = [record("a", reason="broken", metrics={}), record("b", reason="broken", metrics={})]
    assert not told(leaderboards(failed)[0], "same answers")


def test_several_versions_of_a_library_are_named_in_their_order() -> None:
    known = [{"torch": "2.15.0", "numpy": "2.4.6"}, {"torch": "2.9.1", "numpy": "2.4.6"}, {"torch": "2.15.0"}]
    found = [record(name, versions=versions) for name, versions in zip("abc", known, strict=True)]
    assert told(leaderboards(found)[0], "several versions") == [
        "Made with several versions, which may differ in more than their names: torch 2.9.1 and 2.15.0."
    ]
    assert not told(leaderboards([found[0], found[2], record("d")])[0], "several versions")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([{"clients": 60}], "40 of 60 clients have no test images and are in no mean of personal models."),
        ([{"clients": 21}], "1 of 21 clients has no test images and is in no mean of personal models."),
        ([{"clients": 20}], None),
        ([{}], None),
        ([{"clients": 24, "setting": {"unseen": 4}}], None),
        ([{"clients": 20, "setting": {"eval_clients": 25}}], None),
        ([{"clients": 60, "setting": {"eval_clients": 25}}],
         "5 of 25 clients that were drawn for testing have no test images and are in no mean of personal models."),
        ([{"clients": 60}, {"clients": 60, "seed": 1, "tested": {"clients": 22}}],
         "38 to 40 of 60 clients have no test images and are in no mean of personal models."),
        ([{"clients": 60, "tested": {"clients": 0, "images": None}}],
         "60 of 60 clients have no test images and are in no mean of personal models."),
        ([{"clients": 60, "reason": "broken"}], None),
    ],
)  # fmt: skip
def test_clients_without_test_images_are_counted(changes: list[dict[str, Any]], says: str | None) -> None:
    (board,) = leaderboards([record("fedavg", **change) for change in changes])
    assert told(board, "no test images") == ([] if says is None else [says])


# Spreadsheets and notebooks ---------------------------------------------------------------------------------


def lines_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_is_the_table_with_the_fields_of_the_protocol() -> None:
    found = [record("fedavg", seed=seed, values={"personal": seed / 4}) for seed in range(3)]
    found += [record("local", reason="broken", metrics={}, cost={})]
    found += [record("fedavg", setting={"rounds": 3, "clip": 1.0}, clients=30)]
    boards = leaderboards(found)
    lines = lines_of(table.render(boards, "csv"))
    assert len(lines) == 3
    (mean,) = [line for line in lines if line["algorithm"] == "fedavg" and line["rounds"] == "40"]
    keys = ("dataset", "imbalance", "alpha", "setting", "clients", "partition", "clip", "lr")
    assert [mean[key] for key in keys] == ["digits", "10.0", "0.5", "quick", "20", "dirichlet", "", "0.05"]
    assert [mean[f"personal{end}"] for end in ("", " low", " high")] == ["0.25", "0.0", "0.5"]
    assert (mean["seeds"], mean["failed"], mean["interval"], mean["bytes"]) == ("3", "0", "range", "5000000.0")
    assert mean["balanced"] and mean["worst decile"] and "unseen" not in mean
    (broken,) = [line for line in lines if line["algorithm"] == "local"]
    assert (broken["seeds"], broken["failed"], broken["personal"], broken["bytes"]) == ("0", "1", "", "")
    (other,) = [line for line in lines if line["rounds"] == "3"]
    assert (other["clip"], other["clients"], other["interval"], other["personal low"]) == ("1.0", "30", "", "")
    assert "clip" not in lines_of(table.render(boards[:1], "csv"))[0]


def test_csv_per_seed_has_a_line_a_run_with_its_exact_values() -> None:
    found = [record("fedavg", seed=seed, values={"personal": seed / 7}) for seed in (2, 0)]
    found += [record("fedavg", seed=1, reason="broken", metrics={}, cost={})]
    lines = lines_of(table.render(leaderboards(found), "csv", per_seed=True))
    assert [(line["seed"], line["personal"]) for line in lines] == [("0", "0.0"), ("1", ""), ("2", repr(2 / 7))]
    assert [line["run"] for line in lines] == [found[1].id, "", found[0].id]
    assert [line["split"] for line in lines] == [f"{0:016x}", "", f"{2:016x}"]
    assert [line["failure"] for line in lines] == ["", "broken", ""] and lines[0]["wall_seconds"] == "61.25"
    assert "personal low" not in lines[0] and "seeds" not in lines[0]
    with pytest.raises(ValueError, match="no line per seed"):
        table.render([], "md", per_seed=True)


def test_csv_of_the_last_ten_is_of_the_last_ten() -> None:
    found = [record("a", values={"personal": 0.1, "personal@last10": 0.2})]
    for per_seed in (False, True):
        (line,) = lines_of(table.render(leaderboards(found, "last10"), "csv", per_seed=per_seed))
        assert line["personal"] == "0.2"


def test_formats_are_chosen_on_the_command_line(tmp_path: Path) -> None:
    store(tmp_path, document("fedavg"))
    assert len(lines_of(bench("table", tmp_path, "--format", "csv", "--per-seed").output)) == 1
    assert len(lines_of(bench("table", tmp_path, "--format", "long").output)) > 20
    refused = bench("table", tmp_path, "--per-seed")
    assert refused.exit_code == 2 and "--format csv" in refused.output


def test_a_fragment_is_the_body_of_the_page_with_its_legend_folded() -> None:
    boards = leaderboards([record("fedavg"), record("local", setting={"rounds": 3})])
    piece = table.fragment(boards)
    assert piece in table.render(boards, "html") and not {"<html", "<head", "<body"} & set(piece.split(">"))
    assert piece.count("<table>") == 2 and piece.count("<details>") == 1 == piece.count("</details>")
    assert piece.index("<table>") < piece.index("<details>") < piece.index("signed-rank test (Wilcoxon) of runs")
    assert table.fragment([]) == "<p>There are no finished runs.</p>\n"


# Where results are ------------------------------------------------------------------------------------------

VERBS = ("table", "compare", "site", "status", "track", "validate", "submit", "clean")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_on_results_takes_dir_and_out(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.tracking.has_mlflow", lambda: False)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    given = ("./one",) if verb == "compare" else ("one",)
    answers = [bench(verb, *words) for words in (given, ("--out", "one"), (*given, "--out", tmp_path / "one"))]
    assert len({answer.output.replace(str(tmp_path / "one"), "one") for answer in answers}) == 1
    assert len({answer.exit_code for answer in answers}) == 1
    two = bench(verb, *given, "--out", "other")
    assert two.exit_code == 2 and "one and --out other are two folders of results; name one" in two.output
    missing = bench(verb, "--out", "nowhere")
    assert missing.exit_code == 2 and "nowhere: there is no such folder, 'bench run' makes one" in missing.output


def test_results_are_in_runs_and_published_ones_in_results_if_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stored.chosen(None, None) == stored.chosen(None, None, published=True) == Path("runs")
    os.mkdir("results")
    assert stored.chosen(None, None) == Path("runs") and stored.chosen(None, None, published=True) == Path("results")
    assert "results:" in bench("validate").output and "runs: there is no such folder" in bench("table").output
    assert "runs: there is no such folder" in bench("submit").output


def test_the_first_word_of_compare_is_a_folder_only_if_it_holds_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fedavg", "local"):
        for seed in range(2):
            store(Path("runs"), document(name, seed=seed, values={"personal": seed / 9}))
    os.mkdir("fedavg")
    assert bench("compare", "fedavg", "local", "--metric", "personal").exit_code == 0
    assert bench("compare", "runs", "fedavg", "local", "--metric", "personal").exit_code == 0
    compared = json.loads(bench("compare", "runs", "--metric", "personal", "--json").output)
    assert sorted(compared["labels"]) == ["fedavg", "local"]
