"""Which images lie in a folder: links are followed wherever they lead, and each photograph is found once."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.dataset import DataDamaged

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are taken for images in folders of classes, in any case."""
_AWAY, _LINK = "take it away and try again", "take the link away and try again"


@dataclass(frozen=True)
class Seen:
    """What was found so far: folders that belong together share one, so that nothing is in two of them."""

    folders: dict[tuple[int, int], str] = field(default_factory=dict)
    """Device and number of each folder, and where it was found first."""
    links: set[str] = field(default_factory=set)
    """Images that are links."""

    def refuse_twice(self, images: Sequence[str]) -> None:
        """Refuse images of which one is a link to another; two names of one file without links are two images.

        Args:
            images: Their paths, all that there are.

        Raises:
            DataDamaged: There is one.
        """
        places: dict[tuple[int, int], str] = {}
        for image in sorted(images, key=self.links.__contains__) if self.links else ():
            try:
                state = os.stat(image)
            except OSError:  # it leads nowhere, which is told of it when it is opened
                continue
            first = places.setdefault((state.st_dev, state.st_ino), image)
            if first != image and image in self.links:
                raise DataDamaged(f"{image} and {first} are the same photograph; {_LINK}")


def images_below(folder: Path, suffixes: Collection[str] = SUFFIXES, seen: Seen | None = None) -> list[str]:
    """List the images in a folder and its folders, by their paths below it, sorted; hidden ones are left out.

    Links to other places are followed, as photographs often lie on another disk; not so those that lead up, or to where
    another has led.

    Args:
        folder: Where to look; what is not there has no images.
        suffixes: Of images, in small letters.
        seen: Of folders that were looked through before.

    Raises:
        DataDamaged: A folder cannot be read, or is found twice, or a pipe, socket or device is named as an image.
    """
    if not folder.is_dir():
        return []
    seen = Seen() if seen is None else seen
    found, waiting = [], [(str(folder), "")]
    while waiting:
        place, prefix = waiting.pop()
        _enter(place, seen)
        for entry in _entries(place):
            if _is_folder(entry):
                waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif os.path.splitext(entry.name)[1].lower() in suffixes and _is_image(entry):
                found.append(prefix + entry.name)
                if entry.is_symlink():
                    seen.links.add(entry.path)
    return sorted(found)


def _enter(place: str, seen: Seen) -> None:
    real = os.path.realpath(place)
    here = os.path.realpath(os.path.dirname(place))
    if real == here or here.startswith(real.rstrip(os.sep) + os.sep):
        raise DataDamaged(f"{place} leads up to {real}, in which it lies; {_AWAY}")
    state = os.stat(place)
    first = seen.folders.setdefault((state.st_dev, state.st_ino), place)
    if first != place:
        raise DataDamaged(f"{place} and {first} are the same folder; {_LINK}")


def _entries(place: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataDamaged(f"{place} cannot be read ({error.strerror}); allow it, or take it away") from error
    return (entry for entry in listed if not entry.name.startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Tell whether it is a file; a link that leads nowhere counts, and is named by who opens it."""
    try:
        if entry.is_file():
            return True
        entry.stat()
    except OSError:
        return True
    raise DataDamaged(f"{entry.path} is a pipe or a device, and no photograph; {_AWAY}")
