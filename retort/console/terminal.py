"""The display of the command line: a summary, a progress bar with the main curves, and the before/after table."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import IO, Any, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from retort.errors import counted, visible
from retort.evaluate.measures import measure, ordered
from retort.evaluate.unknown import why_unknown

#: Shown in the progress line, if there: metric, label, how it is printed.
_CURVES = (
    ("reward", "reward", "{:z.3f}"),
    ("reverse_kl", "reverse KL", "{:z.3f} nats"),
    ("forward_kl_gated", "forward KL where the gate is open", "{:z.3f} nats"),
    ("student_entropy", "entropy", "{:z.3f} nats"),
    ("length", "length", "{:,.0f} tokens"),
)
#: What a student decides, as metrics count it, and in words.
_DECISIONS = {"tokens": "tokens", "denoising_steps": "denoising steps"}
#: Steps over which they are averaged.
_OVER = 10
#: What the table leaves to the report.
_LEFT_OUT = ("student_uncertain", "uncertain", "teacher_entropy_uncertain")
#: In a file or a pipe: seconds after which a line says that something goes on.
_PATIENCE = 60.0


def shown(text: str, style: str = "") -> Text:
    """A text from anywhere for the terminal: no markup, no emoji codes, and no character that a terminal obeys."""
    return Text(visible(text), style=style)


class Lasting:
    """A text stream that never raises: a run does not end because nobody reads, or because a disk is full.

    What the stream's encoding lacks is written as `?`. After the first failure nothing is written any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wraps a stream; None for one that was closed before the program began."""
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
        """Prepares the display without drawing."""
        self.console = console
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._curves = Text()
        self._phase: str | None = None
        self._seen: list[dict[str, Any]] = []
        self._decides = "tokens"
        self._times: Counter[str] = Counter()
        self._begun = self._said = 0.0

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

    def working(self, text: str) -> None:
        """Announces work that may take a while and reports no progress."""
        self.console.print(Text.assemble(shown(text, "dim"), (" ...", "dim")))

    def phase(self, text: str, done: int, total: int) -> None:
        """Shows the progress of an evaluation."""
        if self._phase != text:
            self.close()
            self._open(text, total)
            self._phase = text
            self._begun = time.monotonic()
            self._line(f"{text}: {done} of {total}")
        self._advance(done, "")
        if done >= total:
            self._line(f"{text}: {done} of {total} after {time.monotonic() - self._begun:,.0f} s")
            self.close()
        elif self._quiet():
            self._line(f"{text}: {done} of {total}")

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Updates the display after one batch of rollouts."""
        if self._phase is not None or self._live is None:
            self.close()
            self._open("distilling", steps)
        self._seen = [*self._seen, dict(metrics)][-_OVER:]
        self._times.update({key.removeprefix("time/"): metrics[key] for key in metrics if key.startswith("time/")})
        self._decides = next((name for name in _DECISIONS if name in metrics), self._decides)
        self._times["decisions"] += metrics.get(self._decides, 0)
        text = self._now(metrics)
        self._advance(step, text)
        if step in (1, steps) or step % max(1, steps // 10) == 0 or self._quiet():
            self._line(f"step {step}/{steps}  {text}")
        if step >= steps:
            self.close()
            self._time_by_part()

    def _now(self, metrics: Mapping[str, Any]) -> str:
        """The main curves, each averaged over recent steps, and the speed: all decisions over all seconds."""
        count = len(self._seen)
        parts = [f"{label} {form.format(self._mean(name))}" for name, label, form in _CURVES if name in metrics]
        decided, seconds = (sum(row.get(key, 0) for row in self._seen) for key in (self._decides, "time/step"))
        parts += [self._speed(decided, seconds)] if seconds else []
        over = "this step" if count == 1 else f"mean of the last {count} steps"
        means = f"{over}: {', '.join(parts)}" if parts else ""
        accuracies = [name for name in metrics if name.startswith("eval/avg@")]
        now = [f"held-out {name.removeprefix('eval/')} after this step: {metrics[name]:.1%}" for name in accuracies]
        return "; ".join([*([means] if means else []), *now])

    def _line(self, text: str) -> None:
        """Prints a line where no bar is drawn."""
        if not self.console.is_terminal:
            self._said = time.monotonic()
            self.console.print(shown(text), soft_wrap=True)

    def _quiet(self) -> bool:
        return time.monotonic() - self._said > _PATIENCE

    def _time_by_part(self) -> None:
        whole, decided = self._times.pop("step", 0.0), self._times.pop("decisions", 0)
        shares = {part: seconds / whole for part, seconds in self._times.items()} if whole else {}
        shares["everything else"] = shares.pop("other", 0.0)
        parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share >= 0.0005)
        words = _DECISIONS[self._decides]
        total = f" {whole:,.1f} s for {decided:,} {words} ({self._speed(decided, whole)})" if whole else ""
        self.console.print(f"time of the steps:{total}: {parts}", soft_wrap=True, highlight=False)
        self._times.clear()

    def _speed(self, decided: float, seconds: float) -> str:
        words = f"{_DECISIONS[self._decides]}/s"
        rate = decided / seconds
        return f"{rate:,.0f} {words}" if rate >= 10 else f"{rate:.2g} {words}"

    def table(self, results: Mapping[str, Any]) -> None:
        """The before/after table."""
        self.close()
        k, rows = results["k"], results["rows"]
        some = f", {results['graded']} of them graded" if "graded" in results else ""
        of = results.get("each", "completion")
        asked, each = counted(results["problems"], "held-out prompt"), counted(k, of)
        about = f"{asked}{some}, {each} each [95 % interval over prompts]"
        self.console.print(shown(about, "italic"), highlight=False)  # above it: a title breaks at the table's width
        table = Table()
        table.add_column("")
        for row in rows:
            table.add_column(shown(row["who"]), justify="right")
        for name in ordered([name for row in rows for name in row if name not in ("who", *_LEFT_OUT)]):
            cells = [row.get(name) for row in rows]
            words, unit, kind = measure(name, of)
            form = "{:.1%}" if kind == "share" else "{:z.1f}" if unit == "tokens" else "{:z.3f}"
            if any(cells):
                table.add_row(shown(f"{words}, {unit}" if unit else words), *(_cell(cell, form) for cell in cells))
        self.console.print(table)
        for who, count in results.get("given_up", {}).items():
            why = "because their comparison did not finish (docs/grading.md)"
            self.note(f"{who}: {count} completions count as wrong {why}")
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
    """Keeps the progress bars and advice of libraries out of ours.

    Among it is what torchao says when it is imported, which transformers does wherever it is installed: which of its
    kernels this machine does not run (models in fewer bits do without them), and what it asks of torch.
    """
    import logging as standard
    import warnings

    for name in ("torchao", "torch.utils._pytree"):
        standard.getLogger(name).setLevel(standard.ERROR)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr or not sys.stderr.isatty():  # a bar in a log is a line for each redrawing
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
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
        for cells in check.get("table", ()):
            # Columns of numbers, and a last one of words.
            text.append("\n" + "".join(f"{visible(cell):>8}" for cell in cells[:-1]) + f"  {visible(cells[-1])}")
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
    for column in ("predictor", "source", "right in the end", "makes the difference"):
        table.add_column(column)
    for row in found["predictors"]:
        table.add_row(
            shown(row["predictor"]),
            shown(row["claimed_by"]),
            *(Text(percent(row[name])) for name in ("viable", "helps")),
        )
    table.caption = ". ".join(why_unknown(found)) or None
    return table
