"""Photographs to pixels: every file becomes a square of one size, or a reason why not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL import __version__ as pillow_version

from bench.system import reading

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is tried. Others that Pillow knows start programs (EPS) or are no photographs."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation to what turns the picture upright; 1 is upright."""


class BadPhotograph(ValueError):
    """A photograph is not there or cannot be decoded. The message says why, without its path."""


def decode(path: Path | str, pixels: int) -> npt.NDArray[np.uint8]:
    """Read a photograph, upright, in colour: its middle square, scaled with antialiasing (bicubic).

    The same file gives the same bytes wherever the versions of Pillow and its libraries are the same. Large JPEG files
    are read at a fraction of their size, at least twice what is wanted. Transparency is dropped.

    Args:
        path: The file.
        pixels: Height and width of the result.

    Returns:
        (pixels, pixels, 3) uint8.

    Raises:
        BadPhotograph: It is missing, truncated, too large, or not what Pillow can read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata that nobody asked for
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with reading.opened(path) as file, Image.open(file, formats=FORMATS) as image:
                image.draft(None, (2 * pixels, 2 * pixels))
                image.load()
                square = _square(_colour(image), pixels)
                turn = _UPRIGHT.get(_orientation(image))
                return np.array(square if turn is None else square.transpose(turn))
        except FileNotFoundError as error:
            raise BadPhotograph("no such file") from error
        except UnidentifiedImageError as error:
            raise BadPhotograph("it is empty, or no image of a known format") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise BadPhotograph(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged files raise what they trip over
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadPhotograph(why or type(error).__name__) from error


def versions() -> dict[str, str]:
    """Give the versions of all that the bytes of a decoded photograph depend on."""
    libraries = {name: features.version(name) for name in ("libjpeg_turbo", "jpg", "zlib", "webp", "libtiff")}
    return {"Pillow": pillow_version} | {name: str(version) for name, version in libraries.items() if version}


def _square(image: Image.Image, pixels: int) -> Image.Image:
    """Scale the middle square; halves of a pixel are left at both sides, so that turning and scaling commute."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((pixels, pixels), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # sixteen bits of grey, which `convert` would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadPhotograph("its pixels have more than 16 bits")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadPhotograph("its pixels are floating-point numbers")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata do not make a bad photograph
        return 1
