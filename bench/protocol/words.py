"""Lists and numbers as they are typed, whatever they are of, and what a setting says of attacks, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

_EMBEDDED = re.compile(r"features\(path='(?:[^']*/)?(\w+)-([\w.]+)-[0-9a-f]{8}'\)")
"""Features in the folder that `bench data embed` names: of what, by which network, and the digest of its listing."""


def split_list(text: str) -> list[str]:
    """Split at commas that stand in no bracket and no quotes; empty items are left out."""
    return [item for item in split_at(",", text) if item]


def split_at(separator: str, text: str) -> list[str]:
    """Split at a character where it stands in no bracket and no quotes; one item more than there are such places."""
    items, item, depth, quote = [], "", 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote and not item.endswith("\\") else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == separator and depth == 0 and not quote:
            items.append(item)
            item = ""
        else:
            item += character
    return [item.strip() for item in (*items, item)]


def spell_imbalance(factor: float | None) -> str:
    """Write an imbalance factor as on the command line."""
    return "natural" if factor is None else f"{factor:g}"


def dataset_in_words(call: str) -> str:
    """Name a dataset in a heading: embedded images are `cifar10 features of resnet18`, all else is as it is typed."""
    return _EMBEDDED.sub(r"\1 features of \2", call)


def attack_in_words(setting: Mapping[str, object]) -> str | None:
    """Say what an attack does to test images, of a setting's stored fields, which lack those at their usual values.

    Returns:
        None where there is none.
    """
    told = {**_USUAL_ATTACK, **setting}
    attack, epsilon, images = (told[key] for key in _USUAL_ATTACK)
    if attack == "none" or not isinstance(epsilon, float):
        return None
    how = f"{attack} moves each pixel by up to {255 * epsilon:g}/255, along the slope of the model that is tested"
    return f"{how}; on up to {images} test images, drawn by the seed"


def open_set_in_words(setting: Mapping[str, object]) -> str | None:
    """Say what an open-set test asks, of a setting's stored fields, which lack those at their usual values.

    Returns:
        None where there is none.
    """
    number, shots, ways = (
        setting.get(key, usual) for key, usual in (("open_classes", 0), ("shots", 5), ("ways", None))
    )
    if not number:
        return None
    of = "each of its classes" if ways is None else f"each of up to {ways} of its classes"
    return (
        f"{number} classes, drawn by the seed, are withheld from all clients, and nothing else is tested on them; a "
        f"client held out of training has {shots} labelled images of {of}, its model is not tuned, and it is asked of "
        "its test images, and of as many of withheld classes, what they are and whether it knows them"
    )


_USUAL_ATTACK: Mapping[str, object] = {"attack": "none", "attack_epsilon": 8 / 255, "attack_images": 1000}
"""As the setting has it; that is read without torch here."""
