"""`bench validate` and `bench submit`: results that others can trust, and how to hand in one's own."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.stored import require_folder, stored_in

if TYPE_CHECKING:
    from bench.sweep.config import Run
    from bench.validation.report import Report
    from bench.validation.rerun import Rerun

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
@click.option("--rerun", metavar="N|ID,...", help="Run so many finished runs again, drawn by chance, or these.")
@click.option("--rerun-seed", type=click.IntRange(min=0), help="Of the draw; by default a new one, which is said.")
@click.option("--write", is_flag=True, help="Note the runs that came out the same in DIR/verified.json.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes at once; by default what many runs are worth.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
def validate_command(
    out: Path,
    data_root: Path | None,
    plugins: tuple[Path, ...],
    rerun: str | None,
    rerun_seed: int | None,
    write: bool,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Check whether the results in DIR hold together: exit status 0 if so, 1 if not.

    Every file is read, every metric computed again from the stored counts, every identity, split, table and cost
    compared with what it must be. What nobody can compute without training, --rerun does.

    \b
    bench validate
    bench validate results --data-root /data --rerun 1
    bench validate results --rerun 3f0a9c21b7de --write
    """
    import torch

    from bench.face.bar import Bar
    from bench.files import data_root as root_of
    from bench.plugins.registry import load_plugin
    from bench.validation.report import summary, validate

    torch.set_num_threads(1)
    require_folder(out)
    if write and rerun is None:
        raise click.UsageError("--write notes what --rerun found; say how many runs are to be run again")
    for file in plugins:
        load_plugin(file)
    root = root_of(data_root).resolve()
    with Bar("runs") as bar:
        report = validate(out, root, plugins=plugins, jobs=jobs, progress=bar)
    if not as_json:
        _print(report)
    outcomes, seed = _rerun(report, root, tuple(file.resolve() for file in plugins), rerun, rerun_seed)
    sound = [outcome for outcome in outcomes if outcome.agrees and not _problems_of(report, outcome.record.id)]
    if write and sound:
        _note(out, sound)
    if as_json:
        click.echo(json.dumps(_document(report, out, outcomes, seed), indent=2))
    else:
        click.echo(summary(report, out))
    differing = sum(not outcome.agrees for outcome in outcomes)
    if report.problems or differing:
        told = f"problems: {len(report.problems)}" + f", runs that came out otherwise: {differing}" * bool(differing)
        click.echo(f"bench: {told}; {_remedy(report, differing)}", err=True)
        return 1
    if rerun is not None and not outcomes:
        click.echo("bench: no run could be run again, as no run's data and device are at hand here", err=True)
        return 3
    return 0


def _print(report: Report) -> None:
    for problem in report.problems[:_MOST]:
        click.echo(problem)
    if len(report.problems) > _MOST:
        click.echo(f"... and {len(report.problems) - _MOST} more; --json has them all")
    for note in report.notes:
        click.echo(f"note: {note}", err=True)


def _remedy(report: Report, differing: int) -> str:
    """Say what to do about the problems that there are."""
    of_runs = [re.match("[0-9a-f]{12}(/|$)", problem.file) is not None for problem in report.problems]
    words = ["put back the files that the runs wrote, or run them again"] if any(of_runs) or differing else []
    if others := of_runs.count(False):
        words.append("do what its line says" if others == 1 else "do what their lines say")
    return ", and ".join(words)


def _problems_of(report: Report, run: str) -> bool:
    return any(problem.file.split("/")[0] == run for problem in report.problems)


def _rerun(
    report: Report, root: Path, plugins: tuple[Path, ...], asked: str | None, seed: int | None
) -> tuple[list[Rerun], int | None]:
    """Run some runs again, one after the other in this process.

    Returns:
        What came out, and the seed of the draw if there was one.
    """
    if asked is None:
        return [], None
    from bench.validation.rerun import candidates, rerun

    possible = candidates(report.inspected, root, plugins)
    chosen, seed = _choose(report, possible, asked, seed)
    found = []
    for run in chosen:
        record = next(record for record in report.runs if record.id == run)
        took = record.cost.get("wall_seconds")
        before = "" if took is None else f", which took {took:.0f} s"
        click.echo(f"running {run} again{before}: {possible[run]}", err=True)
        found.append(rerun(record, possible[run]))
        click.echo(str(found[-1]), err=True)
    return found, seed


def _choose(report: Report, possible: dict[str, Run], asked: str, seed: int | None) -> tuple[list[str], int | None]:
    from bench.validation.rerun import draw

    named = [word.strip() for word in asked.split(",") if word.strip()]
    known = {record.id for record in report.runs}
    if named and all(word in known for word in named):
        for word in named:
            if word not in possible:
                raise click.BadParameter(
                    f"{word} cannot be run again here: no data, or no such device", param_hint="--rerun"
                )
        return list(dict.fromkeys(named)), None
    if not re.fullmatch(r"[1-9][0-9]{0,5}", asked):
        raise click.BadParameter(f"{asked}: a number of runs is wanted, or ids of runs", param_hint="--rerun")
    seed = secrets.randbelow(2**32) if seed is None else seed
    chosen = draw(list(possible), int(asked), seed)
    told = f"{len(possible)} of {len(report.runs)} runs can be run again here"
    click.echo(f"{told}; seed {seed} (--rerun-seed) draws {', '.join(chosen) or 'none'}", err=True)
    return chosen, seed


def _note(out: Path, sound: Sequence[Rerun]) -> None:
    from bench.validation import verification
    from bench.validation.rerun import entry

    try:
        path = verification.note(out, {outcome.record.id: entry(outcome) for outcome in sound})
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"noted in {path}: {', '.join(outcome.record.id for outcome in sound)}", err=True)


def _document(report: Report, out: Path, outcomes: Sequence[Rerun], seed: int | None) -> dict[str, Any]:
    from bench.validation.verification import verified

    try:
        known = sorted(verified(out))
    except ValueError:  # which is one of the problems
        known = []
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
                "exact": outcome.because is None,
                "because": outcome.because,
                "differs": list(outcome.differs),
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        ],
        "verified": known,
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
def submit_command(out: Path, to: Path, data_root: Path | None, plugins: tuple[Path, ...]) -> int:
    """Pack the finished runs in DIR for a pull request, once they are valid.

    What the runs left and the files named by --plugin are packed, and nothing else: no checkpoint, no path and no name
    of this machine.

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
            runs = submission.gather(folders)
            submission.write(runs, Path(place))  # what is handed in is what is validated
            report = validate(Path(place), root_of(data_root).resolve(), [Path(place) / run for run in runs])
            contents = {} if report.problems else submission.as_pack(Path(place), [*runs], plugins)
        _print(report)
        for sentence in others:
            click.echo(f"left out: {sentence}", err=True)
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
