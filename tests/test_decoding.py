"""Decoding photographs: what is scaled how, and which files are bad ones."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.files import decode as decoding
from bench.files.decode import BadPhotograph, decode


def picture(height: int, width: int, detail: int = 4) -> Image.Image:
    """Make something smooth, so that it looks the same at any size that shows its details."""
    corners = np.random.default_rng(0).integers(0, 255, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def distance(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


def test_the_middle_square_is_scaled(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    for turned, name in ((image, "wide.png"), (image.transpose(Image.Transpose.ROTATE_90), "high.png")):
        turned.save(tmp_path / name)
        square = decode(tmp_path / name, 8)
        assert square.shape == (8, 8, 3) and square.dtype == np.uint8
        scaled = np.asarray(turned.resize((turned.width * 8 // 30, turned.height * 8 // 30), Image.Resampling.BICUBIC))
        assert (square == (scaled[:, 8:16] if turned is image else scaled[8:16])).all()
        assert (square[2:-2, 2:-2] == (0, 0, 255)).all()


def test_fine_patterns_become_grey_and_not_another_pattern(tmp_path: Path) -> None:
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    square = decode(tmp_path / "checks.png", 16)
    assert square.min() > 120 and square.max() < 135


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_that_was_taken_askew_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    undone = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    upright = picture(31, 45)
    turn = decoding._UPRIGHT.get(undone)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "askew.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert distance(decode(tmp_path / "askew.png", 12), decode(tmp_path / "upright.png", 12)) <= 1


def test_orientation_six_means_a_quarter_turn_clockwise(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 10))  # light above
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "six.png", exif=exif)
    square = decode(tmp_path / "six.png", 10)
    assert square[:, 9].min() == 255 and square[:, 0].max() == 0  # light at the right


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_all_kinds_of_pixels_become_colour(tmp_path: Path, mode: str) -> None:
    grey = picture(40, 40).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(tmp_path / "image.tiff")
    grey.save(tmp_path / "grey.png")
    tolerance = 130 if mode == "1" else 3
    assert distance(decode(tmp_path / "image.tiff", 8), decode(tmp_path / "grey.png", 8)) <= tolerance


def test_large_jpegs_read_at_a_fraction_of_their_size_look_the_same(tmp_path: Path) -> None:
    for detail in (4, 12):
        image = picture(130, 170, detail=detail)
        image.save(tmp_path / "large.jpg", quality=95)
        image.save(tmp_path / "large.png")
        assert distance(decode(tmp_path / "large.jpg", 32), decode(tmp_path / "large.png", 32)) < 12


def test_a_palette_with_transparency_is_no_matter_for_a_warning(tmp_path: Path) -> None:
    image = picture(20, 20).quantize(8)
    image.save(tmp_path / "clear.png", transparency=bytes([0, 128, 255]))
    image.save(tmp_path / "opaque.png")
    assert (decode(tmp_path / "clear.png", 8) == decode(tmp_path / "opaque.png", 8)).all()


def test_damaged_metadata_do_not_make_a_bad_photograph(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "plain.jpg")
    picture(20, 20).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01")
    assert (decode(tmp_path / "odd.jpg", 8) == decode(tmp_path / "plain.jpg", 8)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_a_photograph_cut_anywhere_is_bad_or_just_as_it_was(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    picture(24, 30).save(whole)
    content, right, bad = whole.read_bytes(), decode(whole, 8), 0
    for length in {*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 4, len(content))}:
        cut.write_bytes(content[:length])
        try:
            assert (decode(cut, 8) == right).all(), length
        except BadPhotograph:
            bad += 1
    assert bad > 50


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
)
def test_a_photograph_with_other_bytes_is_an_image_or_bad_and_never_a_warning(
    place: int, patch: bytes, kind: str
) -> None:
    sink = io.BytesIO()
    picture(24, 30).save(sink, kind)
    content = bytearray(sink.getvalue())
    place %= len(content)
    content[place : place + len(patch)] = patch
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write(content)
        file.flush()
        try:
            assert decode(file.name, 8).shape == (8, 8, 3)
        except BadPhotograph as error:
            assert str(error)


def test_what_is_wrong_with_a_photograph_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    picture(20, 30).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-40])
    for name, why in {
        "missing": "no such file",
        "text": "no image of a known format",
        "empty": "it is empty",
        "folder": "Is a directory",
        "cut": "image file is truncated",
    }.items():
        with pytest.raises(BadPhotograph, match=why):
            decode(tmp_path / f"{name}.jpg", 8)
    for limit in (400, 200):  # Pillow warns of what is larger, and refuses twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadPhotograph, match=f"more than {limit} pixels"):
            decode(tmp_path / "good.jpg", 8)
