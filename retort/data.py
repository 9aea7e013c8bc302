"""Prompts from a file or from the hub, with every mistake in them named by file and line."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from retort.errors import UserError, did_you_mean
from retort.files import named
from retort.types import Message, Prompt

__all__ = ["COLUMNS", "fingerprint", "in_template", "load_prompts", "prompts_from_rows"]

#: Columns of texts that only a teacher may see.
PRIVILEGED = ("solution", "hint", "outcome", "demonstration", "wrong")
#: The columns that Retort knows; any other column of a file is ignored.
COLUMNS = ("prompt", "messages", "id", "answer", "response", "clean", "domain", *PRIVILEGED)

#: What other data sets call the prompt; named in the error, never guessed.
SYNONYMS = ("problem", "question", "instruction", "query", "input", "text")

ROLES = ("system", "developer", "user", "assistant", "tool")
LAST_ROLES = ("user", "tool")
SUFFIXES = (".jsonl", ".json", ".parquet")

# owner/name or owner/name:configuration, as in openai/gsm8k:main
HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?")

# (where it was found, the row): "train.jsonl, line 3"
Row = tuple[str, Mapping[str, Any]]


#: What a template puts the prompt's own text for.
_PLACE = "{prompt}"


def in_template(prompts: Sequence[Prompt], template: str) -> list[Prompt]:
    """The same prompts, the user's last turn put into a template.

    Args:
        prompts: As read.
        template: A text that holds `{prompt}` once; other braces are text.

    Raises:
        UserError: It does not.
    """
    if template.count(_PLACE) != 1:
        raise UserError(f"prompt_template = {template!r}: it must hold {_PLACE} once, where the prompt's text goes")

    def put(prompt: Prompt) -> Prompt:
        *before, last = prompt.messages
        turn = replace(last, content=template.replace(_PLACE, last.content))
        return replace(prompt, messages=(*before, turn))

    return [put(prompt) for prompt in prompts]


def load_prompts(
    source: str, *, split: str = "train", limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """Reads prompts from JSON lines, Parquet or a data set of the hub.

    A row has a column `prompt` (text, or a list of messages) or `messages` (a list of {role, content} that ends with
    the user's turn; read where `prompt` is absent or null), and may have `id` (default: the number of the row, from
    0), `answer`, `response` and `domain`. Only a teacher may see `solution`, `hint`, `outcome` (how a solution ends),
    `demonstration`, `wrong` (a response that is wrong) and `clean` (a text or a list of messages: the prompt without
    what is not to change the answer).

    Args:
        source: A path ending in .jsonl, .json (one object per line) or .parquet; or a hub name, `owner/name` or
            `owner/name:configuration`.
        split: Which split of a hub data set; a file is always read whole.
        limit: Read only the first so many rows; what follows is not even checked.
        columns: Our name -> the name in the file, for example `{"prompt": "problem"}`.

    Returns:
        At least one prompt, in the order of the rows.

    Raises:
        UserError: One line that names the file and the line (JSON lines) or the row, and the remedy.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"data columns: there is no column '{name}' to map; {did_you_mean(name, COLUMNS)}")
    if limit is not None and limit < 1:
        raise UserError(f"data limit is {limit}; it must be at least 1, or absent to read everything")
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for number, (where, row) in enumerate(islice(_rows(source, split), limit)):
        if number == 0:
            _check_mapping(where, row, columns)
        prompt = _prompt(where, row, columns, number)
        if prompt.id in first_seen:
            raise UserError(f"{where}: id '{prompt.id}' was already used ({first_seen[prompt.id]}); ids must be unique")
        first_seen[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source}: no rows; expected at least one with a column 'prompt' or 'messages'")
    return prompts


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Hex SHA-256 over everything in the prompts and their order; a checkpoint notices by it that the data changed."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [
            prompt.id,
            [[message.role, message.content] for message in prompt.messages],
            prompt.plain,
            prompt.answer,
            prompt.response,
            sorted(prompt.privileged.items()),
            prompt.domain,
        ]
        if prompt.clean is not None:  # at the end: the fingerprint of data without pairs is what it was before
            content.append([[message.role, message.content] for message in prompt.clean])
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- where rows are


def _rows(source: str, split: str) -> Iterator[Row]:
    path = _path(source)
    if path.is_dir():
        raise UserError(f"{source} is a folder; name one file in it ({', '.join(SUFFIXES)})")
    if path.exists():
        if path.suffix in SUFFIXES and not path.is_file():  # a pipe would be waited for, for ever
            raise UserError(f"{source} is a pipe or a device; write its rows to a file and name that")
        if path.suffix == ".parquet":
            return _parquet_rows(path)
        if path.suffix in (".jsonl", ".json"):
            return _json_rows(path)
        raise UserError(f"{source}: unknown kind of file '{path.suffix}'; known: {', '.join(SUFFIXES)}")
    hub = HUB_NAME.fullmatch(source)
    if hub is None or path.suffix in (*SUFFIXES, ".csv", ".txt", ".gz"):
        raise UserError(f"no such file: {source}{_nearest_file(path)}")
    return _hub_rows(source, hub["path"], hub["config"], split)


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


def _json_rows(path: Path) -> Iterator[Row]:
    # Parsed here and not by `datasets`: only so can a mistake be named by its line, and the most common kind of file
    # then needs no extra dependency and leaves no copy in a cache.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _json_object(where, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _json_object(where: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError also for a number with thousands of digits
        start = line.lstrip()[:1]
        if start == b"[":
            what = "starts a list; write one object per line (JSON lines), not one list"
        elif not line.endswith(b"\n"):
            what = f"the last line is cut off or broken ({_short(error)}); was the file written to its end?"
        else:
            what = f"not valid JSON ({_short(error)}); each line must hold one object"
        raise UserError(f"{where}: {what}") from None
    if not isinstance(row, dict):
        kind = "list" if isinstance(row, list) else type(row).__name__
        raise UserError(f'{where}: holds a {kind}; each line must hold one object such as {{"prompt": "..."}}')
    return cast("dict[str, Any]", row)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Parquet files and hub data sets need the library `datasets`; install it with "
            "pip install 'retort-distill[data]', or use a .jsonl file"
        ) from None
    return datasets


def _parquet_rows(path: Path) -> Iterator[Row]:
    datasets = _datasets()
    try:
        # Streaming reads the file where it lies; otherwise `datasets` would first copy it into its cache.
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except UserError:
        raise
    except Exception as error:  # pyarrow's and `datasets`' own errors have no common base
        raise UserError(f"{path}: not a readable Parquet file ({_short(error)})") from None


def _hub_rows(source: str, path: str, config: str | None, split: str) -> Iterator[Row]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # no such data set, no network, no such split or configuration, ...
        hint = " (configuration: write owner/name:configuration)" if "onfig name is missing" in str(error) else ""
        raise UserError(
            f"{source}: no such file, and it cannot be loaded from the hub with split '{split}': {_short(error)}{hint}"
        ) from None
    for number, row in enumerate(rows):
        yield f"{source} ({split}), row {number}", row


def _short(error: BaseException) -> str:
    """The first line of an error's text, cut to a readable length."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---------------------------------------------------------------------------------------------------- what rows say


def _check_mapping(where: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(
                f"{where}: '{ours}' is mapped to a column '{theirs}' that is not there; {did_you_mean(theirs, row)}"
            )


def _prompt(where: str, row: Mapping[str, Any], columns: Mapping[str, str], number: int) -> Prompt:
    found = list(row)
    row = {name: row.get(columns.get(name, name)) for name in COLUMNS}
    # A mapping of `messages` alone says which of the two is meant, even if the file also has a `prompt`.
    chosen = "messages" if "messages" in columns and "prompt" not in columns else "prompt"
    conversation = row[chosen] if row[chosen] is not None else row["messages"]
    if conversation is None:
        raise UserError(f"{where}: {_no_prompt(found, columns)}")
    plain = isinstance(conversation, str)
    if plain:
        messages = (Message("user", _text(where, "prompt", conversation)),)
        if not conversation.strip():
            raise UserError(f"{where}: the prompt is empty")
    else:
        messages = _messages(where, conversation)
    name = _optional(where, "id", row["id"])
    privileged = {column: _optional(where, column, row[column]) for column in PRIVILEGED}
    return Prompt(
        id=str(number) if name is None else name,
        messages=messages,
        plain=plain,
        answer=_optional(where, "answer", row["answer"]),
        response=_optional(where, "response", row["response"]),
        privileged={column: text for column, text in privileged.items() if text is not None},
        clean=_clean(where, row["clean"], messages),
        domain=_optional(where, "domain", row["domain"]) or "",
    )


def _clean(where: str, value: Any, messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The other half of a pair of prompts: another last turn, or another conversation."""
    if value is None or isinstance(value, str):
        text = _optional(where, "clean", value)
        return None if text is None else (*messages[:-1], Message(messages[-1].role, text))
    return _messages(where, value)


def _no_prompt(found: Sequence[str], columns: Mapping[str, str]) -> str:
    wanted = [columns.get("prompt", "prompt"), columns.get("messages", "messages")]
    if any(name in found for name in wanted):
        return f"'{' and '.join(name for name in wanted if name in found)}' is null"
    near = [match for name in wanted for match in difflib.get_close_matches(name, found, n=1, cutoff=0.6)]
    near += [name for name in SYNONYMS if name in found]
    hint = f"; did you mean '{near[0]}'? rename it or map it: columns = {{prompt = \"{near[0]}\"}}" if near else ""
    return f"no column '{wanted[0]}' or '{wanted[1]}' (found: {', '.join(found) or 'nothing'}){hint}"


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{where}: messages must be a list with at least one {{role, content}}")
    messages: list[Message] = []
    for index, item in enumerate(value):
        at = f"{where}, message {index}"
        if not isinstance(item, Mapping):
            raise UserError(f"{at}: is a {type(item).__name__}; expected {{role, content}}")
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{at}: unknown role {role!r}; {did_you_mean(str(role), ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{at}: content is a {type(content).__name__}; this version reads text only")
        if role == "user" and not content.strip():
            raise UserError(f"{at}: the user's message is empty")
        messages.append(Message(role, _text(at, "content", content)))
    if messages[-1].role not in LAST_ROLES:
        raise UserError(
            f"{where}: the last message is the {messages[-1].role}'s; a prompt ends with the user's turn "
            "(a given answer goes into the column 'response')"
        )
    return tuple(messages)


def _optional(where: str, name: str, value: Any) -> str | None:
    """Text as it is, a number as text, null or blank text as None; anything else is an error."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        shown = value if isinstance(value, float) else type(value).__name__
        raise UserError(f"{where}: '{name}' is {shown}; expected text or a number")
    return _text(where, name, value)


def _text(where: str, name: str, text: str) -> str:
    # JSON can spell half of a surrogate pair (\ud83d); no tokenizer takes that, and it would fail far from here.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{name}' holds half a character (\\ud... escape) at {error.start}") from None
    return text


def prompts_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    where: str,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Stand-in until the branch of the data helper is merged."""
    columns = dict(columns or {})
    found = [(f"{where}, row {number}", row) for number, row in enumerate(islice(rows, limit))]
    for at, row in found[:1]:
        _check_mapping(at, row, columns)
    if not found:
        raise UserError(f"{where}: no rows; expected at least one with a column 'prompt' or 'messages'")
    return [_prompt(at, row, columns, number) for number, (at, row) in enumerate(found)]
