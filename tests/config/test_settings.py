"""Settings: each is listed with its words and bounds, names from elsewhere lead to ours, and the user's word counts."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from retort import registry
from retort.cli import main
from retort.cli.reference import chosen, field_for, limits, method_settings, page
from retort.config import Config, keys, resolve
from retort.config.precedence import FOLLOWS, flat
from retort.config.synonyms import ELSEWHERE, ours_for
from retort.core.numbers import number_problem
from retort.core.steps import Clock
from retort.errors import UserError
from retort.models.described import Described
from retort.models.files import _wrong_with
from retort.train.learning.rates import Rates
from retort.train.setup.before import fit_lengths, fit_steps, paper_settings
from retort.train.setup.templates import Extremes

ROOT = Path(__file__).parents[2]


def _fields(section: type[BaseModel] = Config, before: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that `retort.config` knows, by another way than `keys`."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{before}{name}.")
        else:
            yield f"{before}{name}", field


# --- every setting is listed ---


def test_every_setting_is_listed_with_its_default_and_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    listed = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    known = dict(_fields())
    assert list(listed) == list(known)
    for key, field in known.items():
        assert len(listed[key]["what"]) >= 12, f"{key} has no description"
        assert listed[key]["kind"] != "see what it is", key
        default = field.get_default(call_default_factory=True)
        assert listed[key]["default"] == default
        late = default == "auto" or (default is None and "default: " in field.description)
        assert listed[key]["origin"] == ("start" if late else "default")
        if default is None:
            assert "default: " in field.description or "null" in field.description or key in ("student", "data"), key


def test_the_page_of_settings_is_what_the_command_writes() -> None:
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == page(), "write it again: retort settings --markdown > docs/settings.md"
    for key, _ in _fields():
        assert f"| `{key}` |" in written


def test_a_papers_settings_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    for name in registry.names():
        found = {one.key: one for one in chosen(None, name)}
        recipe = flat(registry.load(name).recipe)
        assert {key for key, one in found.items() if one.origin == "paper"} == set(recipe)
        assert all(found[key].default == value for key, value in recipe.items())
        assert {f"method.{own}" for own in registry.defaults(name)} <= set(found)
    assert main(["settings", "eval", "--method", "eopd"]) == 0
    said = capsys.readouterr().out
    assert "eval.top_p = 0.8 (of the paper of eopd)" in said
    assert "rollout.prompts" not in said


@pytest.mark.parametrize("name", registry.names())
def test_settings_of_methods_have_words_and_kinds(name: str) -> None:
    for one in method_settings(name):
        assert one.what, one.key
        assert one.kind != "see what it is", one.key


def test_sections_and_single_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert [one.key for one in chosen("lora.rank")] == ["lora.rank"]
    assert {one.key for one in chosen("run")} == {key for key in keys() if "." not in key}
    assert chosen("method") == method_settings(str(resolve().method["name"]))
    assert main(["settings", "optimzer"]) == 2
    assert "did you mean 'optimizer'" in capsys.readouterr().err
    assert main(["settings", "lr"]) == 2
    assert "optimizer.learning_rate" in capsys.readouterr().err


# --- names from elsewhere ---

TYPED = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "batch_size": "rollout.prompts",
    "per_device_train_batch_size": "rollout.prompts",
    "gradient_accumulation_steps": "optimizer.batch_tokens",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "max_length": "rollout.max_prompt_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "temperature": "method.temperature",
    "beta": "method.teacher_weight",
    "lmbda": "method.on_policy_fraction",
    "bf16": "precision",
    "fp16": "precision",
    "warmup_steps": "optimizer.warmup",
    "warmup_ratio": "optimizer.warmup",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.grad_clip",
    "num_generations": "method.samples",
    "output_dir": "out",
    "logging_steps": "metrics.jsonl",
    "eval_steps": "eval.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "report_to": "tracker",
    "teacher_model_name_or_path": "teacher",
    "model_name_or_path": "student",
    "dataset": "data",
    "epochs": "steps",
    "chat_template_kwargs.enable_thinking": "rollout.thinking",
    "chat_template_kwargs.greeting": "rollout.thinking",
    "log_completions": "record.rollouts",
    "seq_kd": "cold_start.steps",
    "eval_strategy": "eval.every",
    "deepspeed": "one device",
    "use_vllm": "rollout.engine",
    "use_liger_kernel": "nothing is to be set",
    "load_in_4bit": "lora.rank",
    "kl_coef": "method",
    # below a name that is a single setting here
    "data.train_batch_size": "rollout.prompts",
    "data.train_files": "data",
    "data.max_prompt_length": "rollout.max_prompt_tokens",
    "student.path": "student is one setting",
    "teacher.name": "teacher",
    "model.path": "student",
    "actor_rollout_ref.model.path": "student",
    "algorithm.adv_estimator": "method",
    "distillation.enabled": "nothing is to be set",
    "distillation.teacher_models.first.model_path": "teacher",
    "actor_rollout_ref.rollout.val_kwargs.n": "eval.samples",
    # sections of other systems, and ours in the wrong place
    "trainer.lr": "optimizer.learning_rate",
    "actor_rollout_ref.actor.optim.lr": "optimizer.learning_rate",
    "actor_rollout_ref.rollout.n": "method.samples",
    "rollout.learning_rate": "optimizer.learning_rate",
    "method.lr": "optimizer.learning_rate",
    "every": "checkpoint.every",
    "entropy_threshold": "method.entropy_threshold",
}


@pytest.mark.parametrize("name", list(TYPED))
def test_a_name_of_another_trainer_leads_to_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"{name}=1", "--out", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(rf"{re.escape(name.removeprefix('method.'))}'.*\b{re.escape(TYPED[name])}\b", said), said


def test_an_option_of_another_trainer_leads_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for words, ours in (
        (["train", "--lr", "1e-5"], "optimizer.learning_rate"),
        (["train", "--learning-rate=3"], "optimizer.learning_rate"),
        (["doctor", "--per_device_train_batch_size", "3"], "rollout.prompts"),
        (["train", "--output_dir", "x"], "here it is out"),
    ):
        assert main(words) == 2
        assert ours in capsys.readouterr().err


def test_a_setting_outside_its_section_leads_there() -> None:
    """Whatever a setting is called, its bare name leads to it, unless another trainer means something else by it."""
    for key in keys():
        last = key.rpartition(".")[2]
        if "." in key and last not in Config.model_fields and last not in ELSEWHERE:
            with pytest.raises(UserError, match=re.escape(key)):
                resolve({last: 1})


def test_what_names_lead_to_is_there() -> None:
    known = {*keys(), *(f"method.{own}" for name in registry.names() for own in registry.defaults(name))}
    for name, ours in ELSEWHERE.items():
        assert set(ours.settings) <= known, name
        assert ours.settings or ours.how, name
        assert name not in keys(), f"{name} is a setting of ours"
    assert ours_for("stepz", known) is None


@pytest.mark.parametrize("word", ["gradual", "zeropoint", "warehouse", "student_x_ray_path", "hosts"])
def test_a_name_that_is_like_none_is_no_slip_of_one(word: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve({word: 1})
    assert "did you mean" not in str(refused.value) and "known: " in str(refused.value)


@pytest.mark.parametrize(
    ("slip", "meant"), [("sed", "seed"), ("stpes", "steps"), ("teachr", "teacher"), ("ouy", "out")]
)
def test_a_slip_is_taken_for_what_was_meant(slip: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        resolve({slip: 1})


@pytest.mark.parametrize("word", ["lora=true", "eval=false", "rollout=3", "optimizer=adamw"])
def test_a_section_is_no_value(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", word, "--out", "nowhere"]) == 2
    assert f"{word.partition('=')[0]} is a section: give its settings (" in capsys.readouterr().err


# --- bounds ---


def _numeric() -> list[str]:
    kinds = {"whole number", "number", "whole number or null", "number or null"}
    return [one.key for one in chosen(None) if one.kind in kinds]


def _accepted(key: str, value: object) -> object:
    """What a setting becomes of a value, or `ValidationError` where it is refused."""
    section, _, name = key.rpartition(".")
    # An adapter's scale does nothing without an adapter, which is refused by itself.
    besides = {"rank": 8} if key == "lora.alpha" else {}
    given = {name: value, **besides}
    return Config.model_validate({section: given} if section else given).value(key)


def test_every_number_has_bounds() -> None:
    assert len(_numeric()) > 30
    for key in _numeric():
        assert limits(field_for(key))[1] or key == "lora.dropout", key


@pytest.mark.parametrize("key", _numeric())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    value=st.one_of(
        st.integers(),
        st.integers(-(10**40), 10**40),
        st.integers(-3, 3),
        st.floats(),
        st.sampled_from([1e-320, -0.0, 10**400, 2**63, -(2**63), 1e300, 0.5, 1.0, math.inf, math.nan]),
    )
)
def test_a_number_is_taken_if_and_only_if_it_lies_within_the_bounds(key: str, value: float) -> None:
    field = field_for(key)
    whole = field.annotation is int or int in getattr(field.annotation, "__args__", ())
    try:
        taken: Any = _accepted(key, value)
    except ValidationError:
        taken = None
    fits = limits(field)[0]
    number = (isinstance(value, int) and whole) or math.isfinite(float_of(value))
    computable = number and (key == "seed" or number_problem(int(value) if whole else float_of(value)) is None)
    expected = computable and (not whole or value == int(value)) and fits(value)
    if key == "lora.dropout":
        expected = expected and value == 0
    assert (taken is not None) == bool(expected), (key, value, taken)


def test_a_number_that_could_only_hang_is_refused() -> None:
    """One setting builds something for each of its count, so the bound of all numbers does not bound it."""
    with pytest.raises(UserError, match="contexts must be at most"):
        registry.load("unisd", contexts=10**9)


def test_what_corrects_for_an_engine_is_a_setting() -> None:
    glossary = (ROOT / "docs" / "concepts.md").read_text().splitlines()
    (row,) = [line for line in glossary if line.startswith("| `engine_logp` |")]
    named = set(re.findall(r"`(\w+)`", row)) - {"engine_logp", "old_logp"}
    assert named and all(any(own in registry.defaults(name) for name in registry.names()) for own in named)


def float_of(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf * (1 if value > 0 else -1)


# --- the user's word counts before the paper's ---


def test_every_papers_settings_are_ours() -> None:
    for name in registry.names():
        assert set(flat(registry.load(name).recipe)) <= set(keys()), name
    assert {*FOLLOWS, *FOLLOWS.values()} <= set(keys())


@pytest.mark.parametrize("name", registry.names())
def test_a_papers_evaluation_is_no_longer_than_what_the_user_gives(name: str) -> None:
    paper = flat(registry.load(name).recipe)
    untouched = resolve({"method": {"name": name}})
    assert all(untouched.value(key) == value and not untouched.set_by_user(key) for key, value in paper.items())
    short = resolve({"method": {"name": name}, "rollout": {"max_new_tokens": 32}})
    assert short.set_by_user("rollout.max_new_tokens")
    assert (short.rollout.max_new_tokens, short.eval.max_new_tokens) == (32, None)
    both = resolve({"method": name, "rollout": {"max_new_tokens": 32}, "eval": {"max_new_tokens": 64}})
    assert (both.rollout.max_new_tokens, both.eval.max_new_tokens) == (32, 64)
    again = resolve(short.model_dump(exclude={"method", "own_method"}), {"method": name})
    assert again == short
    assert all(again.set_by_user(key) for key in keys() if key not in ("method", "own_method"))


def _described(context: int, **more: Any) -> Described:
    from transformers import Qwen3Config

    config = Qwen3Config(max_position_embeddings=context, **more)
    return Described("m", None, config)  # type: ignore[arg-type]


def _read(tokens: int) -> dict[Any, Extremes]:
    return {"student": Extremes((tokens, "a"), (tokens + 2, "b"))}


def test_lengths_that_nobody_gave_are_made_to_fit() -> None:
    notes: list[str] = []
    small: Mapping[Any, Described] = {"student": _described(128)}
    fitted = fit_lengths(resolve({"method": "eopd"}), small, _read(20), notes)
    assert (fitted.rollout.max_new_tokens, fitted.eval.max_new_tokens) == (108, 106)
    assert not fitted.set_by_user("rollout.max_new_tokens")
    assert len(notes) == 2 and "row 'b', 22 tokens" in notes[1] and "context of 128" in notes[1]
    # Of the two that read, the one that holds less counts; a default is nobody's either.
    two: Mapping[Any, Described] = {"student": _described(8192), "teacher": _described(1000)}
    read = {**_read(20), "teacher": Extremes((30, "a"), (30, "b"))}
    assert fit_lengths(resolve({"method": "rlsd"}), two, read, []).rollout.max_new_tokens == 970
    # What fits stays, and nothing is said.
    large, quiet = resolve({"method": "eopd"}), list[str]()
    assert fit_lengths(large, {"student": _described(40960)}, _read(20), quiet) is large
    assert quiet == []


def test_lengths_of_the_user_are_refused_where_they_do_not_fit() -> None:
    for section, ours in (("rollout", "rollout.max_new_tokens"), ("eval", "eval.max_new_tokens")):
        own = resolve({"method": "eopd", section: {"max_new_tokens": 120}})
        with pytest.raises(UserError, match=f"and 120 new ones exceed the student's context of 128; lower {ours}"):
            fit_lengths(own, {"student": _described(128)}, _read(20), [])
    with pytest.raises(UserError, match="128 prompt tokens and 4096 new ones"):
        fit_lengths(resolve({"method": "eopd"}), {"student": _described(128)}, _read(128), [])
    # Training answers may be longer than held-out prompts allow, if held-out answers are not.
    own = resolve({"rollout": {"max_new_tokens": 107}, "eval": {"max_new_tokens": 8}})
    assert fit_lengths(own, {"student": _described(128)}, _read(21), []) is own


def test_a_context_that_yarn_stretches_is_named_with_its_remedy() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    stretched = _described(32, rope_parameters=rope)
    assert (stretched.context, stretched.reach) == (32, 128)
    own = resolve({"rollout": {"max_new_tokens": 40}})
    with pytest.raises(UserError, match="raise max_position_embeddings in the student's config.json to 128"):
        fit_lengths(own, {"student": stretched}, _read(4), [])
    assert _described(128, rope_parameters=rope).reach is None
    assert _described(128).reach is None


def _fit(sections: dict[str, Any], method: str, prompts: int = 64, cold: int = 0) -> tuple[Config, list[str]]:
    from retort.methods._cold_start import with_cold_start

    notes: list[str] = []
    config, made = resolve({"method": method}, sections), registry.load(method)
    if cold:
        made = with_cold_start(made, cold, loss="sft", answers="teacher", attempts=1)
    return fit_steps(config, made, prompts, notes), notes


def test_a_warm_up_that_the_run_does_not_outlast() -> None:
    papers, said = _fit({"steps": 5}, "sdpo")
    assert (papers.optimizer.warmup, len(said)) == (0, 1)
    kept, quiet = _fit({"steps": 11}, "sdpo")
    assert (kept.optimizer.warmup, quiet) == (10, [])
    own, notes = _fit({"steps": 3, "optimizer": {"warmup": 100, "updates": 1}}, "opd")
    assert own.optimizer.warmup == 100
    assert "gets to 3% of optimizer.learning_rate" in notes[0]
    phase, of_the_phase = _fit({"steps": 300, "optimizer": {"warmup": 100, "updates": 1}}, "opd", cold=50)
    assert phase.optimizer.warmup == 100
    assert len(of_the_phase) == 1 and "50 optimizer steps" in of_the_phase[0]


def test_a_papers_steps_leave_room_for_a_cold_start() -> None:
    config, notes = _fit({"rollout": {"prompts": 1}}, "dopd", prompts=500, cold=250)
    assert config.steps is None and len(notes) == 1
    with pytest.raises(UserError, match="leaves none of the run's 200"):
        _fit({"steps": 200}, "dopd", prompts=500, cold=250)
    assert _fit({}, "dopd", cold=100)[0].steps == 200


def test_a_run_says_what_it_takes_from_the_paper() -> None:
    (said,) = paper_settings(resolve({"method": "eopd"}, {"optimizer": {"updates": 2}}), registry.load("eopd"))
    assert "eval.top_p=0.8" in said and "eval.max_new_tokens=8192" in said and "updates" not in said
    assert "2603.07079" in said
    everything = resolve(resolve({"method": "eopd"}).model_dump(exclude={"method"}), {"method": "eopd"})
    assert paper_settings(everything, registry.load("eopd")) == []


def _at(schedule: str, *, warmup: int = 0) -> Rates:
    config = resolve({"optimizer": {"schedule": schedule, "warmup": warmup, "updates": 1}})
    return Rates(config.optimizer, 1.0, rollouts=4)


def test_a_learning_rate_that_rises_on_resume_is_said() -> None:
    cosine = _at("cosine")
    said = cosine.rise(Clock(4, 8), begun=0, updates=4, steps=4)
    assert said is not None and "rises from" in said and "which had 4 steps and has 8 now" in said
    assert cosine.rise(Clock(4, 8), begun=0, updates=4, steps=8) is None
    assert _at("constant").rise(Clock(4, 8), begun=0, updates=4, steps=4) is None
    assert _at("cosine", warmup=6).rise(Clock(4, 8), begun=0, updates=4, steps=4) is None


# --- what needs no weights is said before any are loaded ---

EARLY: dict[str, tuple[list[str], str]] = {
    "length": (["rollout.max_new_tokens=128"], "context of 128; lower rollout.max_new_tokens"),
    "evaluated": (["rollout.max_new_tokens=6", "eval.max_new_tokens=128"], "lower eval.max_new_tokens"),
    "prompt": (["rollout.max_prompt_tokens=1"], "more than rollout.max_prompt_tokens = 1"),
    "tracker": (["tracker=wandb"], "pip install 'wandb'"),
    "adapter": (["lora.rank=4"], "lora.rank needs peft"),
    "cold start": (["cold_start.steps=3"], "leaves none of the run's 1"),
    "stop": (["rollout.stop=['nope']"], "rollout.stop: 'nope'"),
    "device": (["device=cuda"], "torch sees no CUDA device"),
    "template": (["rollout.max_new_tokens=6", "columns.prompt=nothing"], "nothing"),
    "tokenizers": (["--teacher", "other", "method.name=eopd"], "ids disagree"),
    "teacher": (["--teacher", "empty"], "no config.json"),
    "ordinary stop": (["--student", "stops"], "rollout.stop"),
    "nothing": (["rollout.max_new_tokens=6"], "cannot be loaded: SafetensorError"),
}


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], prompts_file: Path) -> Path:
    """Folders of models whose weights are garbage: whoever reads them says so."""
    folder = tmp_path_factory.mktemp("unloadable")
    words = [*"zyxw", *(str(number) for number in range(40))]
    kinds: dict[str, dict[str, Any]] = {
        "student": {"seed": 1},
        "teacher": {"seed": 2},
        "other": {"seed": 2, "words": words},
        "stops": {"seed": 1, "eos_token_id": 9},
    }
    for name, arguments in kinds.items():
        shutil.copytree(model_folder(**arguments), folder / name)
        (folder / name / "model.safetensors").write_bytes(b"garbage")
    (folder / "empty").mkdir()
    shutil.copy(prompts_file, folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("kind", list(EARLY))
def test_what_needs_no_weights_is_said_before_any_are_read(
    unloadable: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(unloadable)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words, expected = EARLY[kind]
    named = {"--student": "./student", "--teacher": "./teacher", "--data": "data.jsonl", "--out": "run"}
    for option, value in zip(words[::2], words[1::2], strict=False):
        named |= {option: f"./{value}"} if option.startswith("--") else {}
    given = [word for pair in named.items() for word in pair]
    rest = [word for word in words if "=" in word]
    assert main(["train", *given, "task=exact", "steps=1", "precision=fp32", *rest]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1, said
    assert not (unloadable / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["settings", "rollout", "--markdown"], "--markdown writes the whole page"),
        (["settings", "--json", "--markdown"], "--markdown writes the whole page"),
        (["methods", "--json", "--markdown"], "--markdown writes the whole page"),
        (["settings", "rollout", "optimizer"], "one argument too many: 'optimizer'"),
        (["methods", "eopd"], "one argument too many: 'eopd'; `retort settings method.NAME`"),
    ],
)
def test_no_word_of_a_command_is_passed_over(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_the_folder_of_a_run_leads_to_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "config.json", tmp_path / "model" / "config.json"):
        file.write_text("{}")
    assert str(tmp_path / "model") in str(_wrong_with(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": {"learning_rate": True}},
        {"rollout": {"prompts": True}},
        {"steps": True},
        {"seed": False},
        {"eval": {"max_new_tokens": True}},
        {"method": {"name": "opd", "temperature": True}},
        {"method": {"name": "eopd", "top_k": True}},
    ],
)
def test_true_is_no_number(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="number"):
        resolve({"data": "countdown"}, settings)
