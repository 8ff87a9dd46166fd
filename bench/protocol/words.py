"""Lists and numbers as they are typed, whatever they are of."""

from __future__ import annotations

import re

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
