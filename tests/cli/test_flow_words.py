"""What is said where a flow model, its settings or its data are given to what is about text, or the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
from flowing import planes, settings

from retort import config as configuration
from retort.cli.commands import main
from retort.core.needs import SAMPLED
from retort.errors import UserError
from retort.flows.load import open_flow
from retort.train import runner
from retort.train.given.given import going_on

PLANE = ["--data", "plane", "steps=1", "eval.problems=0"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval", "countdown:student", "--data", "plane"], "'plane' is for flow models, and countdown:student is none"),
        (
            ["eval", "countdown:student", "--data", "countdown", "flow.steps=4"],
            "flow.steps is for flow models, and countdown:student is none that can be opened; name a folder such as",
        ),
        (["score", "--cache", "kept", "plane"], "retort score stores scores of tokens, and this student decides"),
        (["serve", "plane:moons"], "a flow model, which denoises and makes no text; name a model of text"),
        (
            ["train", "--data", "countdown", "flow.steps=4", "--out", "run"],
            "flow.steps is for students that decide denoising steps, and countdown:student decides tokens",
        ),
        (
            ["train", *PLANE, "--out", "run", "flow.rewards=[on_shape]"],
            """flow.rewards: it must be a list, such as '["one","two"]' on a command line (it is '[on_shape]')""",
        ),
        (
            ["train", *PLANE, "--out", "run", 'flow.rewards=["json:__doc__"]'],
            "that is a str; name a function of samples and prompts",
        ),
    ],
    ids=["data", "setting", "score", "serve", "text student", "list", "no function"],
)
def test_the_line_says_which_kind_is_wanted(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert line in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_text_model_is_no_flow_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="^teacher .*: no flow model is in that folder: neither model_index.json"):
        open_flow(tmp_path, role="teacher")


def test_a_summary_and_the_way_to_go_on_have_the_words_of_denoising(tmp_path: Path) -> None:
    planes(tmp_path)
    run = runner.start(configuration.resolve(settings(tmp_path, steps=1)), tmp_path / "run")
    assert "log-prob of the next latent" in run.output.summary()["asked of teacher"] and "token" in str(SAMPLED)
    config = configuration.resolve(settings(tmp_path, student="in memory: student"))
    assert "student=model)" in going_on(config, tmp_path, run.output.example)
