"""Every setting with its default, whence that comes, its bounds and what it is: `retort settings`."""

from __future__ import annotations

import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from retort import registry
from retort.config import Config, keys
from retort.config.precedence import flat
from retort.config.synonyms import ELSEWHERE, ours_for
from retort.core.numbers import LARGEST, MOST
from retort.errors import UserError, did_you_mean

#: default: the signature's; paper: how the method's paper trained; start: left to be chosen when a run starts.
Origin = Literal["default", "paper", "start"]
_WORDS: Mapping[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_HEAD = f"""# Settings

<!-- Written by `retort settings --markdown`; edit the descriptions in retort/config/. -->

Every setting has one name. In TOML its section is a table; on the command line it is `rollout.prompts=64`; in Python it
is nested, `settings={{"rollout": {{"prompts": 64}}}}`. `retort settings rollout` prints a section of this page, `retort
settings method.eopd` the settings of a method ([methods](methods.md)); with `--json`, as JSON.

**Which value counts.** What you set (in a file, on the command line, as an argument; later ones win) counts before what
the method's paper used, and that before the defaults here. `retort settings --method eopd` shows what a paper changes;
a run says at its start which settings are its paper's. A paper's setting also gives way where it would contradict
yours:

* `eval.max_new_tokens` of a paper counts only while `rollout.max_new_tokens` is the paper's, too. If you give the
  latter, held-out completions may be as long as those in training.
* Lengths that nobody gave are cut to what the models hold beside the longest prompt. Lengths that you gave are never
  changed: where they do not fit, the run is refused.
* A warm-up of a paper that the run would not outlast is left out. The recipes of the built-in tasks count as given:
  theirs stays, and a note says how far the learning rate gets.
* `steps` of a paper that a cold start of yours would use up gives way to once through the data.

Each of these is said at the start. A run's `config.json` holds every setting as it was in the end.

Whole numbers are at most {MOST:,} in size, other numbers at most {LARGEST:g}; what is given here is narrower.
"""


@dataclass(frozen=True)
class Setting:
    """A setting.

    Attributes:
        key: Its full name.
        kind: What values it takes, in words.
        default: What it is where nothing else is said.
        origin: Whence that comes.
        bounds: Of a number, in words; empty where there are none but those of all numbers.
        what: What it is.
    """

    key: str
    kind: str
    default: Any
    origin: Origin
    bounds: str
    what: str


def settings(method: str | None = None) -> list[Setting]:
    """All settings that `retort.config` knows; with a method, as that one's paper has them.

    Raises:
        UserError: Unknown method.
    """
    paper = {} if method is None else flat(registry.load(method).recipe)
    return [_setting(key, field_for(key), paper) for key in keys()]


def method_settings(method: str) -> list[Setting]:
    """The settings of a method itself.

    Raises:
        UserError: Unknown method.
    """
    hints = typing.get_type_hints(registry.builder(method), include_extras=True)
    what = registry.described(method)
    return [
        Setting(f"method.{name}", _kind(hints.get(name, Any)), default, "default", "", what.get(name, ""))
        for name, default in registry.defaults(method).items()
    ]


def chosen(section: str | None, method: str | None = None) -> list[Setting]:
    """What `retort settings SECTION --method METHOD` shows.

    Args:
        section: A section, `method`, `method.NAME`, or the full name of a setting; None for all of them.
        method: Whose paper's settings are shown, and whose own.

    Raises:
        UserError: There is no such section, setting or method.
    """
    first, _, rest = (section or "").partition(".")
    if first == "method":
        name = rest or method or str(field_for("method").get_default(call_default_factory=True)["name"])
        return method_settings(name)
    found = settings(method) + ([] if method is None else method_settings(method))
    if section is None:
        return found
    own = [one for one in found if one.key == section or one.key.startswith(f"{section}.")]
    own = own or [one for one in found if section == "run" and "." not in one.key]
    if not own:
        names = [one.key for one in found]
        ours = ours_for(section, names)
        raise UserError(f"no section or setting '{section}'; {ours or did_you_mean(section, [*_sections(), *names])}")
    return own


def field_for(key: str) -> FieldInfo:
    """The field behind a full name that `retort.config.keys` gave."""
    section, _, name = key.rpartition(".")
    return (_sections()[section] if section else Config).model_fields[name]


def limits(field: FieldInfo) -> tuple[Callable[[float], bool], str]:
    """Whether a number lies within the bounds of a field, and those bounds in words."""
    tests: list[Callable[[float], bool]] = []
    words: list[str] = []
    for one in _metadata(field):
        for kind, test, word in _BOUNDS:
            if isinstance(one, kind):
                bound: Any = getattr(one, kind.__name__.lower())
                tests.append(lambda number, test=test, bound=bound: test(number, bound))
                words.append(f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}")

    def inside(number: float) -> bool:
        return (isinstance(number, int) or math.isfinite(number)) and all(test(number) for test in tests)

    return inside, ", ".join(words)


def plain(found: Sequence[Setting]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in found]


def text(found: Sequence[Setting], method: str | None = None, width: int = 100) -> str:
    """For a terminal: name, default and bounds on one line, below it what it is."""
    whence = {"default": "", "paper": f" (of the paper of {method})", "start": " (chosen at the start)"}
    lines: list[str] = []
    for one in found:
        lines.append(f"{one.key} = {shown(one.default)}{whence[one.origin]}")
        about = f"{one.kind}{', ' + one.bounds if one.bounds else ''}: {one.what}"
        lines += textwrap.wrap(about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def page() -> str:
    """Markdown: every setting by section, then what other trainers call them."""
    found = settings()
    parts = [_HEAD.rstrip()]
    for name, words in {"": "The run as a whole, outside every section.", **_section_descriptions()}.items():
        own = [one for one in found if one.key.rpartition(".")[0] == name]
        parts.append(f"## {name or 'run'}\n\n{words}\n\n{_table(own)}")
    return "\n\n".join([*parts, _elsewhere()]) + "\n"


def shown(value: Any) -> str:
    """A default as it is written in TOML; null for none."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {shown(own)}" for name, own in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)


# --- inside ---

_BOUNDS: tuple[tuple[type, Callable[[float, float], bool], str], ...] = (
    (Ge, lambda number, bound: number >= bound, "at least"),
    (Gt, lambda number, bound: number > bound, "above"),
    (Le, lambda number, bound: number <= bound, "at most"),
    (Lt, lambda number, bound: number < bound, "below"),
)


def _setting(key: str, field: FieldInfo, paper: Mapping[str, Any]) -> Setting:
    default = paper.get(key, field.get_default(call_default_factory=True))
    what = field.description or ""
    left = default == "auto" or (default is None and "default: " in what)
    origin: Origin = "paper" if key in paper else "start" if left else "default"
    return Setting(key, _kind(field.annotation), default, origin, limits(field)[1], what)


def _kind(annotation: Any) -> str:
    """What values an annotation allows, in words."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(own) for own in arguments if own is not type(None)]
        return " or ".join([*dict.fromkeys(kinds), *(["null"] if type(None) in arguments else [])])
    if origin in (list, tuple) or getattr(origin, "__name__", "") == "Sequence":
        return "list of texts" if str in arguments else "list"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "table"
    return "see what it is"


def _metadata(field: FieldInfo) -> Iterator[Any]:
    yield from (one for one in field.metadata if not isinstance(one, MinLen))


def _sections() -> dict[str, Any]:
    names = dict.fromkeys(key.rpartition(".")[0] for key in keys())
    return {name: Config.model_fields[name].annotation for name in names if name}


def _section_descriptions() -> dict[str, str]:
    return {name: " ".join((section.__doc__ or "").split()) for name, section in _sections().items()}


def _table(found: Sequence[Setting]) -> str:
    rows = ["| setting | default | values | what it is |", "|---|---|---|---|"]
    for one in found:
        chosen_late = " (chosen at the start)" if one.origin == "start" else ""
        values = f"{one.kind}{', ' + one.bounds if one.bounds else ''}"
        parts = one.what.replace("\n", "\\n").split("`")  # every other one is code
        what = "`".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))
        cells = [f"`{one.key}`", f"`{shown(one.default)}`{chosen_late}", values, what]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _elsewhere() -> str:
    rows = ["| elsewhere | here | what differs |", "|---|---|---|"]
    told: dict[Any, list[str]] = {}
    for name, ours in ELSEWHERE.items():
        told.setdefault(ours, []).append(name)
    for ours, names in told.items():
        here = ", ".join(f"`{own}`" for own in ours.settings) or "nothing"
        rows.append(f"| {', '.join(names)} | {here} | {ours.how} |")
    words = "A name of another trainer is not taken, but the error says which setting is meant."
    return "\n".join(["## What other trainers call them", "", words, "", *rows])
