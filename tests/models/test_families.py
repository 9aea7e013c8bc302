"""Real loading code on random models of several families: heads, caps, scales, ties, padding, chat, stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retort import config as configuration
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.batches import token_batches
from retort.models.load import load_model
from retort.rollout.engines.hf import HFEngine, Request, Sampling, nucleus
from retort.train import runner

FAMILIES: list[dict[str, Any]] = [
    {"family": "qwen3", "tie_word_embeddings": True},
    {"family": "qwen3", "tie_word_embeddings": False},
    {"family": "llama", "tie_word_embeddings": False},
    {"family": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    {"family": "cohere", "logit_scale": 0.25},
    {"family": "granite", "logits_scaling": 4.0},
]
MATH = Path(__file__).parents[2] / ".." / "shared" / "data" / "math" / "gsm8k_train.jsonl"


def load(folder: Path, role: str = "student") -> Any:
    return load_model(str(folder), role=role, precision="fp32", device=torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_hidden_states_and_head_give_the_models_own_logits(
    model_folder: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    lm = load(model_folder(seed=3, **arguments))
    sequences = [
        TokenSequence.of([5, 9]).then([12, 7, 20], decided=True),
        TokenSequence.of([6]).then([8, 30], decided=True),
    ]
    with torch.no_grad():
        ours = lm.head().logits(lm.hidden(sequences))
        own = [lm.model(input_ids=own.tokens_L[None]).logits[0] for own in sequences]
    expected = torch.cat([own[0][1:4], own[1][0:2]])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    gathered = lm.all_hidden(sequences, budget=1)
    torch.testing.assert_close(lm.head().logits(gathered), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_a_family_trains_against_a_padded_teacher(
    model_folder: Callable[..., Path], tiny_run: dict[str, Any], tmp_path: Path, arguments: dict[str, Any]
) -> None:
    student = model_folder(seed=3, **arguments)
    teacher = model_folder(seed=4, **{**arguments, "padded_to": 80})
    sections = {"student": str(student), "teacher": str(teacher), "steps": 1, "eval": {"problems": 2}}
    run = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "run")
    assert run.prepared.learner.vocab == run.student.head().width < run.prepared.teachers.lms["teacher"].head().width
    # Adam moves every weight a little: what is tied stays tied, what is trained is saved.
    run.go()
    again = load(tmp_path / "run" / "model")
    for name, parameter in run.student.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name])


def test_the_engines_log_probs_are_the_trainers(model_folder: Callable[..., Path]) -> None:
    for arguments in FAMILIES:
        lm = load(model_folder(seed=3, **arguments))
        engine = HFEngine(lm, vocab=lm.head().width, max_parallel=3)
        requests = [
            Request(TokenSequence.of([5 + n, 9, 12][: 1 + n % 3]), uniforms(0, "rollouts", n, count=6))
            for n in range(5)
        ]
        written = engine.generate(requests, Sampling(6))
        for request, answer in zip(requests, written, strict=True):
            with torch.no_grad():
                hidden_AD = lm.hidden([request.context.then(answer.ids, decided=True)])
                logp = lm.head().logits(hidden_AD).log_softmax(-1)
            again = logp.gather(-1, torch.tensor(answer.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(answer.logp_A, again, rtol=1e-3, atol=1e-4)


def test_a_rollout_does_not_depend_on_its_neighbours(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=1))
    requests = [Request(TokenSequence.of([5 + n % 7, 9]), uniforms(0, "rollouts", n, count=8)) for n in range(9)]
    together = HFEngine(lm, vocab=61, max_parallel=9).generate(requests, Sampling(8))
    for order in (list(range(8, -1, -1)), [3]):
        alone = HFEngine(lm, vocab=61, max_parallel=2).generate([requests[n] for n in order], Sampling(8))
        assert [answer.ids for answer in alone] == [together[n].ids for n in order]


def test_sampling_is_exact(model_folder: Callable[..., Path]) -> None:
    """20,000 first tokens against the model's own distribution, at two temperatures: chi-squared stays in its range."""
    lm = load(model_folder(seed=1))
    vocab = 50  # ids from 50 on are declared to be no tokens
    for temperature in (1.0, 0.7):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[7, 9]])).logits[0, -1, :vocab]
        expected = (logits / temperature).softmax(-1)
        draws = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        engine = HFEngine(lm, vocab=vocab, max_parallel=20_000)
        written = engine.generate([Request(TokenSequence.of([7, 9]), draw) for draw in draws], Sampling(1, temperature))
        counts = torch.bincount(torch.tensor([answer.ids[0] for answer in written]), minlength=vocab)
        kept = expected * 20_000 > 5
        chi = ((counts - expected * 20_000) ** 2 / (expected * 20_000))[kept].sum().item()
        freedom = int(kept.sum())
        assert chi < freedom + 5 * (2 * freedom) ** 0.5
        assert counts[expected == 0].sum() == 0


def test_nucleus_keeps_the_smallest_set_that_holds_top_p() -> None:
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.45, 1), (0.5, 1), (0.55, 2), (0.75, 2), (0.85, 3), (1.0, 4)):
        cut = nucleus(logp, top_p).exp()
        assert (cut > 0).sum() == kept
        assert cut.sum().item() == pytest.approx(1.0)


def test_generation_settings_of_the_model_do_not_bend_rollouts(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A repetition penalty or top-k in generation_config.json must not change what is sampled; it is saved again."""
    import shutil

    plain = model_folder(seed=1)
    bent = Path(shutil.copytree(plain, tmp_path / "bent"))
    generation = json.loads((bent / "generation_config.json").read_text())
    settings = {"repetition_penalty": 5.0, "top_k": 1, "do_sample": True}
    (bent / "generation_config.json").write_text(json.dumps({**generation, **settings}))
    answers = []
    for folder in (plain, bent):
        lm = load(folder)
        requests = [Request(TokenSequence.of([5, 9]), uniforms(0, "rollouts", n, count=8)) for n in range(6)]
        engine = HFEngine(lm, vocab=61, max_parallel=6)
        answers.append([a.ids for a in engine.generate(requests, Sampling(8))])
    assert answers[0] == answers[1]
    assert lm.saved_generation.repetition_penalty == 5.0


@pytest.mark.parametrize("arguments", [{"attention_dropout": 0.5}], ids=["attention"])
def test_dropout_is_off_even_in_training_mode(model_folder: Callable[..., Path], arguments: dict[str, Any]) -> None:
    lm = load(model_folder(seed=1, **arguments))
    lm.model.train()
    sequences = [TokenSequence.of([5]).then([9, 12, 7], decided=True)]
    with torch.no_grad():
        assert torch.equal(lm.hidden(sequences), lm.hidden(sequences))


def test_token_batches_hold_their_budget() -> None:
    lengths = [7, 3, 3, 9, 1, 20]
    batches = token_batches(lengths, 10)
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10


def test_chat_models_with_different_stops_are_mapped_and_said(
    model_folder: Callable[..., Path], tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    student = model_folder(seed=1, eos="<eos>", chat=True)
    teacher = model_folder(seed=2, eos="<|im_end|>", chat=True)
    sections = {"student": str(student), "teacher": str(teacher), "steps": 1}
    run = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "run")
    assert any("<eos>" in note and "<|im_end|>" in note for note in run.prepared.notes)
    run.go()
    rollout = json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])
    assert rollout["status"] in ("completed", "truncated")
    rows = {row["who"]: row for row in run.results["rows"]}
    assert rows["teacher"]["reverse_kl"]["value"] == pytest.approx(0.0, abs=1e-5), "the teacher differs from itself"
    assert rows["student before"]["reverse_kl"]["value"] > 0.01
    config = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == 2  # the student's own stop is saved, not the teacher's


def test_a_base_student_of_a_chat_teacher_is_told_that_they_read_prompts_differently(
    model_folder: Callable[..., Path], tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    sections = {"student": str(model_folder(seed=1)), "teacher": str(model_folder(seed=2, chat=True)), "steps": 1}
    run = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path / "run")
    assert any("30 of 30 prompts read differently" in note for note in run.prepared.notes)
    run.go()


@pytest.mark.skipif(not MATH.exists(), reason="../shared/data/math is absent")
def test_real_prompts_graded_by_math_verify(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="needs the extra 'math'")
    rows = [json.loads(line) for line in MATH.read_text().splitlines()[:24]]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps({**row, "problem": row["problem"][:80]}) + "\n" for row in rows))
    settings = {
        "student": str(model_folder(seed=1, chat=True)),
        "teacher": str(model_folder(seed=2, chat=True, padded_to=72)),
        "data": str(data),
        "columns": {"prompt": "problem"},
        "steps": 2,
        "precision": "fp32",
        "rollout": {"prompts": 4, "max_new_tokens": 8, "max_prompt_tokens": 100},
        "eval": {"problems": 4, "samples": 2, "max_new_tokens": 8},
    }
    run = runner.start(configuration.resolve(settings), tmp_path / "run").go()
    assert run.prepared.source.grader is not None
    assert "math" in run.prepared.source.grader.name
    assert {"avg@2", "pass@2"} <= set(run.results["rows"][0])


def test_a_family_whose_layers_are_not_where_transformers_says_is_named(tmp_path: Path) -> None:
    import transformers
    from support import make_tokenizer

    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**shape, **heads, **ids))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if model.base_model is not model:
        pytest.skip("this transformers finds the layers of Llama 4")
    with pytest.raises(UserError, match="Llama4ForCausalLM .* open an issue that names this family"):
        load(tmp_path)
