"""A LoRA adapter in a model: gradients as peft's own forward has them, the frozen model behind it, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.core.context import Context
from retort.core.per_token import Core, loss_pass
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense
from retort.core.steps import Clock, Steps
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.models.load import check_head, load_model
from retort.models.lora import add_adapter
from retort.rollout.engines.hf import HFEngine, Request, Sampling

UNTIED = {"tie_word_embeddings": False}
FAMILIES: list[dict[str, Any]] = [
    {"family": "qwen3", **UNTIED},
    {"family": "qwen3", "tie_word_embeddings": True},
    {"family": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **UNTIED},
    {"family": "cohere", "logit_scale": 0.25, **UNTIED},
    {"family": "granite", "logits_scaling": 4.0, **UNTIED},
]
ON_HEAD = ("all-linear", "lm_head")


def load(folder: Path, precision: str = "fp32") -> LanguageModel:
    return load_model(str(folder), role="student", precision=precision, device=torch.device("cpu"))  # type: ignore[arg-type]


def adapted(folder: Path, targets: tuple[str, ...] = ON_HEAD, *, precision: str = "fp32", **more: Any) -> LanguageModel:
    """A student with an adapter that is not 0."""
    lm = load(folder, precision)
    add_adapter(lm, **{"rank": 3, "alpha": 6.0, "targets": targets, **more})
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return lm


def sequences() -> list[TokenSequence]:
    """Three answers to one prompt and one to another."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 50, (4,), generator=draw), torch.randint(0, 50, (3,), generator=draw)]
    made = [(0, 3), (1, 5), (0, 6), (0, 3)]
    return [
        TokenSequence.of(prompts[which].tolist()).then(
            torch.randint(0, 50, (count,), generator=draw).tolist(), decided=True
        )
        for which, count in made
    ]


def gradients(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in lm.trainable().items() if p.grad is not None}


def teacher_logits(steps: int, width: int) -> Tensor:
    return torch.randn(steps, width, generator=torch.Generator().manual_seed(2))


def through_the_core(lm: LanguageModel, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    lm.model.zero_grad()
    hidden_ND = lm.hidden(sequences())
    head = lm.head()
    written_N = torch.cat([sequence.actions_A for sequence in sequences()])
    theirs_NV = teacher_logits(len(written_N), head.width)
    signal = Dense(written_N, "teacher", lambda index: theirs_NV[index], head.width, 1.0)

    def values(context: Context) -> dict[str, Tensor]:
        return {"kl": context.student.reverse_kl(context.signals["teacher"].distribution)}

    core = Core(values, Steps.of(written_N), Clock(), {"teacher": signal}, head, head.width)
    loss, _ = loss_pass(core, hidden_ND, lambda found, rows: found["kl"].double().sum(), chunk=chunk)
    loss.backward()
    return loss.detach(), gradients(lm)


def by_pefts_own_forward(lm: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    """One sequence at a time, logits as the model itself gives them, the divergence by its definition."""
    lm.model.zero_grad()
    logits = []
    for sequence in sequences():
        ids, own = sequence.tokens_L, sequence.action_mask_L
        logits.append(lm.adapter.wrapper(input_ids=ids[None], use_cache=False).logits[0, :-1][own[1:]])  # type: ignore[union-attr]
    logp_NV = torch.cat(logits).log_softmax(-1)
    theirs_NV = teacher_logits(len(logp_NV), logp_NV.shape[1]).log_softmax(-1)
    loss = (logp_NV.exp() * (logp_NV - theirs_NV)).sum(-1).double().sum()
    loss.backward()
    return loss.detach(), gradients(lm)


@pytest.mark.parametrize("chunk", [4, 100], ids=["chunked", "dense"])
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_the_gradient_is_that_of_pefts_own_forward(
    model_folder: Callable[..., Path], arguments: dict[str, Any], packs: bool, chunk: int
) -> None:
    targets = ("all-linear",) if arguments.get("tie_word_embeddings") else ON_HEAD
    lm = adapted(model_folder(seed=3, **arguments), targets)
    check_head(lm)
    wanted_loss, wanted = by_pefts_own_forward(lm)
    lm.packs, lm.shared_prefixes = packs, packs and lm.shared_prefixes
    loss, found = through_the_core(lm, chunk)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() == lm.trainable().keys()
    assert any("lm_head.lora_B" in name for name in found) == ("lm_head" in targets)
    for name, gradient in found.items():
        assert float(wanted[name].abs().max()) > 0, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max()))
    # What is frozen has no gradient.
    assert all(parameter.grad is None for parameter in lm.weights().values())


def test_it_begins_as_the_model_it_is_put_into_and_by_its_seed(model_folder: Callable[..., Path]) -> None:
    folder, before = model_folder(seed=3, **UNTIED), torch.get_rng_state()
    plain, one, same, other = load(folder), load(folder), load(folder), load(folder)
    for lm, seed in ((one, 1), (same, 1), (other, 2)):
        add_adapter(lm, rank=2, alpha=4.0, targets=ON_HEAD, seed=seed)
    assert torch.equal(torch.get_rng_state(), before), "drawn from a stream of its own"
    assert one.digest() == same.digest() != other.digest()
    logits = [lm.model(input_ids=torch.arange(1, 9)[None]).logits for lm in (plain, one, other)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_switched_off_it_is_the_frozen_model_bit_for_bit(model_folder: Callable[..., Path], precision: str) -> None:
    folder = model_folder(seed=3, **UNTIED)
    plain, lm = load(folder, precision), adapted(folder, precision=precision)
    bare, before = lm.bare(), lm.digest()
    asked = sequences()
    with torch.no_grad(), lm.compute():
        wanted_ND, own_ND = plain.hidden(asked), lm.hidden(asked)
        wanted_NV, own_NV = plain.head().logits(wanted_ND), lm.head().logits(own_ND)
        with lm.without_adapter():
            with lm.without_adapter():
                pass
            assert torch.equal(lm.hidden(asked), wanted_ND), "leaving the inner one does not switch it on"
            assert torch.equal(lm.head().logits(wanted_ND), wanted_NV)
            assert all(parameter.requires_grad for parameter in lm.trainable().values())
        assert torch.equal(bare.hidden(asked), wanted_ND)
        assert torch.equal(lm.hidden(asked), own_ND), "and on again"
    assert torch.equal(bare.all_hidden(asked, 1 << 10), plain.all_hidden(asked, 1 << 10))
    assert bare.head().adapter is None
    assert lm.head().adapter is not None
    with plain.compute():
        assert torch.equal(bare.head().logits(wanted_ND), plain.head().logits(wanted_ND))
        assert torch.equal(lm.head().logits(own_ND), own_NV)
    assert not torch.allclose(own_NV, wanted_NV, atol=0.1), "an adapter that does nothing would prove nothing"
    assert bare.digest() == plain.digest() != lm.digest() == before
    assert bare.trainable() == {}
    assert bare.weights().keys() == plain.weights().keys()
    assert all(parameter.requires_grad for parameter in lm.trainable().values())
    with pytest.raises(UserError, match="learns without an adapter"):
        plain.bare()


def test_a_teacher_may_be_asked_between_the_students_passes(model_folder: Callable[..., Path]) -> None:
    lm = adapted(model_folder(seed=3, **UNTIED))
    wanted = through_the_core(lm, 4)[1]
    lm.model.zero_grad()
    hidden_ND = lm.hidden(sequences())
    lm.bare().all_hidden(sequences(), 20)
    hidden_ND.sum().backward()
    assert gradients(lm).keys() == {name for name in wanted if "lm_head" not in name}


def test_both_write_what_they_score(model_folder: Callable[..., Path]) -> None:
    lm = adapted(model_folder(seed=3, **UNTIED))
    requests = [
        Request(TokenSequence.of([5 + n, 9, 12][: 1 + n % 3]), uniforms(0, "rollouts", n, count=8)) for n in range(6)
    ]
    found = []
    for who in (lm, lm.bare()):
        written = HFEngine(who, vocab=lm.head().width, max_parallel=3).generate(requests, Sampling(8))
        found.append([answer.ids for answer in written])
        for request, answer in zip(requests, written, strict=True):
            with torch.no_grad():
                logits = who.head().logits(who.hidden([request.context.then(answer.ids, decided=True)]))
            again = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(answer.logp_A, again, rtol=1e-5, atol=1e-5)
    assert found[0] != found[1]


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_and_counts(model_folder: Callable[..., Path], rslora: bool) -> None:
    lm = adapted(model_folder(seed=3, **UNTIED), ("q_proj", "lm_head"), rank=4, alpha=8.0, rslora=rslora)
    low = lm.head().adapter
    assert low is not None
    assert low.scaling == (4.0 if rslora else 2.0)
    width = lm.head().width
    assert lm.trainable_parameters == 2 * (4 * 16 + 16 * 4) + 4 * 16 + width * 4
    assert lm.parameters == sum(p.numel() for p in lm.weights().values()), "an adapter's are not the model's"


def test_merged_weights_say_the_same(model_folder: Callable[..., Path]) -> None:
    lm = adapted(model_folder(seed=3, **UNTIED))
    assert lm.adapter is not None
    before, ids_RL = lm.digest(), torch.arange(1, 9)[None]
    plain = load(model_folder(seed=3, **UNTIED))
    plain.model.load_state_dict(lm.adapter.merged())
    torch.testing.assert_close(
        plain.model(input_ids=ids_RL).logits, lm.model(input_ids=ids_RL).logits, rtol=1e-4, atol=1e-4
    )
    assert lm.digest() == before


def test_what_is_refused(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def add(folder: Path, *targets: str) -> None:
        add_adapter(load(folder), rank=2, alpha=4.0, targets=targets)

    tied, untied = model_folder(seed=3, tie_word_embeddings=True), model_folder(seed=3, **UNTIED)
    with pytest.raises(UserError, match="'lm_head' is the head of .*, tied to the other end"):
        add(tied, *ON_HEAD)
    with pytest.raises(UserError, match="'embed_tokens' is the embedding of .*, tied to the other end"):
        add(tied, "embed_tokens")
    with pytest.raises(UserError, match="has no layer 'q_prj'; did you mean 'q_proj'"):
        add(untied, "q_prj")
    with pytest.raises(UserError, match=r"^lora.targets: [^\n]*not supported"):
        add(untied, "input_layernorm")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'retort-distill\[lora\]'"):
        add(untied, "q_proj")
