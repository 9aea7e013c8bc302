"""`retort.distill` in a cell of a notebook: by IPython within this process, and by a kernel of its own (slow)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from retort.console.progress import Brief, in_notebook, watching
from retort.train.events.observe import Silent


def cell(tiny_run: dict[str, Any], out: Path) -> str:
    """A cell that distils, and shows two numbers."""
    settings = {name: value for name, value in tiny_run.items() if name not in ("student", "teacher", "data", "steps")}
    return f"""
import retort
settings = {settings!r}
rows = [{{"prompt": f"{{n}} + 1 =", "answer": str(n + 1)}} for n in range(30)]
run = retort.distill(student={tiny_run["student"]!r}, teacher={tiny_run["teacher"]!r}, data=rows, steps=2,
                     out={str(out)!r}, settings=settings)
(run.step, len(run.metrics))
"""


def texts(outputs: list[dict[str, Any]]) -> list[str]:
    """What stands below a cell in the end: the last text of each place, in order."""
    places: dict[str, str] = {}
    for number, output in enumerate(outputs):
        name = (output.get("transient") or {}).get("display_id", f"place {number}")
        assert not output.get("update") or name in places, "an update of what was never shown"
        places[name] = output["data"]["text/plain"]
    return list(places.values())


def check(shown: list[str]) -> None:
    """One bar for each phase, written anew and not line after line; the table; the value of the cell."""
    assert [text.split(" ━")[0] for text in shown if "━━ " in text] == [
        *("evaluating the teacher", "evaluating the student", "distilling", "evaluating the student"),
    ]
    bar = next(text for text in shown if text.startswith("distilling"))
    assert f"{'━' * 24} 2/2" in bar
    assert "\n" not in bar
    assert not any(text.startswith("step 1/2") for text in shown)
    assert sum("student before" in text for text in shown) == 1
    assert shown[-1] == "(2, 2)"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """IPython as a kernel has it, without one; afterwards there is none."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # put back in the end
    made: Any = InteractiveShell.instance(display_pub_class=CapturingDisplayPublisher)
    made.history_manager.enabled = False
    made.kernel = object()
    yield made
    made.history_manager.end_session()
    InteractiveShell.clear_instance()


def test_a_cell_of_a_notebook_shows_bars_that_are_written_anew(
    shell: Any, tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert shell.run_cell(cell(tiny_run, tmp_path / "run")).result == (2, 2)
    assert capsys.readouterr().err == ""
    check([*texts(shell.display_pub.outputs), "(2, 2)"])


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel_of_its_own(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell(tiny_run, tmp_path / "run"))])
    where = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env={**os.environ, **where})
    shown = [
        output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        for output in notebook.cells[0].outputs
    ]
    check([text for text in shown if "Warning" not in text])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"].startswith("in memory: 30 rows")


def test_outside_of_a_notebook_it_prints_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert not in_notebook()
    with watching(None, quiet=False) as watcher:
        watcher.note("look \x1b[2J here")
    assert capsys.readouterr() == ("", "note: look \\x1b[2J here\n")
    with watching(None, quiet=True) as watcher:
        assert isinstance(watcher, Silent)
    mine = Silent()
    with watching(mine, quiet=True) as watcher:
        assert watcher is mine


def test_the_summary_is_one_line() -> None:
    console = Console(file=StringIO(), width=40, color_system=None)
    lines = {"student": "s", "teacher": "t", "method": "opd", "settings": "many", "data": "d", "memory": "1 GB"}
    Brief(console).summary(lines, ["a note"])
    assert console.file.getvalue() == "s; t; opd; d\nnote: a note\n"  # type: ignore[attr-defined]
