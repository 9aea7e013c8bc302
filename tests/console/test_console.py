"""What the console shows is labelled and true, and it answers at once."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from retort import config as configuration
from retort.cli import main
from retort.console.terminal import RichObserver, quiet_libraries
from retort.errors import RunError
from retort.report.groups import leaves
from retort.train import runner
from retort.train.events.interruptions import Interruptions
from retort.train.events.observe import Silent


def piped() -> tuple[RichObserver, io.StringIO]:
    file = io.StringIO()
    return RichObserver(Console(file=file, width=80)), file


def test_means_say_over_what_and_speed_is_all_tokens_over_all_seconds() -> None:
    observer, file = piped()
    for step, seconds in enumerate((1.0, 19.0), 1):
        # A mean of rates would be over 5 tokens/s, where the truth is 1.
        observer.step(step, 2, {"reverse_kl": 0.5 * step, "length": 20.0, "tokens": 10, "time/step": seconds})
    first, second, times = file.getvalue().splitlines()
    assert first == "step 1/2  this step: reverse KL 0.500 nats, length 20 tokens, 10 tokens/s"
    assert second == "step 2/2  mean of the last 2 steps: reverse KL 0.750 nats, length 20 tokens, 1 tokens/s"
    assert times.startswith("time of the steps: 20.0 s for 20 tokens (1 tokens/s): ")


def test_means_are_over_ten_steps_and_what_is_of_one_step_says_so() -> None:
    observer, file = piped()
    for step in range(1, 13):
        observer.step(step, 12, {"reward": float(step), "eval/avg@8": 0.25, "tokens": 1, "time/step": 1.0})
    last = file.getvalue().splitlines()[-2]
    assert "mean of the last 10 steps: reward 7.500" in last  # of 3 to 12
    assert "; held-out avg@8 after this step: 25.0%" in last


def test_a_pipe_hears_of_a_phase_when_it_begins() -> None:
    observer, file = piped()
    observer.working("reading [the] data")
    observer.phase("evaluating the teacher", 0, 64)
    assert file.getvalue() == "reading [the] data ...\nevaluating the teacher: 0 of 64\n"
    observer.phase("evaluating the teacher", 32, 64)
    observer.phase("evaluating the teacher", 64, 64)
    assert "evaluating the teacher: 64 of 64 after 0 s" in file.getvalue()


def test_shares_are_in_per_cent_and_all_else_has_its_unit() -> None:
    observer, file = piped()
    cell = {"value": 0.25, "low": None, "high": None}
    row = {"who": "student before", "reverse_kl": cell, "length": cell, "truncated": cell, "avg@2": cell}
    observer.table({"k": 2, "problems": 1, "rows": [row]})
    said = [[part.strip() for part in line.split("│")[1:3]] for line in file.getvalue().splitlines() if "│" in line]
    assert said == [
        ["avg@2", "25.0%"],
        ["length, tokens", "0.2"],
        ["completions cut at the limit", "25.0%"],
        ["reverse KL, all tokens, nats", "0.250"],
    ]


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated")]
)
def test_a_signal_is_answered_at_once_and_another_ends(number: signal.Signals, word: str) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), Interruptions(said.append) as asked:
        signal.raise_signal(number)
        assert (said, asked.by) == ([word], word)
        signal.raise_signal(number)
    assert said == [word]


def test_an_answer_that_cannot_be_written_is_no_error() -> None:
    def say(by: str) -> None:
        raise RuntimeError("reentrant call")

    with Interruptions(say) as asked:
        signal.raise_signal(signal.SIGINT)
    assert asked.by == "interrupted"


def test_a_second_signal_says_what_is_saved(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []

    class Impatient(Silent):
        def step(self, step: int, steps: int, metrics: object) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        def note(self, text: str) -> None:
            said.append(text)

    settings = configuration.merge(tiny_run, {"eval": {"problems": 0}})
    run = runner.start(configuration.resolve(settings), tmp_path / "run", Impatient())
    with pytest.raises(
        RunError, match=r"stopped at once in step 3; step-2 is its newest checkpoint, go on with: .*run"
    ):
        run.go()
    assert "interrupted: finishing step 3, then saving" in said[-1]
    assert runner.resume(tmp_path / "run").step == 2


@pytest.mark.slow
def test_a_real_process_in_a_pipe(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Phases arrive while they are under way, an interrupt is answered before the step ends, and no bar is in a log."""
    settings = leaves(configuration.merge(tiny_run, {"steps": 500, "checkpoint": {"every": 0}}))
    words = [f"{name}={json.dumps(value) if isinstance(value, bool) else value}" for name, value in settings.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "retort", "train", *words, f"out={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    heard = [process.stdout.readline().strip()]
    assert heard == ["reading the data and loading the models ..."]
    while not heard[-1].startswith("step 1/500"):
        heard.append(process.stdout.readline().strip())
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert any(line.startswith("evaluating the teacher: 0 of 4") for line in heard)
    assert "note: interrupted: finishing step" in said
    assert process.returncode == 1
    assert complaint.startswith("retort: interrupted at step") and len(complaint.splitlines()) == 1


def test_cite_takes_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", "opd", "eopd"]) == 0
    assert capsys.readouterr().out.count("@") == 2
    assert main(["cite", "opd", "eodp"]) == 2


def test_what_torchao_says_when_it_is_imported_is_no_news_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).warning("Failed to load a kernel of another machine")
        logging.getLogger(name).error("this is broken")
    assert [record.getMessage() for record in caplog.records] == ["this is broken"] * 2
