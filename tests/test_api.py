"""`retort.distill`, also with a method of one's own."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pandas
import pytest
import torch
from encoded_images import data_url, encoded
from PIL import Image

import retort
from retort import config as configuration
from retort.advantages import log_ratio
from retort.cli import main
from retort.core.reduce import rollout_means, weighted
from retort.core.rollouts import Prompt
from retort.data import fingerprint, prompts_from_rows
from retort.divergences import forward_kl
from retort.errors import RunError, UserError
from retort.estimators import pathwise, score_function
from retort.models.files import read_model
from retort.models.in_memory import InMemoryModel
from retort.quantities import teacher_entropy
from retort.rollout import RolloutPlan
from retort.train.events.hooks import call
from retort.train.given.given import CallerObjects, Rows, collect
from retort.weights import above


def own_method() -> retort.Method:
    return retort.Method(
        name="mine",
        rollout=RolloutPlan(samples=2),
        terms=(
            retort.Term("reverse", score_function(log_ratio(), clip=0.1), denominator=rollout_means()),
            retort.Term(
                "forward",
                pathwise(forward_kl()),
                weight=above(teacher_entropy(), 3.0),
                denominator=weighted(),
                coef=0.5,
            ),
        ),
    )


def arguments(tiny_run: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    named = {name: tiny_run[name] for name in ("student", "teacher", "data")}
    return named, {name: value for name, value in tiny_run.items() if name not in (*named, "steps")}


def test_a_run_in_one_call(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    method = retort.load("eopd", entropy_threshold=0.6)
    run = retort.distill(**named, method=method, out=str(tmp_path / "run"), steps=2, settings=rest)
    assert run.step == 2
    assert {row["who"] for row in run.results["rows"]} == {"student before", "student after", "teacher"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["method"]["entropy_threshold"] == 0.6
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_method_of_ones_own_is_resumed_with_itself(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    retort.distill(**named, method=own_method(), out=str(tmp_path / "own"), steps=2, settings=rest)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (config["method"], config["own_method"]) == ({"name": "mine"}, True)
    with pytest.raises(UserError, match=r"'mine'\) is not the published one; go on with retort.distill"):
        retort.distill(resume=str(tmp_path / "own"), steps=3)
    run = retort.distill(resume=str(tmp_path / "own"), steps=3, method=own_method())
    assert run.step == 3


def test_a_weighted_denominator_does_not_depend_on_the_cut(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    losses = []
    for tokens in (1, 10**6):
        settings = {**rest, "optimizer": {**rest["optimizer"], "batch_tokens": tokens}}
        out = tmp_path / str(tokens)
        retort.distill(**named, method=own_method(), out=str(out), steps=1, settings=settings)
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_published_method_with_a_part_replaced_is_not_the_published_one(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    named, rest = arguments(tiny_run)
    eopd = retort.load("eopd")
    assert eopd.as_published
    bare = replace(eopd, terms=eopd.terms[:1])
    assert not bare.as_published
    retort.distill(**named, method=bare, out=str(tmp_path / "run"), steps=2, settings=rest)
    with pytest.raises(UserError, match="not the published one"):
        retort.distill(resume=str(tmp_path / "run"), steps=3)


def pair_of(folder: str, **settings: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, **settings), AutoTokenizer.from_pretrained(folder)


def numbers(run: Any) -> list[dict[str, Any]]:
    """What a run computed, without what depends on the clock."""
    clock = ("time/", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in run.metrics]


def same_words(prompt: Prompt, completion: str) -> float:
    """As the task `exact` grades."""
    return float(completion.split() == str(prompt.answer).split())


class StopsAtTwo(retort.Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step(self, run: Any, metrics: Mapping[str, Any]) -> retort.Stop | None:
        assert run.step == metrics["step"]
        metrics.clear()  # type: ignore[attr-defined]  # a callback's own copy
        self.seen.append(f"step {run.step}")
        return retort.Stop("that will do") if run.step == 2 else None

    def on_eval(self, run: Any, scores: Mapping[str, float]) -> None:
        assert {"avg@2", "reverse_kl"} <= set(scores)
        self.seen.append(f"eval {run.step}")

    def on_end(self, run: Any) -> None:
        self.seen.append("end")
        assert (run.folder / "model" / "model.safetensors").is_file()


def test_objects_are_taken_for_names_and_a_run_with_them_ends_early_and_goes_on(
    tiny_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, rest = arguments(tiny_run)
    whole = retort.distill(
        **{name: Path(place) for name, place in named.items()}, out=tmp_path / "a", steps=3, settings=rest
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "learning rate 0.01, cosine schedule" in printed.err
    assert "step 3/3" in printed.err

    rest = {name: value for name, value in rest.items() if name != "task"}
    models = {who: pair_of(named[who]) for who in ("student", "teacher")}
    before = {who: {name: w.clone() for name, w in pair[0].state_dict().items()} for who, pair in models.items()}
    rows = [json.loads(line) for line in Path(named["data"]).read_text().splitlines()]
    capsys.readouterr()
    watcher = StopsAtTwo()
    given: dict[str, Any] = {**models, "verifier": lambda prompt, text: same_words(prompt, text)}
    run = retort.distill(
        **given, data=rows, out=tmp_path / "b", steps=3, settings=rest, callbacks=[watcher], quiet=True
    )
    assert capsys.readouterr() == ("", "")
    assert watcher.seen == ["eval 0", "step 1", "step 2", "eval 2", "end"]
    assert (run.step, len(run.results["rows"])) == (2, 3)

    # Nobody's objects were touched, and the settings say what was an object.
    for who, (model, _) in models.items():
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before[who].items())
        assert not any(weight.grad is not None for weight in model.parameters())
        assert all(weight.requires_grad for weight in model.parameters())
        assert model.generation_config.eos_token_id == 2
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["student"], config["teacher"]) == ("in memory: student", "in memory: teacher")
    assert config["data"].startswith("in memory: 30 rows, ")
    assert config["task"].startswith("in memory: test_objects")

    # What is not kept must be given again; what is given again must be the same.
    assert main(["train", "--resume", str(tmp_path / "b")]) == 2
    assert "the student of this run was given as an object" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the verifier of this run was given as an object.*verifier=test_objects"):
        retort.distill(resume=tmp_path / "b", **models)
    with pytest.raises(UserError, match="its verifier is in memory: test_objects.*, not "):
        retort.distill(resume=tmp_path / "b", **models, verifier=StopsAtTwo().on_end)
    with pytest.raises(UserError, match="the data of this run is kept in given-data.jsonl"):
        retort.distill(resume=tmp_path / "b", **given, data=rows)
    with pytest.raises(UserError, match="the student's weights changed since this checkpoint"):
        retort.distill(resume=tmp_path / "b", **{**given, "student": (run.student.model, models["student"][1])})
    with pytest.raises(UserError, match=r"only steps may be given besides.*\(seed is neither\)"):
        retort.distill(resume=tmp_path / "b", **given, seed=3)
    with pytest.raises(UserError, match="the teacher of this run is named in its settings"):
        retort.distill(resume=tmp_path / "a", teacher=models["teacher"])
    again = retort.distill(resume=tmp_path / "b", **given, quiet=True)
    assert again.step == 3
    assert numbers(again) == numbers(whole)
    assert again.results["rows"] == whole.results["rows"]
    frame = pandas.DataFrame(again.metrics)
    assert list(frame["step"]) == [1, 2, 3]
    assert frame["loss"].dtype == float


class Breaks:
    def on_step(self, run: Any, metrics: Mapping[str, Any]) -> None:
        raise ZeroDivisionError(f"at {run.step}")


def test_what_a_callback_raises_names_it_and_the_run_is_saved(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    named, rest = arguments(tiny_run)
    settings = {**rest, "checkpoint": {"every": 0}, "eval": {"problems": 0}}
    with pytest.raises(RunError) as caught:
        retort.distill(**named, out=tmp_path / "run", steps=2, settings=settings, callbacks=[Breaks()], quiet=True)
    assert "callback Breaks.on_step raised ZeroDivisionError: at 1; everything is saved at step 1 of 2" in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("callbacks", "complaint"),
    [
        ([object()], r"callbacks\[0\] is a object without any of on_step, on_eval, on_end"),
        ([StopsAtTwo(), StopsAtTwo], r"callbacks\[1\] is the class StopsAtTwo; give one of its objects"),
        (StopsAtTwo(), "give a list of callbacks"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        retort.distill(callbacks=callbacks)


def test_a_callback_returns_nothing_or_a_stop() -> None:
    class Odd:
        def on_step(self, run: Any) -> str:
            return "stop"

    with pytest.raises(RunError, match=r"callback Odd.on_step returned 'stop'; it returns None, or retort.Stop"):
        call([Odd()], "on_step", None)  # type: ignore[arg-type]
    assert call([Odd()], "on_eval", None) is None  # type: ignore[arg-type]
    asks = SimpleNamespace(on_step=lambda run: retort.Stop("first")), SimpleNamespace(on_step=lambda run: retort.Stop())
    assert call(asks, "on_step", None) == "first"  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["", None, " \n", 0])
def test_a_stop_stops_whatever_its_words_are(reason: Any) -> None:
    asks = [
        SimpleNamespace(on_step=lambda run: None),
        SimpleNamespace(on_step=lambda run: retort.Stop(reason)),
        SimpleNamespace(on_step=lambda run: retort.Stop("another")),
    ]
    said = call(asks, "on_step", None)  # type: ignore[arg-type]
    assert said == ("0" if reason == 0 else "a callback asked for it")


def test_a_callback_that_exits_is_one_that_raised() -> None:
    asks = SimpleNamespace(on_end=lambda run: sys.exit(3))
    with pytest.raises(RunError, match="callback SimpleNamespace.on_end raised SystemExit: 3"):
        call([asks], "on_end", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"student": 3}, r"student is a int; give a model of transformers with its tokenizer, as a pair"),
        ({"teacher": ("one", "two")}, "teacher: its model is a str"),
        ({"base": (1, 2, 3)}, "base is 3 things"),
        ({"data": 3}, "data: is an int; give a list of mappings"),
        ({"data": {"train": []}}, r"data: is one mapping \(of train\)"),
        ({"eval.data": ["a prompt"]}, r"eval_data, row 0: is a str; each row must be a mapping"),
    ],
)
def test_objects_of_another_kind_are_refused_in_one_line(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        collect(given, {}, None)
    assert "\n" not in str(caught.value)


def test_models_that_a_run_cannot_work_with_are_refused(model_folder: Callable[..., Path]) -> None:
    model, tokenizer = pair_of(str(model_folder(seed=1)))
    with pytest.raises(
        UserError, match="student is a Qwen3ForCausalLM; give a model of transformers with its tokenizer"
    ):
        InMemoryModel.from_pair("student", model)
    with pytest.raises(UserError, match="its tokenizer is a Qwen3ForCausalLM"):
        InMemoryModel.from_pair("student", (model, model))
    with pytest.raises(UserError, match="a Qwen3Model has no head"):
        InMemoryModel.from_pair("teacher", (model.model, tokenizer))
    model.hf_quantizer = object()
    with pytest.raises(UserError, match="its weights are quantised"):
        InMemoryModel.from_pair("teacher", (model, tokenizer))
    del model.hf_quantizer
    with pytest.raises(UserError, match="some of its weights are not in memory"):
        InMemoryModel.from_pair("teacher", (copy.deepcopy(model).to("meta"), tokenizer))
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="1 tensor.* with NaN or infinity"):
        read_model("mine", InMemoryModel.from_pair("teacher", (model, tokenizer)), "teacher", **LOADING)


LOADING: dict[str, Any] = {"dtype": torch.float32, "attention": None, "trust_remote_code": False}


@pytest.mark.parametrize("tied", [True, False])
def test_a_held_model_is_copied_as_it_would_be_loaded(model_folder: Callable[..., Path], tied: bool) -> None:
    folder = str(model_folder(seed=1, tie_word_embeddings=tied))
    pair = pair_of(folder)
    pair[0].train()
    for role, dtype in (("student", torch.float32), ("teacher", torch.float32), ("teacher", torch.bfloat16)):
        loading = {**LOADING, "dtype": dtype}
        named, _ = read_model(folder, None, role, **loading)  # type: ignore[arg-type]
        held, _ = read_model("held", InMemoryModel.from_pair(role, pair), role, **loading)  # type: ignore[arg-type]
        theirs, ours = dict(named.named_parameters()), dict(held.named_parameters())
        assert theirs.keys() == ours.keys()
        assert all(
            torch.equal(weight, ours[name]) and weight.dtype == ours[name].dtype for name, weight in theirs.items()
        )
        assert not held.training
        # A model that learns has weights of its own; another one takes no memory twice.
        places = {weight.data_ptr() for weight in pair[0].parameters()}
        shared = {weight.data_ptr() in places for weight in ours.values()}
        assert shared == {role == "teacher" and dtype == torch.float32}
    assert pair[0].training


def test_rows_are_kept_as_they_were_read(tmp_path: Path) -> None:
    import datasets

    rows: list[dict[str, Any]] = [
        {"prompt": "1 + 1 =", "answer": 2, "seen": numpy.float32(0.5), "when": date(2026, 1, 1)},
        {"messages": [{"role": "user", "content": "2\u2028+ 2"}], "answer": "4"},
    ]
    table = datasets.Dataset.from_list([{"prompt": f"{a} =", "answer": str(a)} for a in range(5)])
    config = configuration.resolve({"data": "x", "limit": 2})
    for number, (source, count) in enumerate([(rows, 2), (iter(rows), 2), (table, 2), (tuple(rows[:1]), 1)]):
        flags, given = collect({"data": source}, {"limit": 2}, None)
        assert flags["data"].startswith(f"in memory: {count} rows, ")
        given.keep(tmp_path)
        kept = Rows.kept(tmp_path / "given-data.jsonl")
        prompts = given.prompts(config, "data", "", None, [])
        assert len(prompts) == count, number
        again = CallerObjects(rows={"data": kept}).prompts(config, "data", "", None, [])
        assert fingerprint(again) == fingerprint(prompts)
        assert kept.label == flags["data"]
    (tmp_path / "given-data.jsonl").write_text('{"prompt": "1"}\n[]\n')
    with pytest.raises(UserError, match="given-data.jsonl, line 2: holds a list"):
        Rows.kept(tmp_path / "given-data.jsonl")


#: Cells that a column which is read may hold, as Python has them.
READ: dict[str, Any] = {
    "datetime": datetime(2026, 1, 1, 12, 30),
    "date": date(2026, 1, 1),
    "with a zone": datetime(2026, 1, 1, tzinfo=UTC),
    "timestamp": pandas.Timestamp("2026-01-01 10:00"),
    "decimal": Decimal("1E+3"),
    "small decimal": Decimal("0.10"),
    "float": 1e22,
    "numpy": numpy.float32(0.1),
    "array": numpy.array(7),
    "part": {"deep": Decimal("2E+1")},
}


@pytest.mark.parametrize("column", ["answer", "id", "domain", "hint"])
@pytest.mark.parametrize("kind", READ)
def test_a_cell_is_kept_as_it_is_read(kind: str, column: str) -> None:
    theirs = "cell.deep" if kind == "part" else "cell"
    rows = Rows([{"prompt": "1 =", "cell": READ[kind]}])
    lines = [json.loads(line) for line in rows.content.splitlines()]
    first, second = (prompts_from_rows(found, columns={column: theirs}) for found in (rows.rows, lines))
    assert fingerprint(first) == fingerprint(second)
    assert Rows(lines).content == rows.content


def test_a_table_with_times_is_kept_as_it_is_read() -> None:
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["1 ="], "answer": [datetime(2026, 1, 1)], "a": [Decimal("1.50")]})
    rows = Rows.from_iterable("data", table, None)
    kept = [json.loads(line) for line in rows.content.splitlines()]
    for columns in ({}, {"answer": "a"}):
        first, second = (prompts_from_rows(found, columns=columns) for found in (rows.rows, kept))
        assert fingerprint(first) == fingerprint(second)


def test_rows_with_images_are_kept_as_they_are_read() -> None:
    import datasets

    red, drawn = encoded(), Image.new("LA", (3, 2), (9, 100))
    stored = datasets.Dataset.from_list([{"prompt": "x", "image": {"bytes": red, "path": None}}])
    decoded = stored.cast_column("image", datasets.Image())
    part = {"type": "image", "image": drawn}
    listed = [
        {"prompt": "x", "images": [red, drawn, {"bytes": red, "path": "a.png"}, data_url(red)]},
        {"messages": [{"role": "user", "content": [part, {"type": "image"}]}], "images": bytearray(red)},
    ]
    for given in (listed, stored, decoded):
        rows = Rows.from_iterable("data", given, None)
        kept = [json.loads(line) for line in rows.content.splitlines()]
        first, second = prompts_from_rows(given), prompts_from_rows(kept)
        assert fingerprint(first) == fingerprint(second) and all(prompt.images for prompt in second)
        assert Rows(kept).content == rows.content


def test_columns_whose_names_are_no_text_are_not_used_and_are_kept() -> None:
    row: dict[Any, Any] = {"prompt": "1 =", 1: 2, (1, 2): "x", None: 3, "seen": {(3, 4): {5: 6, "5": 7}, True: 1}}
    notes: list[str] = []
    read = prompts_from_rows([row], notes=notes)
    assert notes == ["data: columns not used: 1, (1, 2), None, seen (of (3, 4), True)"]
    line = Rows([row]).content
    kept = json.loads(line)
    assert kept == {
        "prompt": "1 =",
        "1": 2,
        "(1, 2)": "x",
        "null": 3,
        "seen": {"(3, 4)": {"5": 7}, "true": 1},
    }
    assert fingerprint(prompts_from_rows([kept])) == fingerprint(read)
    assert json.loads(Rows([{1: "number", "1": "text"}, {"1": "text", 1: "number"}]).content.splitlines()[0]) == {
        "1": "text"
    }
    with pytest.raises(UserError, match="'answer' is mapped to a column '1' that is not there"):
        prompts_from_rows([row], columns={"answer": "1"})
    with pytest.raises(UserError, match=r"no column 'prompt' or 'messages' \(found: 0, 1\)"):
        prompts_from_rows([{0: "a", 1: "b"}])  # type: ignore[dict-item]


def test_a_column_that_no_file_can_hold_is_named() -> None:
    circle: list[Any] = []
    circle.append(circle)
    table: dict[str, Any] = {}
    table["self"] = table
    for cell in (circle, table, 10**5000):
        with pytest.raises(UserError, match="data, row 1: the column 'odd' cannot be kept in the run's folder") as e:
            collect({"data": [{"prompt": "1"}, {"prompt": "2", "odd": cell}]}, {}, None)
        assert "\n" not in str(e.value)
