"""The default display of `retort.distill`: lines or a bar on standard error, in a notebook a bar below the cell."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live

from retort.console.terminal import RichObserver, lasting_console, shown
from retort.errors import visible
from retort.train.events.observe import Observer, Silent

#: Characters of the bar in a notebook.
_BAR = 24


class Brief(RichObserver):
    """Draws a run without its summary: one line of progress, and the notes."""

    def summary(self, lines: Mapping[str, str], notes: list[str]) -> None:
        """The start-up summary, in one line."""
        said = [lines[name] for name in ("student", "teacher", "method", "data", "run") if name in lines]
        self.console.print(shown("; ".join(said)), soft_wrap=True)
        for text in notes:
            self.note(text)


class Notebook(Brief):
    """Draws a run below the cell of a notebook: one line that is written anew, without widgets."""

    def __init__(self) -> None:
        """Prepares the display without drawing."""
        # A terminal to the base class, which prints a line now and then to whatever cannot be redrawn.
        super().__init__(Console(force_jupyter=True, force_terminal=True, width=100))
        self._handle: Any = None
        self._text, self._total = "", 0

    def _open(self, text: str, total: int) -> None:
        self._text, self._total = text, total
        display = importlib.import_module("IPython.display").display
        self._handle = display(_line(text, 0, total, ""), raw=True, display_id=True)
        self._live = Live(console=self.console)  # never started: by it `step` and `close` know that there is a bar

    def _advance(self, done: int, curves: str) -> None:
        if self._handle is not None:
            self._handle.update(_line(self._text, done, self._total, curves), raw=True)


def _line(text: str, done: int, total: int, curves: str) -> dict[str, str]:
    filled = _BAR * done // max(1, total)
    return {"text/plain": visible(f"{text} {'━' * filled}{'─' * (_BAR - filled)} {done}/{total}  {curves}".rstrip())}


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    if "IPython" not in sys.modules:  # Without IPython there is no notebook.
        return False
    return getattr(importlib.import_module("IPython").get_ipython(), "kernel", None) is not None


@contextlib.contextmanager
def watching(observer: Observer | None, *, quiet: bool) -> Iterator[Observer]:
    """Chooses the observer of a run: the caller's, a silent one, or the one that suits a notebook or a terminal."""
    if observer is not None or quiet:
        yield observer or Silent()
        return
    drawn = Notebook() if in_notebook() else Brief(lasting_console(sys.stderr))
    try:
        yield drawn
    finally:
        drawn.close()


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Within, transformers draws no bars of its own and gives no advice; afterwards it does what it did before."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
