"""The working copy in bf16: the same bits as autocast's own casts, cast once per update, never stale."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retort.align.stops import StopTokens
from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.lora import add_adapter
from retort.models.working import WorkingCopy
from retort.rollout.engines.hf import HFEngine, Request, Sampling
from retort.teachers.itself import OwnWeights
from retort.teachers.moving import ema, live

MIXTURE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
FAMILIES: list[dict[str, Any]] = [
    {"family": "qwen3", "tie_word_embeddings": True},
    {"family": "qwen3", "tie_word_embeddings": False, "attention_bias": True},
    {"family": "llama", "tie_word_embeddings": False},
    {"family": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    {"family": "cohere", "logit_scale": 0.25},
    {"family": "granite", "logits_scaling": 4.0},
    {"family": "qwen3_moe", **MIXTURE},
]


def load(folder: Path, role: str = "student") -> LanguageModel:
    return load_model(str(folder), role=role, precision="bf16", device=torch.device("cpu"))  # type: ignore[arg-type]


class NoCopy(WorkingCopy):
    """Autocast alone: the definition."""

    @contextlib.contextmanager
    def in_place(self, model: Any, probe: Callable[[], Tensor]) -> Iterator[None]:
        yield


class Casts(TorchDispatchMode):
    """Shapes of what is cast to bf16, and how often anything is."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype) and args[0].dtype == torch.float32:
            self.shapes += [args[0].shape] if out.dtype == torch.bfloat16 else []
        return out

    def of(self, lm: LanguageModel) -> int:
        """Casts of what has the shape of a weight with rows."""
        weights = {p.shape for p in lm.model.parameters() if p.ndim > 1}
        return sum(shape in weights for shape in self.shapes)


def said(lm: LanguageModel) -> list[Tensor]:
    """Everything that is computed without gradients: answers with their log-probs, hidden states, logits."""
    vocab = lm.head().width - 3
    requests = [
        Request(TokenSequence.of([5 + n, 9, 12][: 1 + n % 3]), uniforms(0, "rollouts", n, count=6)) for n in range(5)
    ]
    written = HFEngine(lm, vocab=vocab, max_parallel=3).generate(requests, Sampling(6))
    sequences = [
        TokenSequence.of([5, 9]).then([12, 7, 20], decided=True),
        TokenSequence.of([6]).then([8, 30], decided=True),
    ]
    hidden_ND = lm.all_hidden(sequences, 16)
    with torch.no_grad(), lm.compute():
        logits_NV = lm.head().logits(hidden_ND, vocab)
    return [
        torch.tensor([token for w in written for token in w.ids]),
        *(w.logp_A for w in written),
        hidden_ND,
        logits_NV,
    ]


def same(lm: LanguageModel) -> bool:
    """Whether copies change nothing, bit by bit."""
    mine = said(lm)
    copies, lm.working = lm.working, NoCopy()
    try:
        return all(torch.equal(a, b) for a, b in zip(mine, said(lm), strict=True))
    finally:
        lm.working = copies


@torch.no_grad()
def move(lm: LanguageModel) -> None:
    """As an optimizer does."""
    for parameter in lm.trainable().values():
        parameter.add_(torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter), alpha=0.1)


@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: "-".join(map(str, arguments.values()))[:24])
def test_copies_say_the_same_bit_by_bit_before_and_after_an_update(
    model_folder: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    lm = load(model_folder(seed=3, **arguments))
    assert same(lm)
    kept = {id(lm.model.get_input_embeddings().weight)} if not lm.model.config.tie_word_embeddings else set()
    rows = [p for p in lm.model.parameters() if p.ndim == 2 and id(p) not in kept]
    assert sum(lm.working_bytes()) >= 2 * sum(p.numel() for p in rows), "a weight is cast anew for every token"
    before = said(lm)
    move(lm)
    assert same(lm)
    assert not all(torch.equal(a, b) for a, b in zip(before, said(lm), strict=False))


def written(lm: LanguageModel, longest: int) -> Casts:
    engine = HFEngine(lm, vocab=lm.head().width - 3, max_parallel=4)
    engine.loops = True  # its own trial is no part of what is counted
    requests = [Request(TokenSequence.of([5, 9, 12]), uniforms(0, "rollouts", n, count=longest)) for n in range(2)]
    with Casts() as casts:
        engine.generate(requests, Sampling(longest))
    return casts


def test_weights_are_cast_once_per_update_and_not_per_token(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=3, intermediate_size=40, tie_word_embeddings=True))
    lm.stops = StopTokens(frozenset({lm.head().width - 1}), lm.head().width - 1)  # never drawn: nobody stops early
    written(lm, 2)
    assert written(lm, 6).of(lm) == 0
    move(lm)
    layers = sum(isinstance(module, torch.nn.Linear) for module in lm.model.modules())
    assert written(lm, 6).of(lm) == layers
    assert written(lm, 9).of(lm) == 0
    lm.working = NoCopy()
    again = written(lm, 9).of(lm) - written(lm, 6).of(lm)
    assert again == 3 * (layers - 1), "the test would not see a cast (but for the head's, of which a part is cast)"


def test_an_adapters_copies_follow_it_and_the_frozen_weights_are_cast_once_for_ever(
    model_folder: Callable[..., Path],
) -> None:
    pytest.importorskip("peft", reason="needs the extra 'lora'")
    lm = load(model_folder(seed=3, tie_word_embeddings=False))
    add_adapter(lm, rank=2, alpha=4.0, targets=["all-linear", "lm_head"])
    assert same(lm)
    before = said(lm)
    frozen = {key: cast.copy for key, cast in lm.working._casts.items() if not cast.of.requires_grad}
    move(lm)
    assert same(lm)
    assert not torch.equal(before[-1], said(lm)[-1])
    assert same(lm.bare())
    assert not torch.equal(said(lm.bare())[-1], said(lm)[-1])
    with lm.compute():  # as learning enters it
        pass
    assert {key: cast.copy for key, cast in lm.working._casts.items()} == frozen
    assert sum(2 * copy.numel() for copy in frozen.values()) == lm.working_bytes()[1] > 0


def test_parameters_that_are_replaced_get_copies_of_their_own(model_folder: Callable[..., Path]) -> None:
    """As ranks replace them, which gather weights from the slices that each keeps."""
    lm = load(model_folder(seed=3, tie_word_embeddings=True))
    before, others = said(lm), dict[int, torch.nn.Parameter]()
    for module in lm.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                other = torch.nn.Parameter(1.5 * parameter.detach())
                module._parameters[name] = others.setdefault(id(parameter), other)
    assert same(lm)
    assert not torch.equal(before[-1], said(lm)[-1])
    assert {id(slot.parameter) for slot in lm.working._slots[1]} <= {id(parameter) for parameter in others.values()}


def test_learning_has_gradients_of_the_weights_themselves_and_no_copies_beside_it(
    model_folder: Callable[..., Path],
) -> None:
    lm = load(model_folder(seed=3))
    said(lm)
    assert lm.working._casts
    sequences = [TokenSequence.of([5]).then([9, 12, 7], decided=True)]
    with lm.compute():
        lm.head().logits(lm.hidden(sequences)).float().square().sum().backward()
    assert not lm.working._casts
    assert all(p.grad is not None and p.dtype == torch.float32 for p in lm.trainable().values())
    with torch.no_grad(), lm.compute(), torch.enable_grad(), pytest.raises(RuntimeError, match="gradients"):
        lm.hidden(sequences)


def test_weights_put_in_the_place_of_the_students_are_seen(model_folder: Callable[..., Path]) -> None:
    """A self-teacher points the parameters elsewhere, and moves what it keeps where no parameter shows it."""
    lm = load(model_folder(seed=3))
    own = OwnWeights(lm, [ema(0.5)])
    logits: list[Tensor] = []
    for update in range(1, 4):
        move(lm)
        own.moved(update)
        for weights in (ema(0.5), live()):
            with own.in_place(weights):
                assert same(lm)
                logits.append(said(lm)[-1])
    assert len({tuple(x.flatten().tolist()) for x in logits}) == 6, "six weights, and not six answers"
    saved = {name: tensor.clone() for name, tensor in own.tensors().items()}
    with own.in_place(ema(0.5)):
        said(lm)
    own.restore({name: tensor + 0.25 for name, tensor in saved.items()})
    with own.in_place(ema(0.5)):
        assert same(lm)


def test_a_family_that_does_more_with_a_weight_than_multiply_keeps_it(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=3))
    layer: Any = lm.model.base_model.layers[0].mlp
    up = layer.up_proj.forward
    layer.up_proj.forward = lambda x: up(x) * layer.up_proj.weight.norm()
    lm.working = WorkingCopy()
    assert same(lm)
    kept = {id(cast.of) for cast in lm.working._casts.values()}
    assert id(layer.up_proj.weight) not in kept
    assert id(layer.down_proj.weight) in kept


def test_a_teacher_in_bf16_has_no_copies(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=3), role="teacher")
    assert said(lm)
    assert not lm.working._casts
    assert lm.working_bytes() == (0, 0)
