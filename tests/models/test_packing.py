"""Packed sequences against padded ones: values, gradients, what is computed, and who must not be packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import make_tokenizer
from torch.nn import functional

from retort import config as configuration
from retort.core.sequences import TokenSequence
from retort.models import load as load_module
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.packing import CannotShareError, Run, row_batches, runs
from retort.train import runner

FAMILIES: list[dict[str, Any]] = [
    {"family": "qwen3"},
    {"family": "llama", "num_key_value_heads": 2, "attention": "sdpa"},
    {"family": "llama", "attention": "eager"},
    # Windows shorter than the sequences below, and a soft cap that only eager attention knows.
    {"family": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 5},
    {"family": "cohere", "logit_scale": 0.25},
    {"family": "granite", "logits_scaling": 4.0},
]
LENGTHS = [2, 3, 3, 7, 7, 7, 12, 20]
#: Families of other designs: does their attention let transformers keep a pack apart?
OTHERS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "learned positions": ("GPT2Config", "GPT2LMHeadModel", True, {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "sliding windows": ("MistralConfig", "MistralForCausalLM", True, {"sliding_window": 4}),
    "alibi": ("BloomConfig", "BloomForCausalLM", False, {"n_layer": 2, "n_head": 2}),
    "recurrent": ("MambaConfig", "MambaForCausalLM", False, {"state_size": 8}),
    "short convolutions": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        False,
        {"layer_types": ["conv", "full_attention"]},
    ),
}


def load(folder: Path, precision: str = "fp32", attention: str | None = None) -> LanguageModel:
    return load_model(
        str(folder),
        role="student",
        precision=precision,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        attention=attention,
    )


def of_family(model_folder: Callable[..., Path], arguments: dict[str, Any], **more: Any) -> LanguageModel:
    given = dict(arguments)
    attention = given.pop("attention", None)
    return load(model_folder(seed=3, **given), attention=attention, **more)


def sequences(lengths: list[int]) -> list[TokenSequence]:
    draw = torch.Generator().manual_seed(0)
    return [
        TokenSequence(torch.randint(0, 55, (length,), generator=draw), torch.arange(length) >= 1 + length // 3)
        for length in lengths
    ]


def hidden_and_gradients(lm: LanguageModel, packs: bool, lengths: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    lm.packs = packs
    lm.model.zero_grad()
    hidden_ND = lm.hidden(sequences(lengths))
    weight_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1))
    (hidden_ND.float() * weight_ND).sum().backward()
    return hidden_ND.detach().float(), {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5, 5], [9], [7, 2, 7, 3]], ids=str)
@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_values_and_gradients_are_those_of_padded_rows(
    model_folder: Callable[..., Path], arguments: dict[str, Any], lengths: list[int]
) -> None:
    lm = of_family(model_folder, arguments)
    assert lm.packs
    padded_ND, padded = hidden_and_gradients(lm, False, lengths)
    packed_ND, packed = hidden_and_gradients(lm, True, lengths)
    torch.testing.assert_close(packed_ND, padded_ND, rtol=1e-4, atol=1e-5)
    assert packed.keys() == padded.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-3, atol=1e-4 * float(padded[name].abs().max()))


@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_nothing_leaks_from_a_neighbour(model_folder: Callable[..., Path], arguments: dict[str, Any]) -> None:
    lm = of_family(model_folder, arguments)
    first, *others = sequences([6, 9, 9])
    with torch.no_grad():
        before_ND = lm.hidden([first, *others])
        after_ND = lm.hidden([replace(first, tokens_L=first.tokens_L.flip(0)), *others])
    own = first.steps
    assert torch.equal(before_ND[own:], after_ND[own:])
    assert not torch.equal(before_ND[:own], after_ND[:own])


@pytest.mark.parametrize("arguments", FAMILIES[:4], ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_bf16_packs_to_its_own_rounding(model_folder: Callable[..., Path], arguments: dict[str, Any]) -> None:
    lm = of_family(model_folder, arguments, precision="bf16")
    assert lm.packs
    padded_ND, _ = hidden_and_gradients(lm, False, LENGTHS)
    packed_ND, _ = hidden_and_gradients(lm, True, LENGTHS)
    assert ((packed_ND - padded_ND).norm(dim=1) < 0.05 * padded_ND.norm(dim=1)).all()


@pytest.mark.parametrize("arguments", FAMILIES[1:4], ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_layers_computed_again_in_the_backward_pass_stay_packed(
    model_folder: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    lm = of_family(model_folder, arguments)
    _, plain = hidden_and_gradients(lm, True, LENGTHS)
    plain = {name: gradient.clone() for name, gradient in plain.items()}
    lm.model.activation_checkpointing_enable({"use_reentrant": False})
    lm.model.train()
    _, again = hidden_and_gradients(lm, True, LENGTHS)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)


def test_no_padding_and_no_mask_is_computed(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(model_folder(seed=3, family="llama"), attention="sdpa")
    rows: list[torch.Size] = []
    attended: list[tuple[int, int]] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    real = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        assert more["attn_mask"] is None
        attended.append((query.shape[0], query.shape[2]))
        return real(query, *args, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    lm.hidden(sequences(LENGTHS))
    # The last token of each decides nothing.
    assert rows == [torch.Size([1, sum(LENGTHS) - len(LENGTHS)])]
    assert attended == 2 * [(1, 1), (2, 2), (3, 6), (1, 11), (1, 19)]  # once a run, in each of two layers


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_is_packed_only_if_that_changes_nothing(tmp_path: Path, family: str) -> None:
    config_name, model_name, packs, settings = OTHERS[family]
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = {} if family == "learned positions" else {**shape, "num_key_value_heads": 1}
    if family in ("alibi", "recurrent"):
        shape = {"hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(vocab_size=len(tokenizer), **shape, **ids, **settings)
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.35)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = load(tmp_path)
    assert lm.packs == packs
    with torch.no_grad():
        together_ND = lm.hidden(sequences(LENGTHS))
        alone_ND = torch.cat([lm.hidden([one]) for one in sequences(LENGTHS)])
    torch.testing.assert_close(together_ND, alone_ND, rtol=1e-3, atol=1e-4)


def test_a_run_says_that_it_pads(tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = runner.start(configuration.resolve(tiny_run), tmp_path / "packed")
    assert not any("padded" in note for note in packed.prepared.notes)
    monkeypatch.setattr(load_module, "choose_batching", lambda lm: None)
    padded = runner.start(configuration.resolve(tiny_run), tmp_path / "padded")
    assert sum("padded" in note for note in padded.prepared.notes) == 1
    losses = [run.go() and (run.folder / "metrics.jsonl").read_text().splitlines() for run in (packed, padded)]
    for one, two in zip(*losses, strict=True):
        loss_one, loss_two = (float(line.split('"loss": ')[1].split(",")[0]) for line in (one, two))
        assert loss_one == pytest.approx(loss_two, rel=1e-4)


def test_what_is_saved_names_no_attention_of_ours(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    lm = load(model_folder(seed=3))
    lm.model.save_pretrained(tmp_path)
    assert "retort" not in (tmp_path / "config.json").read_text()


def test_runs_are_neighbours_of_one_length() -> None:
    assert runs([3, 3, 5, 3]) == [Run(0, 2, 3), Run(6, 1, 5), Run(11, 1, 3)]


def test_packed_batches_count_what_is_in_them() -> None:
    lengths = [7, 3, 3, 9, 1, 20, 3]
    batches = row_batches(sequences(lengths), 10, share=False)
    assert batches == [[4, 1, 2, 6], [0], [3], [5]]
    assert sorted(index for batch in batches for index in batch) == list(range(7))


#: Answers' lengths by prompt, in an order that neither groups nor sorts them.
SIBLINGS = [(0, 4), (1, 1), (0, 2), (2, 5), (0, 4), (1, 7), (0, 1)]


def siblings() -> list[TokenSequence]:
    """Answers to three prompts, one of which is how another one begins; one turn of a tool among what is written."""
    draw = torch.Generator().manual_seed(0)
    longest = torch.randint(0, 55, (6,), generator=draw)
    prompts = [longest, longest[:3], torch.randint(0, 55, (4,), generator=draw)]
    tokens = [torch.cat([prompts[which], torch.randint(0, 55, (count,), generator=draw)]) for which, count in SIBLINGS]
    acted = [torch.arange(len(ids)) >= len(prompts[which]) for ids, (which, _) in zip(tokens, SIBLINGS, strict=True)]
    acted[5][5:8] = False
    return [TokenSequence(ids, own) for ids, own in zip(tokens, acted, strict=True)]


def values_and_gradients(lm: LanguageModel, shares: bool) -> tuple[torch.Tensor, dict[str, Any], list[int]]:
    lm.shared_prefixes = shares
    lm.model.zero_grad()
    computed: list[int] = []
    hook = lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    hidden_ND = lm.hidden(siblings())
    hook.remove()
    weight_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1))
    (hidden_ND.float() * weight_ND).sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    return hidden_ND.detach(), gradients, computed


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_a_prompt_is_computed_once_for_all_answers_to_it(
    model_folder: Callable[..., Path], arguments: dict[str, Any], again: bool
) -> None:
    lm = of_family(model_folder, arguments)
    assert lm.shared_prefixes == ("sliding_window" not in arguments), "a window counts places in the row"
    if again:
        lm.model.activation_checkpointing_enable({"use_reentrant": False})
        lm.model.train()
    alone_ND, alone, computed = values_and_gradients(lm, False)
    if "sliding_window" in arguments:
        with pytest.raises(CannotShareError):
            values_and_gradients(lm, True)
        return
    shared_ND, shared, fewer = values_and_gradients(lm, True)
    assert computed[0] - fewer[0] == 3 * 6 + 3
    torch.testing.assert_close(shared_ND, alone_ND, rtol=1e-5, atol=1e-6)
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-5 * float(alone[name].abs().max()))


def test_answers_to_one_prompt_stay_together_and_their_prompt_counts_once() -> None:
    apart = row_batches(siblings(), 22, share=False)
    together = row_batches(siblings(), 22, share=True)
    assert len(together) < len(apart)
    prompts = [[SIBLINGS[i][0] for i in batch] for batch in together]
    assert [which for batch in prompts for which in batch] == [2, 0, 0, 0, 0, 1, 1]
    assert row_batches(siblings(), 1, share=True) == [[i] for batch in together for i in batch]
