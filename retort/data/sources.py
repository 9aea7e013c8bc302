"""Sources of rows: files, globs and folders of them, data sets that `datasets` saved, and the hub."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retort.data.images import ImageFolder
from retort.data.text_files import PACKED, Row, json_file, json_lines, table
from retort.data.values import short, without_nulls
from retort.envs import registry
from retort.errors import UserError, shortened
from retort.files import named

__all__ = ["Row", "RowInFolder", "rows_of", "undecoded"]

#: A row, and the folder of the images that it names.
RowInFolder = tuple[str, Mapping[str, Any], ImageFolder]

# owner/name or owner/name:configuration, as in openai/gsm8k:main
HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?")

#: Split names in file names: train-00000-of-00002, gsm8k_test.
_SPLIT = re.compile(r"(?<![A-Za-z])(train|test|validation|valid|val|dev|eval)(?![A-Za-z])", re.IGNORECASE)


def rows_of(source: str, split: str, notes: list[str]) -> Iterator[RowInFolder]:
    """Yields the rows of a source, each with the folder of the images that it names.

    Args:
        source: A file, a glob, a folder, a name of the hub, or what an environment makes (`textworld:simple`).
        split: The split of a data set with several.
        notes: List that receives sentences on files that are not read.

    Raises:
        UserError: There is no such source, its kind is unknown, or it cannot be read.
    """
    if registry.makes_rows(source):
        return _in_folder(registry.rows_of(source, split), ImageFolder(None))
    path = _path(source)
    if path.is_dir():
        return _folder(source, path, split, notes)
    if path.exists():
        return _file(source, path)
    if glob.has_magic(source):
        return _together(source, _matching(source, path))
    hub = HUB_NAME.fullmatch(source)
    if hub is None or path.suffix.lower() in (*READERS, *PACKED, ".txt"):
        raise UserError(f"no such file: {source}{_nearest_file(path)}")
    return _in_folder(
        _hub_rows(source, hub["path"], hub["config"], split), ImageFolder(None, _hub_folders(hub["path"]))
    )


def _in_folder(rows: Iterable[Row], folder: ImageFolder) -> Iterator[RowInFolder]:
    return ((where, row, folder) for where, row in rows)


def _path(source: str) -> Path:
    try:
        return named(source).expanduser()
    except RuntimeError:  # ~name, where nobody has that name
        raise UserError(f"no such file: {source} (there is no such user)") from None


def _nearest_file(path: Path) -> str:
    """Ending for "no such file": a file beside it with nearly that name, or the first part that does not exist."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""


# ------------------------------------------------------------------------------------------------------ kinds of files


def _kind(path: Path) -> str | None:
    """The ending that decides how a file is read, or None for a file of another kind."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in PACKED
    kind = endings[-2] if packed and len(endings) > 1 else endings[-1] if endings and not packed else None
    return kind if kind in READERS and not (packed and kind == ".parquet") else None


def _file(source: str, path: Path) -> Iterator[RowInFolder]:
    kind = _kind(path)
    if kind is None:
        ending = "".join(path.suffixes[-2:]) if path.suffix.lower() in PACKED else path.suffix
        raise UserError(f"{source}: unknown kind of file '{ending}'; known: {_known()}")
    if not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{source} is a pipe or a device; write its rows to a file and name that")
    return _in_folder(READERS[kind](path), ImageFolder(path.parent))


def _known() -> str:
    return f"{', '.join(READERS)} (text files also with {', '.join(PACKED)})"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Parquet files, saved data sets and hub data sets need the library `datasets`; install it with "
            "pip install 'retort-distill[data]', or use a .jsonl file"
        ) from None
    return datasets


def _parquet_rows(path: Path) -> Iterator[Row]:
    datasets = _datasets()
    try:
        # Streaming reads the file in place; otherwise `datasets` would first copy it into its cache.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _of_arrow(str(path), rows)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise a dozen kinds
        raise UserError(f"{path}: not a readable Parquet file: {short(error)}") from None


def _of_arrow(where: str, rows: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(undecoded(rows)):
        yield f"{where}, row {number}", {name: without_nulls(value) for name, value in row.items()}


def undecoded(rows: Any) -> Iterable[Any]:
    """The rows of a data set of `datasets` with images and sounds as they are stored: encoded bytes, or a path.

    So an image is checked before it is decoded, and is the same whether the data set would decode it or not.
    """
    features = getattr(rows, "features", None)
    stored = _stored(features)
    if stored == features:
        return rows
    return (stored.decode_example(row) for table in rows.with_format("arrow") for row in table.to_pylist())


def _stored(feature: Any) -> Any:
    """A feature of `datasets` whose images, sounds and videos are left as they are stored."""
    if isinstance(feature, dict):
        return type(feature)({name: _stored(inside) for name, inside in feature.items()})
    if isinstance(feature, list):
        return [_stored(inside) for inside in feature]
    if hasattr(feature, "decode"):
        return replace(feature, decode=False)
    return replace(feature, feature=_stored(feature.feature)) if hasattr(feature, "feature") else feature


#: Readers of files, by the ending of the name in small letters.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": partial(table, separator=","),
    ".tsv": partial(table, separator="\t"),
    ".parquet": _parquet_rows,
}

# ------------------------------------------------------------------------------------------------------- several files


def _together(source: str, files: list[Path]) -> Iterator[RowInFolder]:
    """The rows of several files in the order of their names, so that runs repeat."""
    for path in files:
        yield from _file(source if len(files) == 1 else str(path), path)


def _matching(source: str, path: Path) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    folders = [one for one in found if one.is_dir()]
    if folders and "**" not in source:
        raise UserError(f"{source} also matches the folder {folders[0]}; name files only, or all below with **")
    files = [one for one in found if not one.is_dir()]
    if not files:
        raise UserError(f"no file matches {source}")
    return files


def _folder(source: str, path: Path, split: str, notes: list[str]) -> Iterator[RowInFolder]:
    if (path / "dataset_dict.json").is_file():
        return _in_folder(_saved_rows(source, path, split), ImageFolder(path))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return _in_folder(_saved_rows(source, path, None), ImageFolder(path))
    inside = sorted(one for one in path.iterdir() if not one.name.startswith((".", "_")))
    files = [one for one in inside if _kind(one) and one.is_file()]
    if not files:
        below = next((one for one in sorted(path.glob("*/*")) if one.is_file() and _kind(one)), None)
        hint = f"; did you mean '{below.parent}'?" if below is not None else f"; known: {_known()}"
        raise UserError(f"{source} is a folder without data files{hint}")
    kinds = sorted({str(_kind(one)) for one in files})
    if len(kinds) > 1:
        raise UserError(
            f"{source} is a folder with files of several kinds ({', '.join(kinds)}); name those that are meant, as in "
            f"'{source.rstrip('/')}/*{kinds[0]}'"
        )
    splits = sorted({found[1].lower() for one in files if (found := _SPLIT.search(one.name))})
    if len(splits) > 1:
        raise UserError(
            f"{source} is a folder with files of several splits ({', '.join(splits)}); name those that are meant, as "
            f"in '{source.rstrip('/')}/*{split if split in splits else splits[0]}*'"
        )
    others = [one.name + "/" * one.is_dir() for one in inside if one not in files]
    if others:
        notes.append(f"not read in this folder: {shortened(', '.join(others), 200)}")
    return _together(source, files)


# --------------------------------------------------------------------------------------- what `datasets` has or fetches


def _saved_rows(source: str, path: Path, split: str | None) -> Iterator[Row]:
    """Rows of what `save_to_disk` wrote: one data set, or one split of several."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{source}: not a readable saved data set: {short(error)}") from None
    if split is not None:
        if split not in found:
            raise UserError(f"{source}: has no split '{split}'; it has {', '.join(map(str, found))}: set split=...")
        found = found[split]
    return _of_arrow(source if split is None else f"{source} ({split})", found)


def _hub_rows(source: str, path: str, config: str | None, split: str) -> Iterator[Row]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # no such data set, no network, no such split or configuration, ...
        hint = " (configuration: write owner/name:configuration)" if "onfig name is missing" in str(error) else ""
        raise UserError(
            f"{source}: no such file, and it cannot be loaded from the hub with split '{split}': {short(error)}{hint}"
        ) from None
    return _of_arrow(f"{source} ({split})", rows)


def _hub_folders(name: str) -> tuple[Path, ...]:
    """The folders in which `datasets` keeps the files of a data set of the hub."""
    datasets = _datasets()
    from huggingface_hub import constants

    return (
        Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
        Path(datasets.config.DOWNLOADED_DATASETS_PATH),
    )
