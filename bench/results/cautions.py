"""What a reader of a leaderboard might overlook: equal rows, mixed versions, untested clients, what is not shown."""

from __future__ import annotations

from collections.abc import Iterable

from bench.results.leaderboard import Leaderboard, Row


def cautions(board: Leaderboard) -> list[str]:
    """Give the sentences that apply to a leaderboard."""
    return [*_untested(board), *_held_out(board), *_same_answers(board), *_mixed_versions(board), *_hidden(board)]


def _untested(board: Leaderboard) -> list[str]:
    """Count the clients that no personal number knows of."""
    if board.clients is None:
        return []
    unseen, drawn = (_number(board.setting.get(key)) for key in ("unseen", "eval_clients"))
    whole = board.clients - (unseen or 0)
    asked = whole if drawn is None else min(whole, drawn)
    known = [
        clients for row in board.rows for each in row.tested if (clients := _number(each.get("clients"))) is not None
    ]
    lacking = {asked - clients for clients in known}
    if not lacking or max(lacking) <= 0:
        return []
    span = " to ".join(map(str, sorted({min(lacking), max(lacking)})))
    whom = "clients" if asked == whole else "clients that were drawn for testing"
    have = "has no test images and is" if lacking == {1} else "have no test images and are"
    return [f"{span} of {asked} {whom} {have} in no mean of personal models."]


def _held_out(board: Leaderboard) -> list[str]:
    """Say what is known of the images of clients held out of training, on which their tuning hangs."""
    unseen = _number(board.setting.get("unseen")) or 0
    if not unseen:
        return []
    of = f"Of {unseen} {'client' if unseen == 1 else 'clients'} held out of training"
    if board.setting.get("unseen_labels", True):
        return [f"{of} the labels are known: unseen is after tuning by these, unless a method tunes without them."]
    return [f"{of} no label is known: unseen is without any tuning, unless a method tunes without labels."]


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _same_answers(board: Leaderboard) -> list[str]:
    """Name rows that agree in every digit wherever two of them were run on the same split with the same seed."""
    groups: list[list[Row]] = []
    for row in board.rows:
        group = next((group for group in groups if all(_agree(row, other) for other in group)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return [
        f"{_listed(row.label for row in group)} gave the same answers in every run: every digit of their accuracies is "
        "equal, so that what sets them apart had no effect here."
        for group in groups
        if len(group) > 1
    ]


def _agree(first: Row, second: Row) -> bool:
    """Whether two rows have common runs, and in these the same accuracies; variants that one alone has do not count."""
    ours, theirs = _by_block(first), _by_block(second)
    keys = first.values.keys() & second.values.keys()
    pairs = [(ours[block], theirs[block]) for block in ours.keys() & theirs.keys()]
    measured = any(first.values[key][place] is not None for place, _ in pairs for key in keys)
    return measured and all(
        first.values[key][place] == second.values[key][other] for place, other in pairs for key in keys
    )


def _by_block(row: Row) -> dict[tuple[int, str], int]:
    """Give the place of each finished run by its seed and split."""
    return {block: place for place, block in enumerate(zip(row.seeds, row.splits, strict=True))}


def _mixed_versions(board: Leaderboard) -> list[str]:
    mixed = [f"{package} {_listed(known)}" for package, known in board.packages.items() if len(known) > 1]
    return [f"Made with several versions, which may differ in more than their names: {'; '.join(mixed)}."] * bool(mixed)


def _hidden(board: Leaderboard) -> list[str]:
    """Say which rows have older versions that are not shown, and how they are seen and removed."""
    rows = [row for row in board.rows if row.hidden]
    count = sum(row.hidden for row in rows)
    if not count:
        return []
    older = f"{count} older version{'s' * (count > 1)} of {_listed(row.label for row in rows)}"
    return [f"{older} {'are' if count > 1 else 'is'} not shown: see --all-versions, and `bench clean --stale`."]


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
