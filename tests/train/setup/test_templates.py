"""How a whole run reads its prompts: said by doctor, fixed at its start, refused where they are no prompts."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CHATML, make_model, make_tokenizer
from trained import trained

from retort import api
from retort import config as configuration
from retort.align.chat import Renderer, TemplateOptions
from retort.cli.evaluation import _READ, evaluate  # pyright: ignore[reportPrivateUsage]
from retort.config import Config
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.preflight import checks
from retort.preflight.doctor import examine
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.output.identity import identity
from retort.train.setup import templates
from retort.train.setup.prepare import Prepared, prepare

THINKING = CHATML.replace(
    "assistant {% endif %}", "assistant {% if enable_thinking is false %}the answer is{% endif %}{% endif %}"
)
DATED = "{{ strftime_now('%d') }}" + CHATML
SILENT = CHATML.replace("if add_generation_prompt", "if false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A model folder with a chat template, one per seed and template."""
    made: dict[tuple[int, str | None], Path] = {}

    def make(seed: int, template: str | None) -> str:
        if (seed, template) not in made:
            found = make_model(tmp_path_factory.mktemp("model"), seed=seed)
            tokenizer = make_tokenizer()
            tokenizer.chat_template = template
            tokenizer.save_pretrained(found)
            made[seed, template] = found
        return str(made[seed, template])

    return make


def config_of(settings: dict[str, Any], folder: Callable[..., str], ours: str, theirs: str, **more: Any) -> Config:
    pair = {"student": folder(1, ours), "teacher": folder(2, theirs)}
    return api.assemble(configuration.merge({**settings, **pair, "method": {"name": "opd"}}, more))


def text(setup: Prepared, row: int = 0) -> str:
    return str(setup.student.tokenizer.decode(setup.source.render(setup.source.prompts[row]).ids))


def test_thinking_is_not_passed_unless_set_and_said(tiny_run: dict[str, Any], folder: Callable[..., str]) -> None:
    ends = {}
    for thinking in (None, False, True):
        setup = prepare(config_of(tiny_run, folder, THINKING, CHATML, rollout={"thinking": thinking}))
        ends[thinking] = text(setup).endswith("the answer is")
        teacher = setup.teachers.models["teacher"].render(setup.source.prompts[0])  # type: ignore[attr-defined]
        assert not setup.student.tokenizer.decode(teacher.ids).endswith("the answer is")
        way = "off" if thinking is False else "on"
        said = f"is {way} for the student, unknown to the teacher's template"
        assert [said in note for note in setup.notes].count(True) == 1
        check = checks.check_prompts(setup)
        assert check.verdict == "ok"
        assert said in check.saw
        assert ("ids to both" in check.saw) == (thinking is not False)
        assert ("ids to the teacher" in check.saw) == (thinking is False)
    assert ends == {None: False, False: True, True: False}
    # What a run of an earlier version wrote down keeps its meaning.
    assert configuration.resolve({"rollout": {"thinking": False}}).rollout.template_options.thinking is False


def test_doctor_shows_a_prompt_on_one_line(tiny_run: dict[str, Any], folder: Callable[..., str]) -> None:
    setup = prepare(config_of(tiny_run, folder, CHATML, CHATML))
    check = checks.check_prompts(setup)
    count = len(setup.source.render(setup.source.prompts[0]).ids)
    assert f"row '{setup.source.prompts[0].id}' is {count} ids to both: \"<|im_start|>" in check.saw
    assert "<|im_end|>" in check.saw
    assert "\n" not in check.saw
    assert checks.check_prompt_ends(setup).saw == "completions begin after '<|im_start|>assistant'"


@pytest.mark.parametrize("silent", ["student", "teacher"])
def test_a_template_that_begins_no_answer_is_refused(
    silent: str, tiny_run: dict[str, Any], folder: Callable[..., str], tmp_path: Path
) -> None:
    ours, theirs = (SILENT if who == silent else CHATML for who in ("student", "teacher"))
    run = runner.start(config_of(tiny_run, folder, ours, theirs, checks="refuse"), tmp_path / "run")
    found = checks.check_prompt_ends(run.prepared)
    assert found.verdict == "fatal"
    assert f"the {silent}'s chat template" in found.saw
    assert "'<|im_start|>assistant'" in found.saw
    with pytest.raises(UserError, match="prompt's end: .*ignores add_generation_prompt.*chat_template.jinja"):
        api.check(run)


def test_a_student_that_teaches_itself_is_looked_at_too(tiny_run: dict[str, Any], folder: Callable[..., str]) -> None:
    alone = {key: value for key, value in tiny_run.items() if key != "teacher"}
    config = api.assemble({**alone, "student": folder(1, SILENT), "method": {"name": "opsd"}})
    assert examine(config, quick=True)["prompt's end"].verdict == "fatal"


def test_a_run_keeps_its_day(
    tiny_run: dict[str, Any], folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "today", lambda: "2001-02-13")
    config = config_of(tiny_run, folder, DATED, CHATML)
    first = prepare(config)
    assert first.config.rollout.date == "2001-02-13"
    assert text(first).startswith("13")
    assert any("student writes today's date: it stays 2001-02-13" in note for note in first.notes)
    monkeypatch.setattr(templates, "today", lambda: "2001-02-14")
    again = prepare(first.config)
    assert text(again) == text(first)
    assert identity(again)["digests"] == identity(first)["digests"]
    assert identity(prepare(config))["digests"] != identity(first)["digests"], "else there was nothing to keep"
    # Where no template writes it, nothing is written down.
    assert prepare(config_of(tiny_run, folder, CHATML, CHATML)).config.rollout.date is None


def test_a_day_is_a_day() -> None:
    for given in ("2001-02-03", datetime.date(2001, 2, 3)):
        assert configuration.resolve({"rollout": {"date": given}}).rollout.date == "2001-02-03"
    assert configuration.resolve(configuration.overrides(["rollout.date=2001-02-03"])).rollout.date == "2001-02-03"
    for given in ("tomorrow", "2001-02-30", 20010203, datetime.datetime(2001, 2, 3)):
        with pytest.raises(UserError, match=r"rollout.date: must be a day such as 2026-11-29"):
            configuration.resolve({"rollout": {"date": given}})


def rows(tmp_path: Path, *prompts: str) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts))
    return str(file)


RENDERED = "<|im_start|>user 1 + 2<|im_end|><|im_start|>assistant "


def test_prompts_that_were_rendered_before_are_refused_or_taken(
    tiny_run: dict[str, Any], folder: Callable[..., str], tmp_path: Path
) -> None:
    template = CHATML.replace("{{ message.role }} ", "user ")  # its only words for a turn, so that they are found
    data = {"data": rows(tmp_path, "1 + 2", RENDERED, "3 + 4"), "eval": {"problems": 0}}
    with pytest.raises(UserError, match=r"1 of 3 prompts look rendered already.*rollout.rendered=true"):
        prepare(config_of(tiny_run, folder, template, CHATML, **data))
    setup = prepare(config_of(tiny_run, folder, template, CHATML, **data, rollout={"rendered": True}))
    for row, given in enumerate(("1 + 2", RENDERED, "3 + 4")):
        for read in (setup.source.render, setup.teachers.models["teacher"].render):  # type: ignore[attr-defined]
            assert read(setup.source.prompts[row]).ids == setup.student.tokenizer.encode(given)
    assert checks.check_prompt_ends(setup).verdict == "ok"


def test_a_view_cannot_add_to_a_rendered_prompt(tiny_run: dict[str, Any]) -> None:
    settings = {**tiny_run, "method": {"name": "opsd"}, "rollout": {**tiny_run["rollout"], "rendered": True}}
    settings.pop("teacher")
    with pytest.raises(UserError, match=r"rollout.rendered: the view 'teacher' of method 'opsd'"):
        prepare(api.assemble(settings))


def test_control_tokens_in_prompts_are_a_finding_and_said_once(
    tiny_run: dict[str, Any], folder: Callable[..., str], tmp_path: Path
) -> None:
    data = {"data": rows(tmp_path, "1 + 2", "is <|im_end|> so"), "eval": {"problems": 0}}
    run = runner.start(config_of(tiny_run, folder, CHATML, CHATML, **data), tmp_path / "run")
    check = checks.check_prompts(run.prepared)
    assert check.verdict == "warn"
    assert "1 control tokens of the student (<|im_end|>)" in check.saw
    api.check(run)
    assert sum("control tokens" in note for note in run.prepared.notes) == 1


def test_eval_takes_the_settings_that_say_how_prompts_are_read() -> None:
    assert {f"rollout.{field.name}" for field in dataclasses.fields(TemplateOptions)} <= _READ


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_eval_reads_alike_and_says_the_same(
    prompts_file: Path, folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "today", lambda: "2001-02-13")
    template = DATED.replace("if add_generation_prompt", "if false")
    small = ["task=exact", "precision=fp32", "samples=1", "problems=2", "max_new_tokens=2"]
    for more, day in (([], "2001-02-13"), (["rollout.date=2001-02-14"], "2001-02-14")):
        seen = Notes()
        evaluate(folder(1, template), str(prompts_file), None, [*small, *more], seen)
        said = " | ".join(seen.said)
        assert f"stays {day}" in said
        assert "the model's chat template is at fault: it ignores add_generation_prompt" in said


def test_one_text_in_two_tokenizers_is_no_other_template() -> None:
    prompts = [Prompt("0", (Message("user", "the quick brown fox"),))]

    def notes(other: str) -> list[str]:
        readers = {"student": Renderer(trained("gemma")), "teacher": Renderer(trained(other))}
        assert readers["student"](prompts[0]) != readers["teacher"](prompts[0])
        found: list[str] = []
        templates.check_prompts(Config(), prompts, [], readers, found)
        return found

    assert not notes("byte-level")
    prompts[:] = [Prompt("0", (Message("user", "The Quick"),))]
    assert any("1 of 1 prompts read differently" in note for note in notes("bert"))
