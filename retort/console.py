"""What the command line shows: a summary, a progress bar with the curves that matter, and the before/after table."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from retort.errors import visible
from retort.evaluate.unknown import why_unknown

#: Shown in the progress line, if there: metric and label.
_CURVES = (
    ("reward", "reward"),
    ("reverse_kl", "KL"),
    ("forward_kl_gated", "fKL gated"),
    ("student_entropy", "entropy"),
    ("length", "length"),
)
#: Rows of the table: metric, label, how it is printed.
_ROWS = (
    ("length", "mean length, tokens", "{:z.1f}"),
    ("truncated", "truncated", "{:.1%}"),
    ("student_entropy", "own entropy, nats", "{:z.3f}"),
    ("student_entropy_uncertain", "own entropy where the teacher is uncertain, nats", "{:z.3f}"),
    ("forward_kl_uncertain", "forward KL where the teacher is uncertain, nats", "{:z.3f}"),
    ("reverse_kl", "reverse KL, nats", "{:z.3f}"),
)
#: Before the name of what a verifier measures besides right and wrong.
_PART = "reward/"


def shown(text: str, style: str = "") -> Text:
    """A text from anywhere for the terminal: no markup, no emoji codes, and no character that a terminal obeys."""
    return Text(visible(text), style=style)


class Lasting:
    """A text stream that never raises: a run does not end because nobody reads, or because a disk is full.

    What the stream's encoding lacks is written as `?`. After the first failure nothing is written any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Writes nothing yet; None for a stream that was closed before the program began."""
        self._stream: Any = stream
        self._lost = stream is None

    def write(self, text: str) -> int:
        """Writes a text, if it can be written."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(lambda: self._stream.write(text.encode(encoding, "replace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, if it can be flushed."""
        self._try(lambda: self._stream.flush())

    def _try(self, action: Callable[[], object]) -> None:
        if not self._lost:
            try:
                action()
            except (OSError, ValueError):  # ValueError: the stream was closed
                self._lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting_console(stream: TextIO | None = None) -> Console:
    """A console on a stream (standard output by default) that cannot end a run."""
    return Console(file=cast("IO[str]", Lasting(stream or sys.stdout)))


class RichObserver:
    """Draws a run in a terminal; in a file or pipe it prints a line now and then instead."""

    def __init__(self, console: Console) -> None:
        """Draws nothing yet."""
        self.console = console
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._curves = Text()
        self._phase: str | None = None
        self._seen: list[dict[str, Any]] = []
        self._times: Counter[str] = Counter()

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """The start-up summary."""
        table = Table.grid(padding=(0, 2))
        for heading, text in lines.items():
            table.add_row(shown(heading, "bold"), shown(text))
        self.console.print(table)
        for text in notes:
            self.note(text)

    def note(self, text: str) -> None:
        """A warning or remark."""
        self.console.print(Text.assemble(("note:", "yellow"), " ", shown(text)))

    def phase(self, text: str, done: int, total: int) -> None:
        """Judging a model."""
        if self._phase != text:
            self.close()
            self._open(text, total)
            self._phase = text
        self._advance(done, "")
        if done >= total:
            self.close()

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """One batch of rollouts done."""
        if self._phase is not None or self._live is None:
            self.close()
            self._open("distilling", steps)
        self._seen = [*self._seen, dict(metrics)][-10:]
        self._times.update({key.removeprefix("time/"): metrics[key] for key in metrics if key.startswith("time/")})
        curves = [f"{label} {self._mean(name):.3f}" for name, label in _CURVES if name in metrics]
        judged = [name for name in metrics if name.startswith("eval/avg@")]
        curves += [f"held-out {name.removeprefix('eval/')} {metrics[name]:.3f}" for name in judged]
        text = "  ".join([*curves, f"{self._mean('tokens_per_second'):,.0f} tok/s"])
        self._advance(step, text)
        if not self.console.is_terminal and (step in (1, steps) or step % max(1, steps // 10) == 0):
            self.console.print(shown(f"step {step}/{steps}  {text}"), soft_wrap=True)
        if step >= steps:
            self.close()
            self._where_the_time_went()

    def _where_the_time_went(self) -> None:
        whole = self._times.pop("step", 0.0)
        shares = {part: seconds / whole for part, seconds in self._times.items()} if whole else {}
        shares["everything else"] = shares.pop("other", 0.0)
        parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share >= 0.0005)
        self.console.print(f"time of the steps: {parts}", soft_wrap=True)
        self._times.clear()

    def table(self, results: Mapping[str, Any]) -> None:
        """The before/after table."""
        self.close()
        k, rows = results["k"], results["rows"]
        some = f", {results['graded']} of them graded" if "graded" in results else ""
        table = Table(
            title=f"{results['problems']} held-out prompts{some}, {k} answers each \\[95 % interval over prompts]"
        )
        table.add_column("")
        for row in rows:
            table.add_column(shown(row["who"]), justify="right")
        right = ((f"avg@{k}", f"avg@{k}", "{:.1%}"), (f"pass@{k}", f"pass@{k}", "{:.1%}"))
        parts = [(name, name.removeprefix(_PART), "{:z.3f}") for name in _part_names(rows)]
        for name, label, form in (*right, *parts, *_ROWS):
            cells = [row.get(name) for row in rows]
            if any(cells):
                table.add_row(shown(label), *(_cell(cell, form) for cell in cells))
        self.console.print(table)
        for name, share in results.get("gap_recovered", {}).items():
            what = "recovered" if share >= 0 else "lost: the student moved away from the teacher"
            gap = Text.assemble(shown(f"{name}: "), (f"{abs(share):.0%}", "bold"), f" of the gap to the teacher {what}")
            self.console.print(gap)

    def close(self) -> None:
        """Ends the bar."""
        if self._live is not None:
            self._live.stop()
        self._live, self._phase = None, None

    def _mean(self, name: str) -> float:
        values = [row[name] for row in self._seen if name in row]
        return sum(values) / len(values) if values else float("nan")

    def _open(self, text: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task(visible(text), total=total)
        self._curves = Text(style="dim")
        # In a file or a pipe there is nothing to redraw: `step` prints a line now and then instead.
        self._live = Live(Group(self._progress, self._curves), console=self.console)
        if self.console.is_terminal:
            self._live.start()

    def _advance(self, done: int, curves: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
            self._curves.plain = visible(curves)


def _cell(cell: Mapping[str, Any] | None, form: str) -> str:
    if not cell:
        return "-"
    low, high = cell["low"], cell["high"]
    known = low is not None and high is not None
    # The interval has a line of its own: side by side they do not fit into a terminal of 80 columns.
    return form.format(cell["value"]) + (f"\n\\[{form.format(low)}, {form.format(high)}]" if known else "")


def quiet_libraries() -> None:
    """Keeps the progress bars and advice of libraries out of ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

        disable_progress_bar()
        set_verbosity(CRITICAL)  # what it logs of a broken file it raises as well, and that is said once
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")


def examination_table(found: Mapping[str, Any]) -> Table:
    """What `retort doctor` shows, from `Examination.plain`."""
    colors = {"ok": "green", "warn": "yellow", "fatal": "bold red"}
    table = Table(box=None, padding=(0, 2, 1, 0), show_header=False)
    for check in found["checks"]:
        text = shown(check["saw"])
        if check["verdict"] != "ok":
            text.append("\nwhy it matters: ", style="dim").append(visible(check["why"]), style="dim")
            if check["remedy"]:
                text.append("\nwhat to do: ").append(visible(check["remedy"]))
        table.add_row(Text(check["verdict"], style=colors[check["verdict"]]), shown(check["name"], "bold"), text)
    table.add_row(Text(found["verdict"], style=colors[found["verdict"]]), Text("all together", style="bold"), "")
    return table


def trust_table(found: Mapping[str, Any]) -> Table:
    """What `retort trust` shows, from `trust.json`."""

    def percent(cell: Mapping[str, float] | None) -> str:
        return "-" if cell is None else f"{cell['value']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"

    table = Table(
        title=shown(
            f"{found['branches']} forced tokens, {found['problems']} {found['prompts']}: AUROC, 95 % over problems"
        )
    )
    for column in ("what tells", "who says so", "right in the end", "makes the difference"):
        table.add_column(column)
    for row in found["predictors"]:
        table.add_row(
            shown(row["predictor"]),
            shown(row["claimed_by"]),
            *(Text(percent(row[name])) for name in ("viable", "helps")),
        )
    table.caption = ". ".join(why_unknown(found)) or None
    return table


def _part_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures of the verifier's own, in order."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(_PART)))
