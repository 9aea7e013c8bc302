"""Comparisons that found no end are counted and said, by the judge, the table and the page."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_page import Page
from rich.console import Console

from retort import config as configuration
from retort.console.terminal import RichObserver
from retort.core.rollouts import Prompt
from retort.report import build_report
from retort.rewards import ByText, ExactVerifier, MathVerifier
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.output.text import TextOutput, token_parts


class Endless(MathVerifier):
    """Gives every comparison up by its form."""

    def __call__(self, prompt: Prompt, text: str) -> float:
        return super().__call__(replace(prompt, answer="1"), r"\boxed{9^{9^{9}}}")


def test_a_run_says_how_many_comparisons_found_no_end(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    run = runner.start(configuration.resolve(tiny_run | {"steps": 2}), tmp_path / "run", Noting())
    parts = token_parts(run.output, "this test")
    run.output = TextOutput(replace(parts, eval_grader=ByText(Endless())))
    parts.source.grader = ByText(Endless())
    run.go()
    assert [row["given_up"] for row in run.metrics] == [4, 4]
    assert [note for note in said if "did not finish" in note] == [
        "step 1: 4 completions count as wrong because their comparison with the right answer did not finish "
        "(curve given_up; docs/grading.md)"
    ]
    assert run.results["given_up"] == {"student before": 8, "student after": 8, "teacher": 8}
    file = io.StringIO()
    RichObserver(Console(file=file, width=200)).table(run.results)
    assert "teacher: 8 completions count as wrong because their comparison did not finish" in file.getvalue()
    page = Page(build_report([run.folder]))
    assert "24 completions count as wrong because their comparison did not finish" in page.text
    assert page.plots()["Comparisons given up"]["series"][0]["y"] == [4, 4]


@pytest.mark.parametrize("verifier", [ExactVerifier(), lambda prompt, text: 1.0])
def test_whoever_gives_nothing_up_counts_none(verifier: Any) -> None:
    assert ByText(verifier).given_up == 0
