"""The decode loop against transformers' own `generate`, and what it does not waste."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from retort.core.random_streams import uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.rollout.engines import hf
from retort.rollout.engines.decode import can_decode, decode
from retort.rollout.engines.hf import HFEngine, Request, Sampling
from retort.rollout.engines.kv import RoomyLayer, roomy_cache
from retort.rollout.engines.sample import sample

FAMILIES: list[dict[str, Any]] = [
    {"family": "qwen3"},
    {"family": "llama", "num_key_value_heads": 2},
    {"family": "gemma2", "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 5},
    {"family": "cohere", "logit_scale": 0.25},
    {"family": "granite", "logits_scaling": 4.0},
]
LONGEST = 12


def load(folder: Path, stop: Sequence[int] | None = None) -> LanguageModel:
    return load_model(str(folder), role="student", precision="fp32", device=torch.device("cpu"), stop=stop)


def requests(lengths: list[int]) -> list[Request]:
    return [
        Request(
            TokenSequence.of([5 + (n + place) % 40 for place in range(length)]),
            uniforms(0, "rollouts", n, count=LONGEST),
        )
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("lengths", [[3] * 8, [1, 4, 2, 9, 7, 3, 3, 6]], ids=["equal", "padded"])
@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: arguments["family"])
def test_the_loop_writes_what_generate_writes(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], lengths: list[int]
) -> None:
    lm = load(model_folder(seed=5, **arguments), stop=list(range(2, 58, 7)))
    with torch.no_grad():
        assert can_decode(lm)
    engine = HFEngine(lm, vocab=58, max_parallel=8)
    ours = engine.generate(requests(lengths), Sampling(LONGEST, 1.2))
    monkeypatch.setattr("retort.rollout.engines.decode.can_decode", lambda lm: False)
    lm.trials.clear()
    usual = HFEngine(lm, vocab=58, max_parallel=8)
    theirs = usual.generate(requests(lengths), Sampling(LONGEST, 1.2))
    assert (engine.loops, usual.loops) == (True, False)
    for one, two in zip(ours, theirs, strict=True):
        assert one.ids == two.ids
        assert one.status == two.status
        torch.testing.assert_close(one.logp_A, two.logp_A, rtol=1e-4, atol=1e-5)
    assert len({len(answer.ids) for answer in ours}) > 1, "no row ended before another"


def test_a_model_is_tried_once_for_all_engines_and_again_in_another_arithmetic(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, tried = load(model_folder(seed=5)), list[str]()
    monkeypatch.setattr("retort.rollout.engines.decode.can_decode", lambda lm: tried.append(lm.precision) is None)
    for precision in ("fp32", "fp32", "bf16", "fp32"):
        lm.precision = precision
        HFEngine(lm, vocab=58, max_parallel=8).generate(requests([2]), Sampling(1))
    assert tried == ["fp32", "bf16"]


def test_a_family_that_prepares_its_own_inputs_is_left_to_generate(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=5))

    class Other(type(lm.model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
            return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **more)

    lm.model.__class__ = Other
    assert not can_decode(lm)
    answers = HFEngine(lm, vocab=58, max_parallel=8).generate(requests([2, 3]), Sampling(4))
    assert all(1 <= len(answer.ids) <= 4 for answer in answers)


def test_a_state_that_no_cache_knows_of_is_noticed(model_folder: Callable[..., Path]) -> None:
    """Such as RecurrentGemma's, which lies in its layers: when rows leave, the states of others take their place."""
    lm = load(model_folder(seed=5))
    layer, kept = lm.model.base_model.layers[0], {}

    def stateful(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 1:
            return output + kept["last"][: len(output)]
        kept["last"] = output[:, -1:].detach()
        return output

    with torch.no_grad():
        assert can_decode(lm)
        layer.register_forward_hook(stateful)
        assert not can_decode(lm)


@pytest.mark.parametrize("arguments", FAMILIES, ids=lambda arguments: arguments["family"])
def test_answers_to_one_prompt_read_it_once(model_folder: Callable[..., Path], arguments: dict[str, Any]) -> None:
    lm = load(model_folder(seed=5, **arguments), stop=list(range(2, 58, 7)))
    prompts = [[5, 9, 6, 8, 11, 12], [7, 9], [5, 9, 6, 8, 11, 12], [7, 9], [30, 31, 32], [7, 9]]
    asked = [Request(TokenSequence.of(ids), uniforms(0, "rollouts", n, count=LONGEST)) for n, ids in enumerate(prompts)]
    engine = HFEngine(lm, vocab=58, max_parallel=6)
    alone = [engine.generate([one], Sampling(LONGEST, 1.2))[0] for one in asked]
    rows: list[tuple[int, ...]] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = engine.generate(asked, Sampling(LONGEST, 1.2))
    assert rows[0] == (3, 6)
    for one, two in zip(together, alone, strict=True):
        assert one.ids == two.ids
        torch.testing.assert_close(one.logp_A, two.logp_A, rtol=1e-4, atol=1e-5)


def test_rows_that_are_done_leave_the_batch(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=5))
    rows: list[int] = []
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    stop = lm.stops.primary

    def draw(logits_BV: torch.Tensor, row_B: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(row_B <= step, stop, 7), torch.zeros(len(row_B))

    with torch.no_grad():
        ids_BA, _ = decode(lm, [TokenSequence.of([5, 6 + row]) for row in range(5)], draw, 58, 9)
    assert rows == [5, 4, 3, 2, 1]
    for row, ids in enumerate(ids_BA.tolist()):
        assert ids[: row + 1] == [7] * row + [stop]


def test_the_cache_holds_what_the_usual_one_holds_and_does_not_move(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=5))
    ours, theirs = roomy_cache(lm, 200), DynamicCache(config=lm.model.config)
    assert all(isinstance(layer, RoomyLayer) for layer in ours.layers)
    draw = torch.Generator().manual_seed(0)
    places = []
    for count in (70, *[1] * 80):
        keys, values = (torch.randn(4, 1, count, 8, generator=draw) for _ in range(2))
        for one, two in zip(ours.update(keys, values, 0), theirs.update(keys, values, 0), strict=True):
            assert torch.equal(one, two)
        places.append(ours.layers[0].keys.data_ptr())
    assert len(set(places)) == 2, "moved more often than its room was doubled"
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([0, 2]))  # type: ignore[arg-type]
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
    assert ours.get_seq_length() == theirs.get_seq_length() == 150
    keys, values = (torch.randn(2, 1, 1, 8, generator=draw) for _ in range(2))
    assert torch.equal(ours.update(keys, values, 0)[1], theirs.update(keys, values, 0)[1])


def test_what_was_written_can_be_learnt_from(model_folder: Callable[..., Path]) -> None:
    """Writing runs in inference mode; nothing of it may reach a graph."""
    lm = load(model_folder(seed=5))
    lm.model.train()
    answers = HFEngine(lm, vocab=58, max_parallel=8).generate(requests([2, 3, 4]), Sampling(LONGEST))
    assert lm.model.training
    assert not any(answer.logp_A.is_inference() for answer in answers)
    lm.hidden([TokenSequence.of([5, 6]).then(answer.ids, decided=True) for answer in answers]).sum().backward()


def test_sampling_by_the_engine_is_sampling_by_hand(model_folder: Callable[..., Path]) -> None:
    lm = load(model_folder(seed=5))
    asked = requests([3, 5])
    for answer, request in zip(
        hf.HFEngine(lm, vocab=58, max_parallel=8).generate(asked, Sampling(3, 0.7, 0.9)),
        asked,
        strict=True,
    ):
        ids = request.context.tokens_L.tolist()
        for step, token in enumerate(answer.ids):
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([ids])).logits[:, -1, :58]
            assert int(sample(logits, request.uniforms[step : step + 1], 0.7, 0.9)[0]) == token
            ids.append(token)
