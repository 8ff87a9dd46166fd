"""Links, pipes, devices and files that nobody asked for in a folder that is handed in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try, copied
from tests.attack.published import validated
from tests.attack.verdict import bench, calm, refused, require
from tests.test_validation import folder
from tests.trees import odd

AREA = "links, pipes and odd files in a submitted folder"
SECRET = "root:x:0:0"


def notes_that_are_a_link(out: Path) -> str:
    (out / "NOTES.md").unlink(missing_ok=True)
    (out / "NOTES.md").symlink_to("/etc/passwd")
    return "NOTES.md"


def a_run_that_is_a_link(out: Path) -> str:
    here = folder(out)
    there = Path(shutil.move(here, "elsewhere")).resolve()
    here.symlink_to(there)
    return here.name


def a_table_that_is_a_link(out: Path) -> str:
    here = folder(out) / "counts.parquet"
    shutil.move(here, "elsewhere.parquet")
    here.symlink_to(Path("elsewhere.parquet").resolve())
    return here.name


def a_document_that_is_a_link(out: Path) -> str:
    here = folder(out) / "run.json"
    shutil.move(here, "elsewhere.json")
    here.symlink_to(Path("elsewhere.json").resolve())
    return here.name


def _odd(place: str, kind: str, out: Path) -> str:
    here = folder(out) / place if place in ("run.json", "counts.parquet") else out / place
    here.unlink(missing_ok=True)
    odd(here, kind)
    return here.name


def a_page_among_presets(out: Path) -> str:
    (out / "presets").mkdir()
    (out / "presets" / "mine.html").write_text("<script>alert(1)</script>")
    return "presets"


def a_link_among_presets(out: Path) -> str:
    (out / "presets").mkdir()
    (out / "presets" / "mine.toml").symlink_to("/etc/passwd")
    return "presets"


def a_program_among_tunings(out: Path) -> str:
    (out / "tuning").mkdir()
    (out / "tuning" / "mine.bin").write_bytes(b"\x7fELF" + bytes(100))
    return "tuning"


def a_link_among_studies(out: Path) -> str:
    (out / "studies").mkdir()
    (out / "studies" / "mine.md").symlink_to("/etc/passwd")
    return "studies"


def attributes_that_hide(out: Path) -> str:
    (out / ".gitattributes").write_text("*.json -diff linguist-generated\n* binary\n")
    return ".gitattributes"


def a_folder_that_is_a_loop(out: Path) -> str:
    (out / "0123456789ab").symlink_to(out)
    return "0123456789ab"


def _named(change: Callable[[Path], str]) -> None:
    out = copied("published")
    name = change(out)
    refused(validated(out), name, status=(1,))
    for words in (("table", "--out", out, "--write"), ("site", "--out", out, "--to", "site")):
        calm(bench(*words))
    for file in [out / "README.md", *Path("site").rglob("*")]:
        if file.is_file() and not file.is_symlink():
            require(SECRET not in file.read_bytes().decode("utf-8", "replace"), f"{file.name} tells of /etc/passwd")
    for verb in ("table", "status", "compare"):
        calm(bench(verb, "--out", out))


for change in (
    notes_that_are_a_link,
    a_run_that_is_a_link,
    a_table_that_is_a_link,
    a_document_that_is_a_link,
    a_page_among_presets,
    a_link_among_presets,
    a_program_among_tunings,
    a_link_among_studies,
    attributes_that_hide,
    a_folder_that_is_a_loop,
):
    TRIES.append(
        Try(area=AREA, name=change.__name__.replace("_", " "), act=partial(_named, change), needs=("published",))
    )
for place in ("run.json", "counts.parquet", "NOTES.md", "verified.json"):
    for kind in ("pipe", "device", "socket"):
        change = partial(_odd, place, kind)
        TRIES.append(
            Try(area=AREA, name=f"{place} is a {kind}", act=partial(_named, change), needs=("published",), seconds=30)
        )
