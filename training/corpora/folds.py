"""Speaker-disjoint cross-validation over a table."""

from collections.abc import Iterable, Iterator

from .row import Row


def cross_validated(rows: Iterable[Row], folds: int) -> Iterator[list[Row]]:
    """The rows of each fold, without the table's own test speakers.

    Speakers are dealt out to the folds by gender. A fold's own speakers are its test, every second speaker of the next
    fold its validation; all others are trained on. A row without a speaker is a ValueError.
    """
    rows = [row for row in rows if row.split != "test"]
    genders: dict[str, str] = {}
    for row in rows:
        if row.speaker is None:
            raise ValueError(f"{row.id} has no speaker: folds are by speaker.")
        genders[row.speaker] = row.gender or ""
    speakers = sorted(genders, key=lambda speaker: (genders[speaker], speaker))
    if folds < 3 or len(speakers) < folds:
        raise ValueError(
            f"{folds} folds of {len(speakers)} speakers: it takes 3 folds (test, validation, the rest) and a speaker in each."
        )
    parts = [speakers[number::folds] for number in range(folds)]
    for part, following in zip(parts, [*parts[1:], parts[0]], strict=True):
        splits = dict.fromkeys(following[::2], "validation") | dict.fromkeys(part, "test")
        yield [row.replace(split=splits.get(row.speaker or "", "train")) for row in rows]
