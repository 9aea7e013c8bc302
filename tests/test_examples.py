"""The example in one file: it runs, stands on its own, and computes what Retort computes."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import retort
from retort.functional import token_losses
from retort.tasks.countdown import problems as countdown

FILE = Path(__file__).resolve().parents[1] / "examples" / "single_file_opd.py"
METHODS = {
    "opd": {},
    "eopd": {},
    "reverse_kl": {"divergence": "reverse_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
    "forward_kl": {"divergence": "forward_kl", "on_policy_fraction": 1.0, "temperature": 1.0},
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("single_file_opd", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORT = ("--steps", "2", "--batch", "8", "--eval", "8")


def rows(output: str) -> dict[str, list[float]]:
    """The numbers of the lines, by their first word."""
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    return {label: [float(number) for number in lines[label]] for label in ("before", "after", "teacher")}


def check_countdown(lines: dict[str, list[float]]) -> None:
    for label in ("before", "after"):
        *divergences, length, right = lines[label]
        assert len(divergences) == 5 and 0 < length <= 14 and 0 <= right <= 1
    assert lines["before"][:-1] != lines["after"][:-1]
    assert lines["teacher"][0] == 0.0  # it does not differ from itself


def test_runs_from_the_command_line():
    """The only one that starts a process of its own: most of its time goes into importing torch and transformers."""
    done = subprocess.run(
        [sys.executable, str(FILE), *SHORT],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check_countdown(rows(done.stdout))


@pytest.fixture
def run(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, list[float]]]:
    def main(*arguments: object) -> dict[str, list[float]]:
        monkeypatch.setattr(sys, "argv", [str(FILE), *SHORT, *map(str, arguments)])
        example.main()
        return rows(capsys.readouterr().out)

    return main


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, run: Callable[..., dict[str, list[float]]]):
    check_countdown(run("--method", method))


def test_other_models_and_prompts(
    run: Callable[..., dict[str, list[float]]], model_folder: Callable[..., Path], tmp_path: Path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{'add ' * (i % 4)}{i} + 1 =\n" for i in range(30)))
    student = model_folder(seed=1)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=80)  # its output layer is wider than the vocabulary
    lines = run("--prompts", prompts, "--student", student, "--teacher", teacher)
    assert len(lines["before"]) == len(lines["after"]) == 6  # nobody knows here what is right

    with pytest.raises(SystemExit, match="different tokenizers"):
        run("--student", student)


def test_stands_on_its_own():
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_retort(method: str, example: ModuleType):
    generator = torch.Generator().manual_seed(7)
    B, L, V = 5, 9, 40
    student = torch.randn(B, L, V, generator=generator).mul_(2.0).requires_grad_()
    # From sharp to flat, so that the gate is open at some steps and shut at others; and k = 16 is less than V.
    teacher = torch.randn(B, L, V, generator=generator) * torch.linspace(0.5, 8.0, L)[:, None]
    tokens = torch.randint(V, (B, L), generator=generator)
    written = torch.rand(B, L, generator=generator) < 0.7

    loss, seen = example.distil(method, student, teacher, tokens, written)
    (gradient,) = torch.autograd.grad(loss, student)
    assert 0.1 < seen["share uncertain"] < 0.9

    settings = METHODS[method]
    losses = token_losses(
        retort.load("gkd" if settings else method, **settings),
        student_logits=student.flatten(0, 1),
        teacher_logits=teacher.flatten(0, 1),
        tokens=tokens.flatten(),
        mask=written.flatten(),
    )
    (wanted,) = torch.autograd.grad(losses.loss, student)
    torch.testing.assert_close(loss, losses.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    assert gradient[~written].abs().max() == 0.0


@pytest.fixture(scope="module")
def model(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Absolute positions, an output layer wider than the vocabulary, dropout, and a stop token that is also padding."""
    import transformers

    tokenizer = example.AutoTokenizer.from_pretrained(example.MODELS / "student")
    tokenizer.pad_token = tokenizer.eos_token
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=280, **shape))
    with torch.no_grad():
        made.transformer.wpe.weight.normal_(0.0, 1.0)
        made.transformer.wte.weight.normal_(0.0, 0.3)
        made.transformer.wte.weight[tokenizer.eos_token_id] *= 3.0  # so that some answers stop early
    made.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.5)  # somebody else's settings
    folder = tmp_path_factory.mktemp("gpt2")
    made.save_pretrained(folder)
    return example.load(folder, tokenizer, "cpu", torch.float32), tokenizer


PROMPTS = ["45 from 3 5 12 :", "7 from 3 4 :", "40 from 2 3 4 5 :", "24 from 4 6 :"] * 4


def test_scores_the_distribution_it_drew_from(example: ModuleType, model: tuple[Any, Any]):
    """Left padding, positions, the shift by one, and a `generate` that adds nothing of its own."""
    lm, tokenizer = model
    vocab = len(tokenizer)
    torch.manual_seed(0)
    ids, real, written = example.write(lm, tokenizer, PROMPTS, 10)
    with torch.no_grad():
        logits = example.score(lm, ids, real, vocab)
        for row in range(len(PROMPTS)):
            alone = lm(ids[row][real[row]][None]).logits[0, :-1, :vocab]
            steps = written[row, 1:]
            torch.testing.assert_close(logits[row][steps], alone[-int(steps.sum()) :], rtol=1e-4, atol=1e-4)

    batch = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    out = lm.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(out.sequences, ids)
    drawn_from = torch.stack(out.scores, dim=1)  # after all that `generate` does to logits
    kept = written[:, batch.input_ids.shape[1] :]
    scored = logits[:, batch.input_ids.shape[1] - 1 :]
    torch.testing.assert_close(drawn_from[..., :vocab][kept], scored[kept], rtol=1e-4, atol=1e-4)
    assert (drawn_from[..., vocab:] == -torch.inf).all()


def test_the_stop_token_counts_and_nothing_after_it(example: ModuleType, model: tuple[Any, Any]):
    lm, tokenizer = model
    torch.manual_seed(1)
    ids, real, written = example.write(lm, tokenizer, PROMPTS, 10)
    stopped = 0
    for row, prompt in enumerate(PROMPTS):
        answer = ids[row, -10:][written[row, -10:]].tolist()
        assert not written[row, :-10].any()
        assert tokenizer.eos_token_id not in answer[:-1]
        assert len(answer) == 10 or answer[-1] == tokenizer.eos_token_id
        assert ids[row][real[row]].tolist() == [*tokenizer(prompt).input_ids, *answer]
        stopped += answer[-1] == tokenizer.eos_token_id
    assert 0 < stopped < len(PROMPTS)


def test_its_problems_and_its_checker_are_those_of_the_task(example: ModuleType):
    def problem(prompt: str) -> countdown.Problem:
        target, _, *numbers, _ = prompt.split()
        return countdown.Problem(tuple(sorted(map(int, numbers))), int(target))

    train, held_out = example.countdown()
    assert sorted(map(problem, train), key=repr) == sorted(countdown.problems("train"), key=repr)
    assert sorted(map(problem, held_out), key=repr) == sorted(countdown.problems("held_out"), key=repr)
    prompt = "45 from 3 5 12 :"
    assert example.is_right(prompt, "12 - 3 = 9 , 9 * 5 = 45")
    for answer in (
        "",
        "12 - 3 = 9",
        "12 - 3 = 9 , 9 * 5 = 46",
        "12 - 3 = 8 , 8 * 5 = 40",
        "12 - 3 = 9 , 9 * 5 = 45 , 45",
        "12 - 3 = 9 , 9 * 5 = 45 ,",
        "9 * 5 = 45",
        "3 * 3 = 9 , 9 * 5 = 45",
        "5 * 12 = 60 , 60 - 3 = 57",
        "3 - 12 = -9 , 5 * 9 = 45",
    ):
        assert not countdown.check(prompt, answer)
        assert not example.is_right(prompt, answer)
