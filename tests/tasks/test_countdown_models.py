"""The bundled Countdown models and their tokenizer."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from retort.tasks.countdown import MODELS_DIR, check, rows, student_path, teacher_path  # noqa: E402
from retort.tasks.countdown.tokenizer import build_tokenizer  # noqa: E402


@pytest.mark.parametrize("path", [teacher_path(), student_path()], ids=["teacher", "student"])
def test_tokenizer_and_config_of_the_bundled_models(path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    generation = transformers.GenerationConfig.from_pretrained(path)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for settings in (config, generation):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template is None
    assert "license: apache-2.0" in (path / "README.md").read_text(encoding="utf-8")


def test_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for row in rows("train", 50):
        prompt, response = tokenizer(row["prompt"]).input_ids, tokenizer(row["response"]).input_ids
        assert tokenizer(f"{row['prompt']} {row['response']}").input_ids == prompt + response
        decoded = tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True)
        assert decoded == row["response"] and check(row["prompt"], decoded)
        assert tokenizer.unk_token_id not in prompt + response


def test_the_bundled_models_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS_DIR.rglob("*") if file.is_file()) < 8_000_000


def test_the_teacher_solves_and_the_student_still_has_to_learn() -> None:
    """A few held-out problems; the exact scores stand in the model cards."""
    prompts = [row["prompt"] for row in rows("held_out", 64)]
    share: dict[str, float] = {}
    for name, path in (("teacher", teacher_path()), ("student", student_path())):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokens = torch.tensor(tokenizer(prompts).input_ids)
        for _ in range(12):  # greedy, without a cache: 18 tokens at most
            with torch.no_grad():
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        texts = [tokenizer.decode(row[6:], skip_special_tokens=True) for row in tokens]
        share[name] = sum(map(check, prompts, texts)) / len(prompts)
    assert share["teacher"] > 0.55
    assert share["student"] < share["teacher"] - 0.2
