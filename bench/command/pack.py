"""`bench pack`: many runs in a few files, and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from bench.command.stored import require_folder
from bench.system.text import plain


@click.command("pack")
@click.argument("out", metavar="[DIR]", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"))
@click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="FOLDER", help="Pack, new or not."
)
@click.option("--unpack", is_flag=True, help="DIR is a pack: write its runs as folders into FOLDER.")
@click.option("--remove", is_flag=True, help="Remove the folders of runs that the pack gives back bit for bit.")
def pack_command(out: Path, to: Path, unpack: bool, remove: bool) -> int:
    """Put the finished and failed runs in DIR (by default runs) into a pack: three files, however many runs there are.

    A pack in a folder of results is read like the run folders beside it, by every command but `bench run`, which looks
    for folders. What is in the pack stays in it, also if the command is killed.

    \b
    bench pack runs --to results/digits
    bench pack runs --to results/digits --remove
    bench pack results/digits --unpack --to runs
    """
    from bench.results import packed, packing, records
    from bench.results.record import DOCUMENT

    require_folder(out)
    try:
        if unpack:
            if remove:
                raise click.UsageError("--remove goes with packing; a pack that was unpacked is yours to delete")
            if not packed.is_pack(out):
                raise click.BadParameter(f"{out}: is no pack, it has no {packed.RUNS}", param_hint="DIR")
            click.echo(f"unpacked {len(packing.unpack(out, to))} runs into {to}", err=True)
            return 0
        found, damaged = records.read_all(out)
        chosen, others = packing.packable(found)
        unfinished = [f"{path.name} is unfinished" for path in records.unfinished(out)]
        for sentence in (*damaged, *others, *unfinished):
            click.echo(f"left out: {plain(sentence)}", err=True)
        if not chosen:
            raise click.BadParameter(
                f"{out}: holds no run that can be packed, 'bench run' makes them", param_hint="DIR"
            )
        together = packing.pack(chosen, to)
        size = sum((to / name).stat().st_size for name in packed.FILES)
        click.echo(
            f"{to} holds {len(together)} runs in {size / 1e6:.2f} MB, {len(chosen)} of them from {out}", err=True
        )
        if remove:
            there = {record.id: record for record in packed.read(to)[0]}
            gone = [each for each in chosen if each.pack is None and packing.same(there[each.id], each)]
            for record in gone:
                (record.folder / DOCUMENT).unlink()  # first, so that half a folder is an unfinished run
                shutil.rmtree(record.folder)
            click.echo(f"removed {len(gone)} folders, which the pack gives back bit for bit", err=True)
    except packing.NotPackable as error:
        raise click.ClickException(str(error)) from error
    return 1 if damaged else 0
