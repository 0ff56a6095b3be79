"""Rows in the wild: read from JSONL, JSONL.gz, CSV and Parquet files, directories of them, or the Hub.

A row that cannot be read is handed on with its place and the reason: `rlhf.intake` reports and counts it.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data import json_object
from rlhf.errors import DataError
from rlhf.hub import is_directory, is_file, is_hub_name, reaching_hub
from rlhf.quoting import one_line

EXTENSIONS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")

_SPLIT_IN_FILE_NAME = re.compile(
    r"^(train|valid|test)(?:ing|ation)?\d*(?![a-z])|[-_.](train|valid|test)(?:ing|ation)?\d*$", re.IGNORECASE
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_Row = tuple[str, dict[str, Any], str]


@dataclass(frozen=True)
class RawRow:
    """A row as it was found; `problem` says why it could not be read, and is empty for a good one.

    place is file:line, or the row's number where a format has no lines. split and source are what the file's
    or the Hub split's name tells; columns of the same name in the row come first.
    """

    place: str
    source: str
    split: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def source_names(setting: str | tuple[str, ...]) -> list[str]:
    """The setting as a list: one name or several."""
    return [setting] if isinstance(setting, str) else list(setting)


def read_rows(setting: str | tuple[str, ...], *, key: str) -> Iterator[RawRow]:
    """Yield every row of the Hub data set or of the files and directories that `key` names, in order.

    Raises DataError for a missing or unreadable file, RlhfError when the Hub cannot be reached.
    """
    names = source_names(setting)
    if not names:
        raise DataError(f"{key} is an empty list; name at least one file")
    for name in names:
        if is_directory(name):
            for path in _files_in(Path(name), key):
                yield from _read_file(path)
        elif name.lower().endswith(EXTENSIONS) or is_file(name):
            yield from _read_file(_existing(name, key))
        elif is_hub_name(name):
            yield from _read_hub(name, key)
        else:
            raise DataError(f"{key}={one_line(name)}: no such file or directory; check the path")


def split_of_file(path: Path) -> str | None:
    """The split that a file's name tells (`train*`, `valid*`, `test*`, `posts-train.jsonl`), if any."""
    stem = path.name
    for extension in sorted(EXTENSIONS, key=len, reverse=True):
        if stem.lower().endswith(extension):
            stem = stem[: -len(extension)]
            break
    match = _SPLIT_IN_FILE_NAME.search(stem)
    return (match[1] or match[2]).lower() if match else None


def _files_in(directory: Path, key: str) -> list[Path]:
    files = sorted(p for p in directory.iterdir() if p.name.lower().endswith(EXTENSIONS) and p.is_file())
    if not files:
        raise DataError(f"{key}={directory} holds no {', '.join(EXTENSIONS)} file")
    return files


def _existing(name: str, key: str) -> Path:
    if not is_file(name):
        raise DataError(f"{key}={one_line(name)}: no such file; check the path")
    if not name.lower().endswith(EXTENSIONS):
        raise DataError(f"{key}={one_line(name)}: unknown kind of file; give one of {', '.join(EXTENSIONS)}")
    return Path(name)


def _read_file(path: Path) -> Iterator[RawRow]:
    name = path.name.lower()
    split = split_of_file(path)
    if name.endswith(".csv"):
        reader = _csv_rows(path)
    elif name.endswith(".parquet"):
        reader = _parquet_rows(path)
    else:
        reader = _jsonl_rows(path)
    with _damage_named(path):
        for place, columns, problem in reader:
            yield RawRow(place=place, source=path.name, split=split, columns=columns, problem=problem)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What breaks a whole file: a cut or corrupt archive, a foreign format, no permission."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, EOFError, zlib.error, ArrowException, UnicodeDecodeError) as error:
        reason = one_line(str(error))[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}; fetch or write the file again") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield place, json_object(line), ""
            except ValueError as error:
                yield place, {}, str(error)


def _csv_rows(path: Path) -> Iterator[_Row]:
    """Rows below a header line; the place is the line on which a row begins."""
    # Undecodable bytes become lone surrogates, so that one bad row does not end the reading.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:1: invalid CSV: {error}; mend the header line") from error
        if header is None:
            return
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield place, {}, f"invalid CSV: {error}"
                continue
            if values is None:
                return
            if values:
                yield place, dict(zip(header, values, strict=False)), _csv_problem(header, values)


def _csv_problem(header: list[str], values: list[str]) -> str:
    if len(values) != len(header):
        return f"wrong number of columns: {len(values)} instead of the header's {len(header)}"
    if any("\udc80" <= character <= "\udcff" for value in values for character in value):
        return "invalid UTF-8"
    return ""


def _parquet_rows(path: Path) -> Iterator[_Row]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", columns, ""


def _read_hub(name: str, key: str) -> Iterator[RawRow]:
    from datasets import load_dataset

    with reaching_hub(key, name):
        splits = load_dataset(name)
        for split, rows in splits.items():
            number = 0
            for batch in rows.iter(batch_size=1024):
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    columns = dict(zip(batch, values, strict=True))
                    yield RawRow(f"{name}[{split}]: row {number}", source=name, split=split, columns=columns)
