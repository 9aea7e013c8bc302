"""A sequence does not depend on its neighbours, at any length; nor on the mode; nor is what it says lost at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import make_tokenizer
from torch import Tensor

from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models import together
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.randomness import check_repeats
from retort.models.together import lowered, switches
from retort.rollout.engines.hf import HFEngine, Request, Sampling

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 64,
}


def make(folder: Path, family: str, std: float = 0.5, **settings: Any) -> LanguageModel:
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": None, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**({} if family == "GPT2" else SMALL), **ids, "max_position_embeddings": 256, **settings}
    )
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"))


def phi(folder: Path) -> LanguageModel:
    return make(folder, "Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)


def sequences(*lengths: int) -> list[TokenSequence]:
    draw = torch.Generator().manual_seed(0)
    return [
        TokenSequence(torch.randint(5, 50, (length,), generator=draw), torch.arange(length) > min(4, length // 2))
        for length in lengths
    ]


FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64),
    "window": ("Mistral", {"sliding_window": 32}, None),
    "two windows": ("Gemma3", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}, None),
    "plain": ("Qwen3", {"head_dim": 8}, None),
    "yarn": (
        "Qwen3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        None,
    ),
}


@pytest.mark.parametrize("affordable", [True, False], ids=["as it is", "lowered"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_sequence_depends_on_its_neighbours_beyond_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, affordable: bool
) -> None:
    family, settings, limit = FAMILIES[name]
    if not affordable:
        monkeypatch.setattr(together, "_AFFORDABLE", {"cpu": 0.0})
    settings = {"head_dim": 8, **settings} if family == "Gemma3" else settings
    if family == "Gemma3":
        monkeypatch.setattr(transformers, "Gemma3Config", transformers.Gemma3TextConfig)
    lm = make(tmp_path, family, **settings)
    assert lm.together_up_to == lm.rereads_from == limit
    for lengths in ((20, 100), (100, 20, 100), (20, 30, 20), (63, 64, 65, 66), (3, 130, 70)):
        asked = sequences(*lengths)
        with torch.no_grad():
            alone = torch.cat([lm.hidden([one]) for one in asked])
            torch.testing.assert_close(lm.hidden(asked), alone, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(lm.all_hidden(asked, 200), alone, rtol=1e-3, atol=1e-3)
        batches = lm.batches(asked, 200)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))


def test_short_sequences_of_such_a_family_still_go_together(tmp_path: Path) -> None:
    lm = phi(tmp_path)
    asked = sequences(20, 100, 30, 64, 65)
    assert sorted(map(sorted, lm.batches(asked, 1000))) == [[0, 2, 3], [1], [4]]


def test_what_the_engine_reports_is_what_is_scored_on_either_side_of_the_length(tmp_path: Path) -> None:
    lm = phi(tmp_path)
    engine = HFEngine(lm, vocab=lm.rows, max_parallel=8)
    sizes = [70, 5, 100, 40]
    requests = [
        Request(sequences(size)[0], uniforms(0, "rollouts", place, count=8)) for place, size in enumerate(sizes)
    ]
    written = engine.generate(requests, Sampling(8))
    for request, answer in zip(requests, written, strict=True):
        with torch.no_grad():
            hidden_AD = lm.hidden([request.context.read().then(answer.ids, decided=True)])
            logp_AV = lm.head().logits(hidden_AD).log_softmax(-1)
        again_A = logp_AV.gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(answer.logp_A, again_A, rtol=1e-3, atol=1e-3)


def test_switches_are_found_at_any_depth_and_put_back(tmp_path: Path) -> None:
    lm = phi(tmp_path)
    config = lm.model.config
    assert {length for _, length in switches(config)} == {64}
    with lowered(lm, 64, 16) as to:
        assert to == 16
        assert {length for _, length in switches(config)} == {16}
        assert config.rope_parameters["original_max_position_embeddings"] == 16
    assert {length for _, length in switches(config)} == {64}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.1}),
        ("Phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1}),
        ("Llama", {"attention_dropout": 0.3}),
        ("OPT", {"dropout": 0.3, "layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}),
        ("GPT2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_mode_changes_nothing(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    lm = make(tmp_path, family, **settings)
    asked = sequences(20, 12)
    with torch.no_grad():
        before_ND = lm.hidden(asked)
        lm.model.train()
        check_repeats(lm)
        torch.testing.assert_close(lm.hidden(asked), before_ND, rtol=1e-5, atol=1e-5)


def test_chance_that_a_family_hides_is_refused(model_folder: Callable[..., Path]) -> None:
    lm = load_model(str(model_folder(seed=1)), role="student", precision="fp32", device=torch.device("cpu"))

    def shaken(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + 0.1 * torch.rand_like(output)) if module.training else output

    lm.model.get_input_embeddings().register_forward_hook(shaken)  # type: ignore[union-attr]
    check_repeats(lm)
    lm.model.train()
    state = torch.random.get_rng_state()
    with pytest.raises(UserError, match="two passes over one text differ in training mode"):
        check_repeats(lm)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_id_without_a_row_is_named(model_folder: Callable[..., Path]) -> None:
    lm = load_model(str(model_folder(seed=1)), role="student", precision="fp32", device=torch.device("cpu"))
    asked = TokenSequence.of([3]).then([lm.rows, 4], decided=True)
    with pytest.raises(UserError, match=f"id {lm.rows}.*has no row"):
        lm.hidden([asked])
    engine = HFEngine(lm, vocab=lm.rows, max_parallel=1)
    with pytest.raises(UserError, match="a prompt holds"):
        engine.generate([Request(asked, uniforms(0, "rollouts", count=2))], Sampling(2))
