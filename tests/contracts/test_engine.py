"""What every engine must hold: order, chance, log-probs, stops, limits, media, versions. A new one is one line here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.vllm import PYTHON
from scripted import ScriptedEngine
from served import connected, in_thread
from support import make_tokenizer
from torch import Tensor

from retort.core.random_streams import uniforms
from retort.core.rollouts import Status
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.models.image_trials import with_images
from retort.models.images import made_up
from retort.models.load import load_model
from retort.rollout.engines.base import Completion, Engine, Request, Sampling, generated
from retort.rollout.engines.continuous import ContinuousEngine
from retort.rollout.engines.hf import HFEngine
from retort.rollout.engines.pool import PoolSettings, WorkerPool
from retort.rollout.engines.sample import nucleus
from retort.rollout.engines.served import ServedEngine
from retort.rollout.engines.vllm import VLLMEngine, VLLMSettings
from retort.rollout.engines.vllm_pool import VLLMPool

VOCAB = 58
ROOM = 12


@dataclass(frozen=True, eq=False)
class Case:
    """An engine, with what a test has to know of it.

    Attributes:
        engine: To be held to the contract.
        stops: Tokens that end a completion.
        logp: Log-probs [A, V] of every id before each of some ids written after a context, as drawn under a sampling.
        seen: Contexts with images, of which the first two differ in nothing else; empty for a model of text alone.
        until: Ends what the engine needs.
        draws: Whether it draws with each of a request's random numbers; else it has a sampler of its own.
    """

    engine: Engine
    stops: frozenset[int]
    logp: Callable[[TokenSequence, list[int], Sampling], Tensor]
    seen: tuple[TokenSequence, ...] = ()
    until: ExitStack = field(default_factory=ExitStack)
    draws: bool = True


def in_process(model_folder: Callable[..., Path], *_: Any, loops: bool) -> Case:
    return by_hf(model_folder(seed=5), loops=loops)


def of_images(_: Any, image_folder: Callable[[str], Path], *more: Any, loops: bool) -> Case:
    case = by_hf(image_folder("qwen3_vl"), loops=loops)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    images = [made_up(40, 24, 0), made_up(40, 24, 1), made_up(20, 70, 2)]
    shown = [[images[0]], [images[1]], [images[2], images[0]], [images[0]]]
    contexts = [with_images(lm, 2, own, 1, 4).read().then([9, 5 + n // 2]) for n, own in enumerate(shown)]
    return replace(case, seen=tuple(contexts))


def by_hf(folder: Path, *, loops: bool) -> Case:
    stops = list(range(2, VOCAB, 9))
    cpu = torch.device("cpu")
    lm = load_model(str(folder), role="student", precision="fp32", device=cpu, stop=stops)
    engine = HFEngine(lm, vocab=VOCAB, max_parallel=3)
    engine.loops = loops

    def logp(context: TokenSequence, ids: list[int], sampling: Sampling) -> Tensor:
        whole_1L = torch.cat([context.tokens_L, torch.tensor(ids)])[None]
        with torch.no_grad():
            logits_AV = lm.model(input_ids=whole_1L).logits[0, len(context) - 1 : -1, :VOCAB]
        return nucleus((logits_AV / sampling.temperature).log_softmax(-1), sampling.top_p)

    return Case(engine, frozenset(stops), logp)


def continuous(model_folder: Callable[..., Path], *_: Any) -> Case:
    case = in_process(model_folder, loops=True)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    return replace(case, engine=ContinuousEngine(lm, vocab=VOCAB, max_parallel=3))


def served(model_folder: Callable[..., Path], *_: Any) -> Case:
    case = in_process(model_folder, loops=True)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    url = case.until.enter_context(in_thread(lm))
    return replace(case, engine=ServedEngine(connected(url, lm), vocab=VOCAB, max_parallel=3))


def with_vllm(model_folder: Callable[..., Path], _: Any, folder: Path) -> Case:
    """vLLM on a CPU takes no head narrower than 32."""
    case = by_hf(model_folder(seed=5, head_dim=32), loops=True)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    engine = VLLMEngine(lm, VOCAB, VLLMSettings(str(PYTHON), max_parallel=8), probe=[TokenSequence.of([5, 9])])
    return replace(following(case, engine, folder), draws=False)


def with_workers(model_folder: Callable[..., Path], _: Any, folder: Path) -> Case:
    case = in_process(model_folder, loops=True)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    engine = WorkerPool(lm, VOCAB, PoolSettings(1, parallel=3), probe=[TokenSequence.of([5, 9])])
    return following(case, engine, folder)


def with_vllm_worker(model_folder: Callable[..., Path], _: Any, folder: Path) -> Case:
    """A process that has a vLLM of its own."""
    case = by_hf(model_folder(seed=5, head_dim=32), loops=True)
    lm: Any = case.engine.lm  # type: ignore[attr-defined]
    settings = PoolSettings(1, parallel=8, more=(f"--vllm={PYTHON}",))
    engine = VLLMPool(lm, VOCAB, settings, probe=[TokenSequence.of([5, 9])])
    return replace(following(case, engine, folder), draws=False)


def following(case: Case, engine: Any, folder: Path) -> Case:
    engine.open(folder / "engine")
    case.until.callback(engine.close)
    return replace(case, engine=engine)


def scripted(*_: Any) -> Case:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    logits_V[2] = 2.0
    engine = ScriptedEngine(make_tokenizer(), 2, logits_V)
    return Case(engine, frozenset({2}), lambda context, ids, sampling: engine.logp(sampling).expand(len(ids), -1))


ENGINES: dict[str, Callable[..., Case]] = {
    "in this process": lambda *more: in_process(*more, loops=True),
    "in this process, by generate": lambda *more: in_process(*more, loops=False),
    "of images": lambda *more: of_images(*more, loops=True),
    "of images, by generate": lambda *more: of_images(*more, loops=False),
    "continuous": continuous,
    "served": served,
    "scripted": scripted,
    "workers": with_workers,
}


#: Those whose tests are in the tier that has vLLM.
VLLM: dict[str, Callable[..., Case]] = {"vLLM": with_vllm, "workers with vLLM": with_vllm_worker}


@pytest.fixture(scope="module", params=[*ENGINES, *(pytest.param(name, marks=pytest.mark.engines) for name in VLLM)])
def kept(
    request: pytest.FixtureRequest, model_folder: Any, image_folder: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """One engine for all tests."""
    folder = tmp_path_factory.mktemp("engine")
    found = {**ENGINES, **VLLM}[request.param](model_folder, image_folder, folder)
    with found.until:
        yield found


@pytest.fixture
def case(kept: Case) -> Case:
    kept.engine.update(0)
    return kept


def requests(count: int = 7, room: int = ROOM) -> list[Request]:
    """Contexts of several lengths, some of them the same, and one that is a conversation already."""
    contexts = [TokenSequence.of([5 + n % 3, 9, 12, 7][: 1 + n % 4]) for n in range(count)]
    contexts[2] = contexts[2].then([8, 2], decided=True).then([30, 31])
    return [Request(own, uniforms(0, "rollouts", n, count=room)) for n, own in enumerate(contexts)]


def test_each_completion_is_its_own_requests_whatever_is_beside_it_and_in_order(case: Case) -> None:
    asked, sampling = requests(), Sampling(ROOM, 1.3)
    together = case.engine.generate(asked, sampling)
    assert len({tuple(own.ids) for own in together}) > 3
    turned = case.engine.generate(asked[::-1], sampling)[::-1]
    assert [own.ids for own in turned] == [own.ids for own in together]
    alone = [case.engine.generate([one], sampling)[0] for one in asked[:4]]  # a context of each length
    for one, three in zip(together, alone, strict=False):
        assert one.ids == three.ids
        torch.testing.assert_close(one.logp_A, three.logp_A, rtol=1e-4, atol=1e-5)


def test_the_same_numbers_give_the_same_completion_and_others_another(case: Case) -> None:
    """Which completion it is, an engine with a sampler of its own (vLLM) decides by itself."""
    asked, others = requests(), [replace(own, uniforms=own.uniforms.flip(0)) for own in requests()]
    one, two, three = (case.engine.generate(own, Sampling(ROOM, 1.3)) for own in (asked, asked, others))
    assert [own.ids for own in one] == [own.ids for own in two]
    assert sum(own.ids != other.ids for own, other in zip(one, three, strict=True)) > 3


def test_which_tokens_were_decided_changes_nothing(case: Case) -> None:
    asked = requests()
    read = [Request(own.context.read(), own.uniforms) for own in asked]
    one, two = (case.engine.generate(own, Sampling(ROOM)) for own in (asked, read))
    assert [own.ids for own in one] == [own.ids for own in two]


@pytest.mark.parametrize("sampling", [Sampling(ROOM), Sampling(ROOM, 0.7, 0.8)], ids=["as it is", "bent"])
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(case: Case, sampling: Sampling) -> None:
    for request, found in zip(requests(), case.engine.generate(requests(), sampling), strict=True):
        logp_AV = case.logp(request.context, found.ids, sampling)
        assert found.logp_A.dtype == torch.float32
        torch.testing.assert_close(
            found.logp_A, logp_AV.gather(1, torch.tensor(found.ids)[:, None]).squeeze(1), rtol=1e-3, atol=1e-4
        )


def test_a_stop_is_included_ends_it_and_is_what_completed_means(case: Case) -> None:
    found = case.engine.generate(requests(24), Sampling(ROOM, 1.3))
    assert {own.status for own in found} == {Status.COMPLETED, Status.TRUNCATED}
    for own in found:
        ends = [token in case.stops for token in own.ids]
        assert ends == [False] * (len(ends) - 1) + [own.status == Status.COMPLETED]
        assert len(own.ids) == len(own.logp_A) <= ROOM
        assert own.status == Status.COMPLETED or len(own.ids) == ROOM


def test_a_shorter_limit_only_cuts_and_each_request_may_have_its_own(case: Case) -> None:
    whole = case.engine.generate(requests(), Sampling(ROOM))
    by_sampling = case.engine.generate(requests(), Sampling(3))
    rooms = [1 + n % 5 for n in range(7)]
    own_room = [Request(one.context, one.uniforms[:room]) for one, room in zip(requests(), rooms, strict=True)]
    by_numbers = case.engine.generate(own_room, Sampling(ROOM))
    for found, limits in ((by_sampling, [3] * 7), (by_numbers, rooms)):
        for cut, one, room in zip(found, whole, limits, strict=True):
            assert cut.ids == one.ids[:room]
            assert len(cut.logp_A) == len(cut.ids)
            assert cut.status == (one.status if len(one.ids) <= room else Status.TRUNCATED)
    assert any(len(cut.ids) < len(one.ids) for cut, one in zip(by_numbers, whole, strict=True))


def test_a_completion_that_is_resumed_is_the_same_one(case: Case) -> None:
    """It goes on behind its first tokens, with the random numbers of the others."""
    whole = case.engine.generate(requests(), Sampling(ROOM, 1.3))
    rooms = [len(own.ids) // 2 for own in whole]
    going = [n for n, room in enumerate(rooms) if room]
    assert len(going) > 3
    behind = [
        Request(own.context.then(whole[n].ids[: rooms[n]], decided=True), own.uniforms[rooms[n] :])
        for n, own in enumerate(requests())
        if n in going
    ]
    resumed, again = (case.engine.generate(behind, Sampling(ROOM, 1.3)) for _ in range(2))
    assert [own.ids for own in resumed] == [own.ids for own in again]
    for n, more in zip(going, resumed, strict=True):
        assert 0 < len(more.ids) == len(more.logp_A) <= ROOM - rooms[n]
        assert more.status == Status.COMPLETED or len(more.ids) == ROOM - rooms[n]
        if case.draws:
            assert (more.ids, more.status) == (whole[n].ids[rooms[n] :], whole[n].status)
            torch.testing.assert_close(more.logp_A, whole[n].logp_A[rooms[n] :], rtol=1e-4, atol=1e-5)


def test_media_are_read_or_refused(case: Case) -> None:
    """Two requests that differ in nothing but an image must not get one answer without a word."""
    foreign = [Request(TokenSequence.of([5, 6], (Media(name, 1),)), torch.full((4,), 0.5).double()) for name in "ab"]
    with pytest.raises(UserError, match=r"(holds an image, a sound or a video)|(holds a sound or a video, which)"):
        case.engine.generate(foreign, Sampling(4))
    if not case.seen:
        assert case.engine.image_tokens is None
        return
    assert case.engine.image_tokens is not None
    asked = [Request(own, torch.full((4,), 0.5).double()) for own in case.seen[:2]]
    one, two = case.engine.generate(asked, Sampling(4))
    assert abs(float(one.logp_A[0] - two.logp_A[0])) > 1e-4


def test_images_are_each_completions_own_whatever_is_beside_it(case: Case) -> None:
    if not case.seen:
        return
    contexts = [*case.seen, TokenSequence.of([5, 6, 9]), *case.seen]
    asked = [Request(own, uniforms(0, "rollouts", n, count=ROOM)) for n, own in enumerate(contexts)]
    together = case.engine.generate(asked, Sampling(ROOM, 1.3))
    alone = [case.engine.generate([one], Sampling(ROOM, 1.3))[0] for one in asked[::-1]][::-1]
    assert len({tuple(own.ids) for own in together}) > 3
    for one, two in zip(together, alone, strict=True):
        assert one.ids == two.ids
        torch.testing.assert_close(one.logp_A, two.logp_A, rtol=1e-4, atol=1e-5)


def test_an_id_that_it_cannot_read_is_refused(case: Case) -> None:
    asked = Request(TokenSequence.of([5, 10_000]), torch.full((4,), 0.5).double())
    with pytest.raises(UserError, match="a prompt holds"):
        case.engine.generate([asked], Sampling(4))


def test_completions_say_which_weights_wrote_them(case: Case) -> None:
    assert {own.version for own in case.engine.generate(requests(), Sampling(2))} == {0}
    case.engine.update(7)
    assert {own.version for own in case.engine.generate(requests(), Sampling(2))} == {7}


def test_each_completion_is_told_once_in_the_thread_of_the_caller(case: Case) -> None:
    told: dict[int, list[Completion]] = {}

    def take(place: int, completion: Completion) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.setdefault(place, []).append(completion)

    found = generated(case.engine, requests(), Sampling(ROOM, 1.3), take)
    assert all(told.pop(place) == [own] for place, own in enumerate(found)) and not told
    assert [own.ids for own in found] == [own.ids for own in case.engine.generate(requests(), Sampling(ROOM, 1.3))]


def test_nothing_asked_is_nothing_written(case: Case) -> None:
    assert case.engine.generate([], Sampling(4)) == []
    assert case.engine.context > 0
    assert case.engine.tokenizer.decode([6])


def test_kept_weights_are_those_that_the_model_had_whatever_it_has_learnt_since(case: Case) -> None:
    """For engines with a copy. It is the last test, because `close` ends what the others share."""
    engine: Any = case.engine
    if not hasattr(engine, "keep"):
        return
    weight = engine.lm.model.get_output_embeddings().weight
    before, own = case.engine.generate(requests(), Sampling(ROOM)), weight.detach().clone()
    try:
        engine.keep(3)
        with torch.no_grad():
            weight.mul_(-1.0)
        engine.keep(4)
        with torch.no_grad():
            weight.zero_()
        floor = engine.noise_floor
        for version, same in ((3, True), (4, False)):
            engine.update(version)
            found = case.engine.generate(requests(), Sampling(ROOM))
            assert {one.version for one in found} == {version}
            assert ([one.ids for one in found] == [one.ids for one in before]) is same
        assert engine.noise_floor == floor
    finally:
        with torch.no_grad():
            weight.copy_(own)
        engine.close()
