"""Rows of text files: JSON lines, a JSON list, tables of comma- or tab-separated cells; compressed or not.

Files are parsed here and not by `datasets`: so an error can name its line, an answer `007` stays what it is, and the
most common kinds of file need no extra dependency and leave no copy in a cache.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from retort.data.values import TwiceError, short, strict_json
from retort.errors import UserError, quoted

__all__ = ["PACKED", "Row", "json_file", "json_lines", "table"]

# (name of the row for messages, the row): "train.jsonl, line 3"
Row = tuple[str, Mapping[str, Any]]

#: Endings of compressed files.
PACKED = (".gz", ".bz2", ".xz", ".zst")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: First bytes that no UTF-8 text has, and what they mean.
_FIRST_BYTES = {
    b"\x1f\x8b": "it is compressed; end its name in .gz",
    b"BZh": "it is compressed; end its name in .bz2",
    b"\xfd7zXZ": "it is compressed; end its name in .xz",
    b"\x28\xb5\x2f\xfd": "it is compressed; end its name in .zst",
    b"PK\x03\x04": "it is a zip archive or a spreadsheet; unpack it, or save it as .csv",
    b"PAR1": "it is a Parquet file; end its name in .parquet",
    b"\xff\xfe": "it is UTF-16; save the file as UTF-8",
    b"\xfe\xff": "it is UTF-16; save the file as UTF-8",
}
#: Ends of lines besides the line feed; every other character may be part of a cell.
_BARE_RETURN = re.compile("(?<=\r)(?!\n|$)")
#: Longest cell of a table; the csv module's own limit, 131,072 characters, is less than long responses have.
_LONGEST_CELL = 2**30


def _opened(path: Path) -> BinaryIO:
    packing = path.suffix.lower()
    if packing == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if packing == ".bz2":
        return cast("BinaryIO", bz2.open(path, "rb"))
    if packing == ".xz":
        return cast("BinaryIO", lzma.open(path, "rb"))
    return io.BytesIO(_unpacked_zst(path)) if packing == ".zst" else path.open("rb")


def _unpacked_zst(path: Path) -> bytes:
    """Unpacks all of a .zst file: a reader of its library takes a truncated file for a whole one."""
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path}: .zst needs the package zstandard (pip install zstandard), or unpack it") from None
    left, unpacked = path.read_bytes(), list[bytes]()
    while left:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked.append(frame.decompress(left))
        except zstandard.ZstdError as error:
            raise OSError(short(error)) from None
        if not frame.eof:
            raise EOFError("it ends in the middle")
        left = frame.unused_data
    return b"".join(unpacked)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends, without a byte order mark."""
    try:
        with _opened(path) as file:
            for number, line in enumerate(file):
                if number == 0:
                    for first, problem in _FIRST_BYTES.items():
                        if line.startswith(first):
                            raise UserError(f"{path}, line 1: not UTF-8 text: {problem}")
                yield line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be unpacked ({short(error)}); was the file written to its end?") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def json_lines(path: Path) -> Iterator[Row]:
    """Rows of JSON lines; blank lines are skipped.

    Raises:
        UserError: A line holds no object; the message names the line.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(where, line)


def json_file(path: Path) -> Iterator[Row]:
    """Rows of a file that holds one list of objects, or JSON lines.

    Raises:
        UserError: It is neither, or an item is no object.
    """
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), b"")
    if not first.lstrip().startswith(b"["):
        _refuse_one_object(path, first + b"".join(lines) if first.strip() == b"{" else b"")
        yield from json_lines(path)
        return
    try:
        items = strict_json((first + b"".join(lines)).decode())
    except TwiceError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({short(error)}); it must hold one list of objects") from None
    for number, item in enumerate(items):
        where = f"{path}, row {number}"
        yield where, _row(where, item, "each item of the list")


def _refuse_one_object(path: Path, whole: bytes) -> None:
    """Refuses a file whose lines together are one object, as {"data": [...]} is written over several."""
    try:
        found = json.loads(whole)
    except (ValueError, RecursionError):
        return  # the error of its line is reported instead
    if isinstance(found, dict):
        lists = [name for name, value in cast("dict[str, Any]", found).items() if isinstance(value, list)]
        inside = f"; if its rows are in {quoted(lists[0])}, write that list alone" if lists else ""
        raise UserError(f"{path}: holds one object over several lines; it must hold one list of objects{inside}")


def _object(where: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = strict_json(line.decode())
    except TwiceError as error:
        raise UserError(f"{where}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number with thousands of digits
        start = line.lstrip()[:1]
        if start == b"[":
            what = "starts a list; write one object per line (JSON lines), or end the file's name in .json"
        elif b"\r" in line.strip():  # no JSON text holds one, unless between its parts
            what = "lines end with a bare carriage return; save the file with line feeds (LF) as line ends"
        elif not line.endswith(b"\n"):
            what = f"the last line is cut off or broken ({short(error)}); was the file written to its end?"
        else:
            what = f"not valid JSON ({short(error)}); each line must hold one object"
        raise UserError(f"{where}: {what}") from None
    return _row(where, row, "each line")


def _row(where: str, row: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        kind = "list" if isinstance(row, list) else type(row).__name__
        raise UserError(f'{where}: holds a {kind}; {what} must hold one object such as {{"prompt": "..."}}')
    return cast("dict[str, Any]", row)


def table(path: Path, separator: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; every cell is text, and an empty one is null.

    Args:
        path: Path of the file.
        separator: Character between cells.

    Raises:
        UserError: A row has more or fewer cells than the header, or its quotes do not close; the line is named.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    reader = csv.reader(_decoded(path), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{where}: not a row of a table ({error}); are its quotes closed?") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(where, cells)
        elif len(cells) != len(header):
            raise UserError(
                f"{where}: has {len(cells)} cells, and the header {len(header)}; cells that hold the separator or a "
                "line's end must stand in quotes"
            )
        else:
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _header(where: str, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise UserError(f"{where}: two columns are called '{twice[0]}'; rename one")
    if len(header) == 1:
        other = next((mark for mark in (";", "\t", "|", ",") if mark in header[0]), None)
        if other is not None:
            raise UserError(
                f"{where}: cells seem to be separated by {other!r}; save a .csv with commas, a .tsv with tabs"
            )
    return header


def _decoded(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield from _BARE_RETURN.split(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8"
            ) from None
