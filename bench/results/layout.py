"""What a leaderboard says, in words and cells, whatever format it is written in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from bench.plugins.ledger import TIERS
from bench.protocol.words import attack_in_words, open_set_in_words
from bench.results import budget, classes
from bench.results.cautions import cautions
from bench.results.columns import ABSENT, ASKED, ASKED_SAYS, columns
from bench.results.footnotes import footnotes, spell_seeds
from bench.results.leaderboard import Leaderboard, measured
from bench.results.standing import WORDS
from bench.results.statistics import (
    FEWEST,
    FEWEST_RESAMPLED,
    LEVEL,
    corrected_floor,
    fewest,
    leader,
)
from bench.system.text import plain

NO_RUNS = "There are no finished runs."
NOT_INDEPENDENT = (
    "Settings of one dataset share images, seeds and initial weights, and are no independent evidence of one another."
)
_TWO_NUMBERS = (
    "Of the two personal numbers, personal counts each test image of a client alike, so that knowing how often each "
    "class occurs there is enough to raise it; balanced counts each class alike."
)
CONDITIONAL = (
    "What seeds span is conditional on this dataset's one long-tailed subsample and its one test set, which no seed "
    "draws anew."
)
INTERVAL = (
    f"of 2 to {FEWEST - 1} seeds (lowest–highest) is the range, which is no interval; of {FEWEST} seeds ± is half "
    f"the 95 % interval (Student t), and of {FEWEST_RESAMPLED} or more [low, high] is one (bootstrap, BCa); an "
    "interval is cut off at 0 and 100, and then written by its ends"
)
BRIEF = (
    f"below a mean, the range of 2 to {FEWEST - 1} seeds, or the 95 % interval of {FEWEST} (Student t) or more "
    "(BCa), cut off at 0 and 100"
)
"""The same where there is room for one form only."""
LEGEND = (
    f"Accuracies are percentages, a mean over seeds; {INTERVAL}. {ABSENT} stands for what an algorithm does not have.",
    "generic: the one global model on the official test set, mean over classes, each weighing the same whatever its "
    "number of test images; many, medium, few: the same over these classes, by their training images.",
    "balanced: each client's own model on its own test images, the mean over the classes that are among them, and then "
    "over clients. personal: the mean over the client's test images, and then over clients. Rows are ordered by "
    "balanced, then generic; those without come last. The order is no finding.",
    "The view of both: the newest broadcast with the client's stored state, for all clients. after: the client's model "
    "right after its local work on that broadcast.",
    "tail: personal over the few-shot classes; masked: personal with the classes that a client never trained on left "
    "out of the arg-max, absent where its test may have them; drawn, never: personal over the clients that were in the "
    "cohort of any round, and those that never were, the same clients for every row; worst decile: over the worst "
    "tenth of the clients.",
    "unseen: clients held out of training, each of which is tuned before it is tested: 5 epochs of the head, unless "
    "the method says otherwise.",
    "bold: better than each other row of the column by the signed-rank test (Wilcoxon) of runs on the same split and "
    f"seed, corrected (Holm) for all pairs of rows, at the {100 * LEVEL:g} % level. Where nothing is bold, it does not "
    "say which is best; `bench compare` has all pairs.",
    f"{NOT_INDEPENDENT} Only datasets are compared with one another.",
    "Cost is a mean over seeds, of a whole run: MB sent down and up (counted from the tensors), samples processed and "
    "FLOP, of training, of adaptation before the test, at the server, and of all three together; wall seconds, peak "
    "memory of the process, state kept at all clients.",
    f"Tier, what the server learns or needs: {', '.join(f'{tier} {what}' for tier, what in TIERS.items())}.",
)
_OF_OPEN_SET = (
    "closed: images of known classes taken for their own. AUROC: how often one of a known class is surer to be known "
    "than one of a withheld class. OSCR: known ones accepted and right, averaged over the shares of withheld ones that "
    "are accepted. open-set H: the harmonic mean of known ones accepted and right and withheld ones refused, by a "
    "threshold that accepts 9 of 10 shots."
)
_MEANING = {
    "last": "the last round",
    "last10": "the mean of the last ten evaluations",
    "best": "the best round on the test set, which is optimistic and not what rows are ordered by",
}


def best(board: Leaderboard) -> dict[str, str]:
    """Find the rows that tests set apart: title of a column to the label of the row better than each other one."""
    if board.metric == "best":  # chosen on test data: no test of it means anything
        return {}
    accuracies = [column for column in columns(board) if column.unit is None]
    ranking = replace(board, rows=tuple(row for row in board.rows if row.ranks))
    found = {column.title: leader(measured(ranking, column.key)) for column in accuracies}
    return {name: label for name, label in found.items() if label is not None}


def grid(
    board: Leaderboard,
    words: Callable[[str], str],
    bold: Callable[[str], str],
    *,
    label: Callable[[str], str] | None = None,
    number: Callable[[str], str] = str,
) -> tuple[list[str], list[list[str]]]:
    """Lay a leaderboard out.

    Args:
        board: The leaderboard.
        words: How text is written, a function of `bench.system.text`.
        bold: How a number is that tests set apart from all others of its column, after it was written.
        label: How an algorithm's name is written, if otherwise than other text.
        number: How numbers are written, and the marks of footnotes.

    Returns:
        The heading, and as many cells per row.
    """
    marks, _ = footnotes(board)
    shown, first = columns(board), best(board)
    stands = _says_standing(board)
    cells = [
        [
            (label or words)(row.label) + number(marks[row.label]),
            words(row.tier),
            *([words(row.standing)] if stands else []),
            str(len(row.seeds)),
            *((bold if first.get(column.title) == row.label else str)(number(column.show(row))) for column in shown),
        ]
        for row in board.rows
    ]
    heading = ["algorithm", "tier", *(["standing"] if stands else []), "seeds"]
    return [*heading, *(words(column.title) for column in shown)], cells


def _says_standing(board: Leaderboard) -> bool:
    """Tell whether it is worth a word whom the numbers are believed of: in a folder of one's own it is not."""
    return any(kind != "self-reported" for row in board.rows for kind in (row.standing, *row.standings))


def title(board: Leaderboard, without: Collection[str] = ()) -> str:
    """Name what a leaderboard compares on, and what tells it from the others that compare on the same.

    Args:
        board: The leaderboard.
        without: Fields that are not named although they tell it apart.
    """
    apart = {key: ABSENT if value is None else value for key, value in board.apart.items() if key not in without}
    return plain(", ".join((board.base, *(f"{key} = {value}" for key, value in apart.items()))))


def details(board: Leaderboard) -> str:
    """Say under which protocol, in a line."""
    field = board.setting.get
    epochs = "1 epoch" if field("epochs") == 1 else f"{field('epochs')} epochs"
    parts = [
        f"model {field('model')} ({field('norm')} norm)",
        f"{board.clients or 'natural users as'} clients, {_percent(field('participation'))} a round",
        f"{field('rounds')} rounds of {epochs}, batch {field('batch_size')}, learning rate {field('lr')}",
        f"partition {field('partition')}",
        spell_seeds(board.seeds),
        f"{board.engine} engine, {board.precision}, {board.device}",
    ]
    if field("eval_clients"):
        parts.append(f"personal models of {field('eval_clients')} clients tested, drawn by the seed")
    if board.overrides:
        changed = ", ".join(f"{key} = {value}" for key, value in sorted(board.overrides.items()))
        parts.append(f"departs from {board.names[0]}: {changed}")
    return plain("; ".join(parts) + ".")


def remarks(board: Leaderboard) -> list[str]:
    """List what stands below a leaderboard: warnings, where the numbers come from, numbered footnotes."""
    _, notes = footnotes(board)
    numbered = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    return [
        *warnings(board),
        order(board),
        *_standing(board),
        *_rests(board),
        *cautions(board),
        provenance(board),
        *_power(board),
        *board.lacks,
        *_derived(board),
        *_attacked(board),
        *_open_set(board),
        *numbered,
    ]


def _standing(board: Leaderboard) -> list[str]:
    """Say whom the numbers are believed of."""
    if not _says_standing(board):
        return []
    kinds = dict.fromkeys(row.standing for row in board.rows)
    return [f"{'; '.join(WORDS[kind] for kind in kinds)}."]


def _derived(board: Leaderboard) -> list[str]:
    """Say what columns mean that stand there only because they were asked for."""
    asked = {column.key for column in ASKED}.intersection(board.shown)
    said = [classes.SAYS] * any(map(classes.is_derived, board.shown)) + [ASKED_SAYS] * bool(asked)
    return said + [budget.SAYS] * any(map(budget.asked, board.shown))


def _attacked(board: Leaderboard) -> list[str]:
    """Say what was done to images, where models were tested under attack."""
    how = attack_in_words(board.setting)
    return [] if how is None else [f"robust: {how}, of a client's own model those that are its own."]


def _open_set(board: Leaderboard) -> list[str]:
    """Say what was asked about classes that are withheld, and what its four numbers are."""
    how = open_set_in_words(board.setting)
    return [] if how is None else [f"open set: {how}. {_OF_OPEN_SET}"]


def order(board: Leaderboard) -> str:
    """Say which number ranks, and why there are two personal ones."""
    by = f"Rows are ordered by balanced{' of the last round' * (board.metric == 'best')}, then generic."
    return f"{by} {_TWO_NUMBERS}"


def _rests(board: Leaderboard) -> list[str]:
    """Say on what the personal numbers of a leaderboard rest."""
    known = [tested for row in board.rows for tested in row.tested if tested.get("clients")]
    if not known:
        return []

    def span(key: str) -> str:
        numbers = {number for tested in known if (number := tested[key]) is not None}
        return " to ".join(map(str, sorted({min(numbers), max(numbers)}))) if numbers else ""

    fewest_images, most_images = min(each["images"][0] for each in known), max(each["images"][1] for each in known)
    says = f"Personal numbers rest on {span('clients')} clients with {fewest_images} to {most_images} test images each"
    says += f", the worst decile on {span('worst_decile')} of them"
    says += f"; {span('drawn')} of them were drawn for the cohort of any round, {span('never')} never"
    if span("one_class") != "0":
        says += f"; {span('one_class')} trained on a single class"
        masked = any(column.title == "masked" for column in columns(board))
        says += ", and masked is 100 % for them by construction" if masked else ""
    return [f"{says}."]


def _power(board: Leaderboard) -> list[str]:
    """Say what the seeds of a leaderboard can separate."""
    counts = sorted((len(row.seeds) for row in board.rows if row.seeds and not row.screened), reverse=True)
    tested = [resolution(counts[1], len(counts))] if len(counts) > 1 and board.metric != "best" else []
    return [*tested, *([CONDITIONAL] if counts and counts[0] > 1 else [])]


def resolution(blocks: int, algorithms: int, unit: str = "seed") -> str:
    """Say what so many seeds, or other blocks, can separate among so many algorithms.

    The signed-rank test gives no p below 2 / 2^n, where one algorithm is better n times of n.
    """
    pairs = algorithms * (algorithms - 1) // 2
    counted = f"{blocks} {unit}{'s' * (blocks != 1)}"
    family = f", to be corrected (Holm) for {pairs} pairs" if pairs > 1 else ""
    smallest = f"{min(1.0, 2.0 ** (1 - blocks)):.2g}"
    least = f"its p is {smallest} or more{family}."
    if corrected_floor(blocks, pairs) > LEVEL:
        whom = "two algorithms" if algorithms == 2 else f"any two of {algorithms} algorithms"
        told = f"{counted} cannot separate {whom} by the signed-rank test, however far apart: {least}"
        return f"{told} {fewest(pairs)} {unit}s could."
    whom = "two algorithms" if algorithms == 2 else f"two of {algorithms} algorithms"
    return f"{counted} can separate {whom} by the signed-rank test where one is nearly always better: {least}"


def provenance(board: Leaderboard) -> str:
    """Say what was measured, under which protocol, by which commits and when."""
    parts = [f"Measured: {_MEANING[board.metric]}", f"protocol {board.protocol}"]
    if board.commits:
        parts.append(f"commit {', '.join(map(_short, board.commits))}")
    if board.finished:
        parts.append(f"runs of {' to '.join(dict.fromkeys((board.finished[0], board.finished[-1])))}")
    if board.hardware:
        parts.append(f"on {' and '.join(board.hardware)}")
    return "; ".join(parts) + "."


def warnings(board: Leaderboard) -> list[str]:
    """Name the seeds of which the rows did not see the same split."""
    return [
        plain(f"Not comparable: the runs of seed {seed} saw different splits ({', '.join(fingerprints)}).")
        for seed, fingerprints in board.fingerprints.items()
        if len(fingerprints) > 1
    ]


def _short(commit: str) -> str:
    head, dash, state = commit.partition("-")
    return head[:10] + dash + state


def _percent(share: object) -> str:
    return f"{100 * share:g} %" if isinstance(share, int | float) else str(share)
