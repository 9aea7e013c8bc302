"""Who writes a run's rollouts: what `auto` means, and runs that transformers' continuous batching writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import make_tokenizer
from torch import Tensor
from transformers import AutoConfig

from retort import api
from retort import config as configuration
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.load import load_model
from retort.ranks import here
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.continuous import ContinuousEngine
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.vllm import VLLMEngine
from retort.train import runner
from retort.train.models import engine_choice, other_engine
from retort.train.models.engine_choice import SMALL, Student, choose, parameters_of
from retort.train.setup.prepare import prepare

TEXT, LARGE = False, 7_600_000_000
#: Reads images, parameters, an interpreter is named, ranks; who writes, and a part of the reason.
TABLE: dict[str, tuple[bool, int | None, bool, int, str, str]] = {
    "no interpreter": (TEXT, LARGE, False, 1, "own", "names no interpreter"),
    "large": (TEXT, LARGE, True, 1, "vllm", "about 7,600 million parameters"),
    "just large enough": (TEXT, SMALL, True, 1, "vllm", "reads text alone"),
    "small": (TEXT, SMALL - 1, True, 1, "own", "a request costs more than its tokens"),
    "size not known": (TEXT, None, True, 1, "own", "does not say how large"),
    "reads images": (True, LARGE, True, 1, "own", "reads images"),
    "several ranks": (TEXT, LARGE, True, 2, "own", "2 ranks train"),
}


@pytest.mark.parametrize("name", TABLE)
def test_auto_chooses_by_this_table_and_says_why(name: str) -> None:
    images, parameters, vllm, ranks, engine, why = TABLE[name]
    found, said = choose(Student(images, parameters), vllm=vllm, ranks=ranks)
    assert found == engine
    assert why in said
    assert choose(Student(images, parameters), vllm=vllm, ranks=ranks, cluster=True)[0] == "own"
    assert choose(Student(images, parameters), vllm=vllm, ranks=ranks, workers=2) == (
        "own",
        "rollout.workers run the own loop",
    )


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_size_of_a_model_is_roughly_known_from_its_settings(family: str, model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder(seed=1, family=family, hidden_size=64, num_attention_heads=8, num_key_value_heads=8))
    lm = load_model(folder, role="student", precision="fp32", device=torch.device("cpu"))
    assert parameters_of(AutoConfig.from_pretrained(folder)) == pytest.approx(lm.parameters, rel=0.1)
    nothing = SimpleNamespace()
    nothing.get_text_config = lambda: nothing
    assert parameters_of(nothing) is None


def asked(tiny_run: dict[str, Any], **rollout: Any) -> configuration.Config:
    return api.assemble({**tiny_run, "rollout": {**tiny_run["rollout"], **rollout}})


def test_what_auto_means_is_a_run_of_that_engine_and_is_written_down(
    tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_engine, "vllm_of", lambda python: None)
    for python in (None, "/opt/vllm/bin/python"):  # no interpreter, and a student that is too small
        options = {} if python is None else {"vllm_python": python, "vllm_options": ["--x"]}
        prepared = prepare(asked(tiny_run, engine="auto", **options))
        assert isinstance(prepared.source.engine, HFEngine)
        chosen = prepared.config.rollout
        assert (chosen.engine, chosen.vllm_python, chosen.vllm_options) == ("own", None, [])
        assert any(note.startswith("rollout.engine=auto is own: ") for note in prepared.notes)
        assert not prepared.config.set_by_user("rollout.engine")
    monkeypatch.setattr(engine_choice, "SMALL", 1)
    prepared = prepare(asked(tiny_run, engine="auto", vllm_python="/opt/vllm/bin/python"))
    assert isinstance(prepared.source.engine, VLLMEngine)
    assert prepared.config.rollout.engine == "vllm"
    assert any(note.startswith("rollout.engine=auto is vllm: ") for note in prepared.notes)


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics]


def test_a_run_by_continuous_batching_is_that_of_the_own_loop_and_is_resumed(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    tiny_run = {**tiny_run, "eval": {**tiny_run["eval"], "problems": 0}}
    own = runner.start(asked(tiny_run), tmp_path / "own").go()
    run = runner.start(asked(tiny_run, engine="continuous"), tmp_path / "continuous").go()
    assert losses(run) == pytest.approx(losses(own), rel=1e-3, abs=1e-5)
    assert run.metrics[0].keys() == own.metrics[0].keys()  # no correction: the trainer's own weights wrote
    half = Path(shutil.copytree(run.folder, tmp_path / "half"))
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "step-4")
    assert losses(runner.resume(half).go()) == losses(run)


def test_continuous_batching_is_refused_in_one_line_where_it_cannot_be(
    tiny_run: dict[str, Any], image_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="attention = eager reads no pages"):
        prepare(api.assemble({**tiny_run, "attention": "eager", "rollout": {"engine": "continuous"}}))
    monkeypatch.setattr(engine_choice, "here", lambda: SimpleNamespace(size=2))
    with pytest.raises(UserError, match="not offered on several ranks"):
        prepare(asked(tiny_run, engine="continuous"))
    assert here().size == 1


def written(engine: Any, requests: list[Request], sampling: Sampling) -> list[Completion]:
    return engine.generate(requests, sampling)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_long_prompts_that_share_pages_get_the_completions_of_the_own_loop(
    precision: Any, model_folder: Callable[..., Path]
) -> None:
    """Prompts of several pages, in turns: two at once, of eight. In bf16 a rounding may change a token."""
    lm = load_model(str(model_folder(seed=5)), role="student", precision=precision, device=torch.device("cpu"))
    vocab = len(make_tokenizer())
    common = [5 + n % 40 for n in range(40)]
    contexts = [TokenSequence.of([*common, 6 + n // 2, 9]) for n in range(8)]
    requests = [Request(own, uniforms(0, "rollouts", n, count=10)) for n, own in enumerate(contexts)]
    one = written(HFEngine(lm, vocab=vocab, max_parallel=8), requests, Sampling(10, 1.3))
    two = written(ContinuousEngine(lm, vocab=vocab, max_parallel=2), requests, Sampling(10, 1.3))
    same = [mine.ids == theirs.ids for mine, theirs in zip(one, two, strict=True)]
    assert sum(same) >= (8 if precision == "fp32" else 5)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-4 if precision == "fp32" else 0.1}
    for mine, theirs, alike in zip(one, two, same, strict=True):
        if alike:
            torch.testing.assert_close(mine.logp_A, theirs.logp_A, **close)
    assert (lm.model.training, lm.arithmetic.split()[1]) == (False, "retort_sdpa")


def test_a_model_that_gives_other_probabilities_in_pages_is_refused(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(str(model_folder(seed=5)), role="student", precision="fp32", device=torch.device("cpu"))
    layer: Any = lm.model.base_model.layers[0].mlp
    plain = layer.forward

    def other(states: Tensor) -> Tensor:
        return plain(states) * (1 if states.shape[0] > 1 or states.shape[1] > 4 else 2)

    monkeypatch.setattr(layer, "forward", other)
    engine = ContinuousEngine(lm, vocab=len(make_tokenizer()), max_parallel=2)
    with pytest.raises(UserError, match="it gives other probabilities there than alone; use rollout.engine=own"):
        engine.generate([Request(TokenSequence.of([5, 6]), torch.full((4,), 0.5).double())], Sampling(4))
