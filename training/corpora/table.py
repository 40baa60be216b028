"""Tables of rows as Parquet files, with audio by reference. A table is written completely or not at all."""

import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast, overload

import datasets
from datasets.arrow_writer import ParquetWriter
from datasets.features import Features, Value
from tqdm import tqdm

from ..files import atomic
from .row import COLUMNS, Row

_VALUES = {str: Value("string"), float: Value("float32"), int: Value("int32"), bool: Value("bool")}
_HISTORY = [{"role": _VALUES[str], "content": _VALUES[str]}]
_LATER = {"voice_only", "subset"}  # columns that older tables lack
FEATURES = Features({name: _VALUES.get(kind, _HISTORY) for name, kind in COLUMNS.items()})


class Table(Sequence[Row]):
    """The rows of a dataset, memory-mapped; each row is made when it is asked for."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        return (Row(**record) for record in self.dataset)  # pyright: ignore[reportCallIssue]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(Table(self.dataset.select(range(*index.indices(len(self))))))
        return Row(**self.dataset[index])


def write_table(rows: Iterable[Row], path: str | Path, progress: str | None = None) -> int:
    """Writes rows to a Parquet file and returns their number. After an error an older table stays as it was.

    Args:
        progress: title of a progress bar. Default: no bar.
    """
    count = 0
    try:
        with atomic(path) as part, ParquetWriter(features=FEATURES, path=str(part), writer_batch_size=1_000) as writer:
            for row in tqdm(rows, desc=progress, unit=" rows", disable=progress is None):
                writer.write(row.to_dict())
                count += 1
            if not count:
                raise ValueError(f"{path}: there are no rows to write.")
            writer.finalize()
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            full = f"{path} was not written after {count:,} rows: no space left on the disk. Free some and run again"
            raise OSError(errno.ENOSPC, full) from None
        raise
    return count


def read_table(*paths: str | Path) -> Table:
    """The rows of one or several tables. Two rows of the same corpus and id are a ValueError."""
    tables = [_read_parquet(path) for path in paths]
    files: dict[tuple[str, str], str | Path] = {}
    for table, path in zip(tables, paths, strict=True):
        keys = set(zip(table["corpus"], table["id"], strict=True)) if len(paths) > 1 else set()
        if shared := keys & files.keys():
            corpus, name = min(shared)
            raise ValueError(
                f"{len(shared):,} rows are in two tables, {files[corpus, name]} and {path}, the first is {name!r} of the "
                f"corpus {corpus!r}. Name a table once; if these are other clips, name another `corpus` in their metadata."
            )
        files |= dict.fromkeys(keys, path)
    return Table(datasets.concatenate_datasets(tables))


def _read_parquet(path: str | Path) -> datasets.Dataset:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: `dual-slm corpus read` or `corpus build` makes a table.")
    try:
        table = cast(datasets.Dataset, datasets.Dataset.from_parquet(str(path)))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise ValueError(f"{path} is no table, or it is damaged ({error.__cause__ or error}).") from None
    for column in sorted(_LATER.difference(table.column_names)):
        table = table.add_column(column, [None] * len(table), feature=FEATURES[column])
    if missing := [column for column in FEATURES if column not in table.column_names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it is no table of `dual-slm corpus`.")
    return table.select_columns(list(FEATURES))
