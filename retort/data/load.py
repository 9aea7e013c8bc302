"""Reads a source, or rows from Python, as prompts; and computes the prompts' fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from retort.core.images import PLACEHOLDER
from retort.core.rollouts import Message, Prompt
from retort.data.columns import COLUMNS, check_mapping
from retort.data.images import ImageFolder
from retort.data.rows import RowReader
from retort.data.sources import Row, RowInFolder, rows_of, undecoded
from retort.data.values import without_nulls
from retort.errors import UserError, a_kind, did_you_mean

__all__ = ["fingerprint", "in_template", "load_prompts", "prompts_from_rows"]

#: The placeholder of a template for the prompt's own text.
_PLACEHOLDER = "{prompt}"


def in_template(prompts: Sequence[Prompt], template: str) -> list[Prompt]:
    """Returns the same prompts with the user's last turn put into a template.

    Args:
        prompts: The prompts.
        template: A text that holds `{prompt}` once; other braces are text.

    Raises:
        UserError: The template does not hold it once.
    """
    if template.count(_PLACEHOLDER) != 1:
        raise UserError(
            f"prompt_template = {template!r}: it must hold {_PLACEHOLDER} once, where the prompt's text goes"
        )
    if PLACEHOLDER in template and any(prompt.images for prompt in prompts):
        raise UserError(
            f"prompt_template = {template!r}: holds the character U+FFFC, which stands for an image itself; remove it"
        )

    def put(prompt: Prompt) -> Prompt:
        *before, last = prompt.messages
        turn = replace(last, content=template.replace(_PLACEHOLDER, last.content))
        return replace(prompt, messages=(*before, turn))

    return [put(prompt) for prompt in prompts]


def load_prompts(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> list[Prompt]:
    """Reads prompts from files, a folder or a data set of the hub; docs/data.md shows every accepted shape.

    A row has a column `prompt` (text, or a list of messages) or `messages` (a list of {role, content}; read where
    `prompt` is absent or null; a last turn of the assistant is the row's `response`), and may have `system`, `tools`,
    `id` (default: the number of the row, from 0), `answer`, `response` and `domain`. Only a teacher may see
    `solution`, `hint`, `outcome` (how a solution ends), `demonstration`, `wrong` (a response that is wrong) and
    `clean` (a text or a list of messages: the prompt without the text that must not change the answer). ShareGPT's
    `conversations` and Alpaca's `instruction`, `input`, `output` are recognised by their columns. `images` (or `image`)
    holds the images of the prompt, and `teacher_images` those that only a teacher may see; paths begin in the folder of
    the file. Images need Pillow (the extra `vision`).

    Args:
        source: A path ending in .jsonl, .ndjson, .json, .csv, .tsv (also compressed: .gz, .bz2, .xz, .zst) or
            .parquet; a glob of such paths; a folder of them, or one that `save_to_disk` wrote; or a hub name,
            `owner/name` or `owner/name:configuration`.
        split: The split of a data set with several; a file is always read whole.
        limit: Number of first rows to read; the rest is not even checked.
        columns: Our name -> the name in the file, for example `{"prompt": "problem"}`; a part of a structure is named
            with a dot, `{"answer": "reward_model.ground_truth"}`.
        notes: List that receives sentences on what was recognised, and on columns and files that are not used.

    Returns:
        At least one prompt, in the order of the rows.

    Raises:
        UserError: One line that names the file and the line (text files) or the row, and the remedy.
    """
    remarks: list[str] = []
    prompts = _read(rows_of(source, split, remarks), source, limit, columns, remarks)
    if notes is not None:
        notes += [f"{source.rstrip('/').rsplit('/', 1)[-1]}: {note}" for note in remarks]
    return prompts


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    where: str = "data",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
) -> list[Prompt]:
    """Reads prompts from Python rows: a list of dicts, a `datasets.Dataset`, any iterable of mappings.

    Args:
        rows: Mappings like the rows of a file, see `load_prompts`. They are not changed. Paths of images begin in the
            working directory.
        where: Name of the rows in messages: "data, row 3".
        limit: As for `load_prompts`.
        columns: As for `load_prompts`.
        notes: As for `load_prompts`.

    Returns:
        At least one prompt, in the order of the rows.

    Raises:
        UserError: One line that names the row and the remedy.
    """
    remarks: list[str] = []
    folder = ImageFolder(Path.cwd())
    placed = ((at, row, folder) for at, row in numbered(rows, where))
    prompts = _read(placed, where, limit, columns, remarks)
    if notes is not None:
        notes += [f"{where}: {note}" for note in remarks]
    return prompts


def numbered(rows: Iterable[Any], where: str) -> Iterator[Row]:
    """Yields Python rows, each with its name for messages.

    Raises:
        UserError: The rows are no mappings.
    """
    if isinstance(rows, Mapping):
        names = ", ".join(str(name) for name in list(rows)[:6])
        raise UserError(f"{where}: is one mapping (of {names}); give its rows, or one of its splits")
    if hasattr(rows, "to_dict") and not hasattr(rows, "features"):
        raise UserError(f"{where}: is {a_kind(rows)}; give its rows: to_dict('records')")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise UserError(f"{where}: is {a_kind(rows)}; give a list of mappings, one for each row")
    arrow = hasattr(rows, "features")
    for number, row in enumerate(undecoded(rows) if arrow else rows):
        at = f"{where}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f'{at}: is {a_kind(row)}; each row must be a mapping such as {{"prompt": "..."}}')
        yield at, {name: without_nulls(value) for name, value in row.items()} if arrow else row


def _read(
    rows: Iterable[RowInFolder], source: str, limit: int | None, columns: Mapping[str, str] | None, notes: list[str]
) -> list[Prompt]:
    columns = dict(columns or {})
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"data columns: there is no column '{name}' to map; {did_you_mean(name, COLUMNS)}")
    if limit is not None and limit < 1:
        raise UserError(f"data limit is {limit}; it must be at least 1, or absent to read everything")
    reader = RowReader(columns)
    found: list[tuple[str | None, Prompt]] = []
    used: dict[str, str] = {}
    for where, row, folder in islice(rows, limit):
        if not found:
            check_mapping(where, row, columns)
        try:
            name, prompt = reader(where, row, folder)
        except RecursionError:
            raise UserError(f"{where}: is nested too deeply; no prompt needs that") from None
        if name is not None:
            if name in used:
                raise UserError(f"{where}: id '{name}' was already used ({used[name]}); ids must be unique")
            used[name] = where
        found.append((name, prompt))
    if not found:
        raise UserError(f"{source}: no rows; expected at least one with a column 'prompt' or 'messages'")
    notes += reader.notes()
    return _named(found, set(used))


def _named(found: Sequence[tuple[str | None, Prompt]], used: set[str]) -> list[Prompt]:
    """The prompts; one that is named by its number gets a longer name where another row has that id."""

    def free(name: str) -> str:
        while name in used:
            name = f"row-{name}"
        return name

    # A made-up name cannot meet another: numbers differ, and each is only made longer.
    return [
        replace(prompt, id=free(prompt.id)) if own is None and prompt.id in used else prompt for own, prompt in found
    ]


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Hex SHA-256 over everything in the prompts and their order; a checkpoint detects changed data by it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [
            prompt.id,
            [_content(message) for message in prompt.messages],
            prompt.plain,
            prompt.answer,
            prompt.response,
            sorted(prompt.privileged.items()),
            prompt.domain,
        ]
        # At the end, and only if present, so that the fingerprint of other data stays the same.
        if prompt.clean is not None:
            content.append([_content(message) for message in prompt.clean])
        if prompt.tools:
            content.append({"tools": prompt.tools})
        if prompt.teacher_images:
            content.append({"teacher_images": [image.digest for image in prompt.teacher_images]})
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def _content(message: Message) -> list[Any]:
    images = [{"images": [image.digest for image in message.images]}] if message.images else []
    return [message.role, message.content, *([message.extra] if message.extra else []), *images]
