"""The public surface that stays stable."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch

import retort
from retort.cli import main
from retort.errors import UserError
from retort.functional import linear_token_losses, token_losses


def test_names() -> None:
    assert retort.__all__ == [
        "Callback",
        "Grade",
        "Limit",
        "Method",
        "Paper",
        "RetortError",
        "RunError",
        "Stop",
        "Term",
        "UserError",
        "Watch",
        "distill",
        "doctor",
        "functional",
        "load",
    ]
    for name in retort.__all__:
        assert getattr(retort, name) is not None


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("retort.signals", ["TeacherSignal", "Sampled", "TopK", "Dense", "Candidates"]),
        ("retort.types", ["Prompt", "Message", "Rollout", "Need"]),
        ("retort.rewards.verify", ["MathVerifier"]),
        ("retort.data", ["load_prompts"]),
        ("retort.registry", ["defaults", "load", "names"]),
        ("retort.config", ["resolve", "Config", "RECIPES"]),
        ("retort.cli", ["main"]),
    ],
)
def test_paths_that_stay(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert set(names) <= set(found.__all__ if hasattr(found, "__all__") else vars(found))


def test_the_doctor_is_a_function_whatever_was_imported() -> None:
    importlib.import_module("retort.preflight.doctor")
    assert inspect.isfunction(retort.doctor)


def test_signatures() -> None:
    shared = ["mask", "turns", "rollouts", "groups", "rewards", "old_logp", "engine_logp", "longest", "extra_views"]
    shared += ["confidences"]
    tail = ["step", "total_steps", "state"]
    assert list(inspect.signature(token_losses).parameters) == [
        *("method", "student_logits", "teacher_logits", "tokens"),
        *shared,
        "student_hidden",
        *tail,
    ]
    assert list(inspect.signature(linear_token_losses).parameters) == [
        *("method", "student_hidden", "student_head", "teacher_hidden", "teacher_head", "tokens", "chunk"),
        *shared,
        *tail,
    ]
    assert {"student", "teacher", "data", "method"} <= set(inspect.signature(retort.distill).parameters)


def test_import_is_light() -> None:
    """`import retort` loads neither torch nor transformers; methods load no transformers."""
    code = "import sys, retort; assert not {'torch', 'transformers'} & set(sys.modules); retort.load('eopd'); "
    code += "assert 'transformers' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_methods_and_cite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"opd", "gkd", "eopd", "vopd"} <= set(found)
    assert found["eopd"]["settings"]["top_k"] == 16
    assert found["opd"]["needs"] == {"teacher": ["log-prob of the sampled token"]}
    assert main(["methods"]) == 0
    assert "2603.07079" in capsys.readouterr().out
    assert main(["cite", "eopd"]) == 0
    assert "@misc{eopd" in capsys.readouterr().out
    assert main(["cite", "eodp"]) == 2
    assert "did you mean 'eopd'" in capsys.readouterr().err


def test_what_is_missing_is_named() -> None:
    logits, tokens = torch.zeros(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(UserError, match="needs a signal for view 'teacher'"):
        token_losses("opd", student_logits=logits, tokens=tokens)
    with pytest.raises(UserError, match="one row per token"):
        token_losses("opd", student_logits=logits[:2], teacher_logits=logits, tokens=tokens)
    with pytest.raises(UserError, match="outside the shared vocabulary of 5"):
        token_losses("opd", student_logits=logits, teacher_logits=logits, tokens=tokens + 4)
    with pytest.raises(UserError, match="old_logp must be"):
        token_losses("opd", student_logits=logits, teacher_logits=logits, tokens=tokens, old_logp=torch.zeros(2))
    with pytest.raises(UserError, match="without teacher_head"):
        linear_token_losses(
            "opd",
            student_hidden=torch.zeros(3, 2),
            student_head=torch.zeros(5, 2),
            teacher_hidden=logits,
            tokens=tokens,
        )


@pytest.mark.parametrize("name", ["opd", "gkd", "eopd", "vopd"])
@pytest.mark.parametrize("steps", [0, 1])
def test_no_step_and_one_step(name: str, steps: int) -> None:
    logits = torch.randn(steps, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = token_losses(
        name, student_logits=logits, teacher_logits=torch.zeros(steps, 7), tokens=torch.zeros(steps, dtype=torch.long)
    )
    losses.loss.backward()
    assert torch.isfinite(losses.loss)
    assert logits.grad is not None


@pytest.mark.parametrize("name", ["opd", "gkd", "eopd", "vopd"])
def test_bf16_inputs_get_an_fp32_softmax(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(64, 300, generator=draw).bfloat16()
    teacher = (student.float() + 0.05 * torch.randn(64, 300, generator=draw)).bfloat16()
    tokens = torch.randint(0, 300, (64,), generator=draw)
    low = token_losses(name, student_logits=student, teacher_logits=teacher, tokens=tokens)
    high = token_losses(name, student_logits=student.double(), teacher_logits=teacher.double(), tokens=tokens)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss.double(), high.loss, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollouts": torch.tensor([0.0, 0.0, 1.0])}, "rollouts must be whole numbers"),
        ({"rollouts": torch.tensor([-1, 0, 0])}, "rollouts count from 0; one is -1"),
        ({"rollouts": torch.tensor([0, 0, 1]), "groups": torch.tensor([0.0, 1.0])}, "groups must be whole numbers"),
        ({"turns": torch.tensor([True, False, False])}, "turns must be whole numbers"),
    ],
    ids=["float rollouts", "negative rollouts", "float groups", "bool turns"],
)
def test_what_numbers_rollouts_is_refused_in_one_line(given: dict[str, torch.Tensor], message: str) -> None:
    logits, tokens = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(UserError, match=message):
        token_losses("opd", student_logits=logits, teacher_logits=logits, tokens=tokens, **given)


def test_no_token_at_all_is_a_loss_of_nothing() -> None:
    """Also with rewards and groups, of which there is one per rollout, so none."""
    empty, tokens = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    more = {"rollouts": tokens, "groups": tokens, "rewards": torch.zeros(0)}
    assert float(token_losses("rlsd", student_logits=empty, teacher_logits=empty, tokens=tokens, **more).loss) == 0
