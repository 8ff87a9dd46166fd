"""`bench validate` and `bench submit`: results that others can trust, and how to hand in one's own."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.stored import require_folder, stored_in
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.validation.board import Board
    from bench.validation.report import Report

_OPTIONS = (
    click.option(
        "--data-root",
        type=click.Path(path_type=Path),
        help="Folder of datasets, to make splits anew; else $BENCH_DATA, else the user's cache.",
    ),
    click.option(
        "--plugin",
        "plugins",
        type=click.Path(path_type=Path),
        multiple=True,
        help="File with an algorithm, a part or a dataset of some runs; repeatable.",
    ),
)
_MOST = 200
"""Problems that are printed; --json has all of them."""


@click.command("validate")
@stored_in(published=True)
@_OPTIONS[0]
@_OPTIONS[1]
@click.option("--rerun", metavar="N|ID,...", help="Run so many runs again, drawn by chance, or these.")
@click.option("--rerun-seed", type=click.IntRange(min=0), help="Of the draw; by default a new one, which is said.")
@click.option("--time-limit", metavar="DURATION", default="24h", show_default=True, help="Of a run that is run again.")
@click.option("--recount", is_flag=True, help="Test the models that were handed in, and compare their right answers.")
@click.option("--write", is_flag=True, help="Note in DIR/verified.json what --rerun and --recount found.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes at once; by default what many runs are worth.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
def validate_command(
    out: Path,
    data_root: Path | None,
    plugins: tuple[Path, ...],
    rerun: str | None,
    rerun_seed: int | None,
    time_limit: str,
    recount: bool,
    write: bool,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Check whether the results in DIR hold together: exit status 0 if so, 1 if not.

    Every file is read, every metric computed again from the stored counts, every identity, split, table and cost
    compared with what it must be. What nobody can compute without training, --rerun does: the same bits make a run
    verified; where this machine rounds otherwise, it is run three times, and reproduced if every number lies within
    what these differ by. With --write, what cannot be run again here is noted too.

    \b
    bench validate
    bench validate results --data-root /data --rerun 1
    bench validate results --rerun 3f0a9c21b7de --write
    """
    import torch

    from bench.face.bar import Bar
    from bench.files import data_root as root_of
    from bench.plugins.registry import load_plugin
    from bench.sweep.schedule import parse_duration
    from bench.validation.board import Board
    from bench.validation.report import summary, validate

    torch.set_num_threads(1)
    require_folder(out)
    if write and rerun is None and not recount:
        raise click.UsageError("--write notes what --rerun and --recount find; say which runs are to be run again")
    seconds = parse_duration(time_limit, "--time-limit")
    for file in plugins:
        load_plugin(file)
    root = root_of(data_root).resolve()
    with Bar("runs") as bar:
        report = validate(out, root, plugins=plugins, jobs=jobs, progress=bar)
    if not as_json:
        _print(report)
    files = tuple(file.resolve() for file in plugins)
    board = Board(
        report=report,
        root=root,
        plugins=files,
        seconds=seconds,
        say=lambda sentence: click.echo(plain(sentence), err=True),
    )
    if recount:
        board.recount()
    seed = None if rerun is None else board.rerun(rerun, rerun_seed)
    if write:
        _note(board, out)
    if as_json:
        click.echo(json.dumps(_document(board, out, seed), indent=2))
    else:
        click.echo(summary(report, out))
    if report.problems or board.differing:
        otherwise = f", runs that came out otherwise: {board.differing}" * bool(board.differing)
        told = f"problems: {len(report.problems)}{otherwise}"
        click.echo(f"bench: {told}; {_remedy(report, board.differing)}", err=True)
        return 1
    if rerun is not None and not board.outcomes:
        click.echo("bench: no run could be run again, as no run's data and device are at hand here", err=True)
        return 3
    return 0


def _print(report: Report) -> None:
    for problem in report.problems[:_MOST]:
        click.echo(plain(problem))
    if len(report.problems) > _MOST:
        click.echo(f"... and {len(report.problems) - _MOST} more; --json has them all")
    for note in report.notes:
        click.echo(f"note: {plain(note)}", err=True)


def _remedy(report: Report, differing: int) -> str:
    """Say what to do about the problems that there are."""
    of_runs = [re.match("[0-9a-f]{12}(/|$)", problem.file) is not None for problem in report.problems]
    words = ["put back the files that the runs wrote, or run them again"] if any(of_runs) or differing else []
    if others := of_runs.count(False):
        words.append("do what its line says" if others == 1 else "do what their lines say")
    return ", and ".join(words)


def _note(board: Board, out: Path) -> None:
    from bench.results.standing import FILE

    try:
        noted = board.note(out)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"noted in {out / FILE}: {', '.join(noted) or 'nothing new'}", err=True)


def _document(board: Board, out: Path, seed: int | None) -> dict[str, Any]:
    from bench.results.records import stand

    report = board.report
    stood, _ = stand(out, report.runs)
    return {
        "runs": len(report.runs),
        "splits": report.splits,
        "problems": [{"file": each.file, "key": each.key, "what": each.what} for each in report.problems],
        "notes": list(report.notes),
        "rerun_seed": seed,
        "rerun": [
            {
                "id": outcome.record.id,
                "agrees": outcome.agrees,
                "exact": outcome.exact,
                "because": outcome.because,
                "differs": list(outcome.differs),
                "within": outcome.within,
                "runs": outcome.runs,
                "seconds": outcome.seconds,
            }
            for outcome in board.outcomes
        ],
        "recounted": board.recounted,
        "stopped": board.stopped,
        "standing": {record.id: record.stands for record in stood},
    }


@click.command("submit")
@stored_in()
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("submission.zip"),
    show_default=True,
    help="Zip file to write, or a folder.",
)
@_OPTIONS[0]
@_OPTIONS[1]
@click.option("--models", is_flag=True, help="Hand in the models of runs that kept them, for the board to test.")
def submit_command(out: Path, to: Path, data_root: Path | None, plugins: tuple[Path, ...], models: bool) -> int:
    """Pack the finished runs in DIR for a pull request, once they are valid.

    What the runs left and the files named by --plugin are packed, and nothing else: no checkpoint, no path and no name
    of this machine. With models, whoever keeps the board can count their right answers (bench validate --recount).

    \b
    bench submit runs
    bench submit runs --to ../checkout/results
    """
    import torch

    from bench.files import data_root as root_of
    from bench.plugins.registry import load_plugin
    from bench.results import packed, packing
    from bench.validation import submission
    from bench.validation.report import validate

    torch.set_num_threads(1)
    require_folder(out)
    for file in plugins:
        load_plugin(file)
    try:
        with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory() as place:
            for pack in packed.packs(out):
                packing.unpack(pack, Path(unpacked))
            folders, others = submission.finished(out)
            names = {folder.name for folder in folders}
            folders += [each for each in submission.finished(Path(unpacked))[0] if each.name not in names]
            if not folders:
                raise click.BadParameter(f"{out}: holds no finished run, 'bench run' makes them", param_hint="DIR")
            files = submission.gather(folders, models)
            submission.write(files, Path(place))  # what is handed in is what is validated
            runs = [folder.name for folder in folders]
            report = validate(Path(place), root_of(data_root).resolve(), [Path(place) / run for run in runs])
            contents = {} if report.problems else submission.as_pack(Path(place), runs, plugins)
        _print(report)
        for sentence in others:
            click.echo(f"left out: {plain(sentence)}", err=True)
        if report.problems:
            told = f"problems: {len(report.problems)}, so nothing was packed"
            click.echo(f"bench: {told}; run what is named above again with --force, or remove its folder", err=True)
            return 1
        submission.write(contents, to)
    except (submission.NotSubmittable, packing.NotPackable) as error:
        raise click.ClickException(str(error)) from error
    size = sum(len(content) for files in contents.values() for content in files.values())
    click.echo(f"packed {len(runs)} runs into {to} ({size / 1e6:.2f} MB); the split of {report.splits} was checked")
    if plugins:
        click.echo(f"packed with them, so that others can run them again: {', '.join(file.name for file in plugins)}")
    click.echo(
        f"next: {'unpack it' if to.suffix == '.zip' else 'put its content'} below results/ of a checkout, then\n"
        "  bench table --out results --write\n"
        "  bench validate results\n"
        "commit results/, and open a pull request that says which command made the runs"
    )
    return 0
