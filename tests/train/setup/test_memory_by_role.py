"""What a process of each role needs: relations by hand, and passes of a real model beside the forecast."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from retort import api
from retort.preflight.checks import check_memory
from retort.train.setup.memory import forecast
from retort.train.setup.prepare import Prepared, prepare

#: By what a forecast of memory beside the weights may be off, either way.
FACTOR = 2.0
#: Large enough to be seen beside what Python itself takes, small enough for a second.
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 4, "head_dim": 64, "padded_to": 16_384, "max_position_embeddings": 512}


def grown(work: Callable[[], Any]) -> int:
    """Bytes by which the process grows at most while it works, by the kernel's own mark."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this C library does not give memory back when it is asked to")
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel's mark of the highest memory cannot be set back here")
    before = _kib("VmRSS")
    kept = work()
    found = 1024 * (_kib("VmHWM") - before)
    del kept
    return found


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def weights(lm: Any) -> int:
    return sum(p.numel() * p.element_size() for p in lm.model.parameters())


@pytest.fixture
def larger(tiny_run: dict[str, Any], model_folder: Callable[..., Path]) -> Prepared:
    models = {"student": str(model_folder(seed=1, **SHAPE)), "teacher": str(model_folder(seed=2, **SHAPE))}
    rollout = {"prompts": 32, "max_new_tokens": 96, "max_prompt_tokens": 32}
    more = {"rollout": rollout, "optimizer": {"batch_tokens": 2048}, "eval": {"problems": 0}}
    return prepare(api.assemble({**tiny_run, **models, **more}))


def test_generating_and_scoring_take_what_is_forecast(larger: Prepared) -> None:
    roles = forecast(larger).roles
    (method, clock), teachers = larger.at(0), larger.teachers
    written: list[Any] = []
    generating = grown(lambda: written.extend(larger.source.rollouts(method, clock, 0)))
    said = roles.generator - weights(larger.student)
    assert said / FACTOR < generating < said * FACTOR
    tops = partial(larger.learner.top_ids, method, written)
    scoring = grown(lambda: teachers.score(method, written, teachers.wanted(method), tops))
    assert roles.teacher is not None
    said = roles.teacher - weights(teachers.lms["teacher"])
    assert said / FACTOR < scoring < said * FACTOR


def test_a_rank_that_only_learns_needs_no_teacher_and_no_cache(tiny_run: dict[str, Any]) -> None:
    found = prepare(api.assemble(tiny_run))
    whole, teacher = forecast(found), weights(found.teachers.lms["teacher"])
    assert whole.roles.rank == whole.models - teacher + whole.training + max(
        whole.head + whole.activations + whole.loss + whole.signals, whole.copies
    )
    assert whole.roles.generator > weights(found.student)
    assert whole.roles.teacher is not None and whole.roles.teacher > teacher


def test_without_a_teacher_of_its_own_there_is_none(tiny_run: dict[str, Any]) -> None:
    alone = {name: value for name, value in tiny_run.items() if name != "teacher"}
    found = forecast(prepare(api.assemble({**alone, "method": {"name": "sdpo"}, "task": "exact"})))
    assert found.roles.teacher is None
    assert "teacher" not in str(found.roles)
    assert found.roles.rank <= found.peak


def test_doctor_says_what_a_process_of_each_role_needs(tiny_run: dict[str, Any]) -> None:
    found = prepare(api.assemble(tiny_run))
    check, roles = check_memory(found), forecast(found).roles
    assert str(roles) in check.saw
    values = dict(check.values)
    assert values["generator_bytes"] == roles.generator
    assert values["rank_bytes"] == roles.rank and values["teacher_bytes"] == roles.teacher
