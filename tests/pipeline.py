"""One training step through the real pipeline and in the plain way, for any method, on tiny models in float64.

The real way is that of a run: `prepare`, the teachers' answers, the score pass, controllers, packs, micro-batches and
`learn`. The plain way is one padded forward pass of each model and `token_losses`. What another kind of view needs
beyond a model and a rendering of the prompt belongs into `read_by`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ruled import judged
from torch import Tensor

from retort import config as configuration
from retort import registry
from retort.core.losses import TokenLosses
from retort.core.rollouts import Pack, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Ahead, Dense
from retort.core.steps import Clock
from retort.functional import token_losses
from retort.method import Method
from retort.models.lm import LanguageModel
from retort.models.sharding import Sharding
from retort.models.working import WorkingCopy
from retort.teachers.base import most_ahead
from retort.teachers.itself import SelfTeacher
from retort.teachers.local import LocalTeacher
from retort.train.learning.control import Control
from retort.train.learning.passes import Batch
from retort.train.learning.update import Update, learn
from retort.train.models import loading, models
from retort.train.setup.pair import teacher_use
from retort.train.setup.prepare import Prepared, prepare
from retort.train.storage.metrics import Stopwatch
from retort.wire import is_url

#: Tokens of each answer. Ragged, with one that is a single token, and a second answer to the first prompt.
LENGTHS = (7, 3, 1, 12, 5)
PROMPTS = (0, 0, 1, 2, 3)
#: Tokens of each turn of the answers that are episodes: three, two, one of which is a single token.
TURNS: Mapping[int, tuple[int, ...]] = {0: (4, 1, 2), 3: (5, 7)}
#: Not the first batch, so that dials that move are somewhere between their ends.
CLOCK = Clock(3, 10)


@dataclass(frozen=True)
class Step:
    """What a training step came to: its loss, and the gradient of every parameter by name."""

    loss: float
    gradients: Mapping[str, Tensor]


class Noted(torch.optim.Optimizer):
    """Writes down gradients and moves nothing, so that every update of a batch is one of the same student."""

    def __init__(self, student: LanguageModel) -> None:
        named = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        super().__init__(list(named.values()), {"lr": 0.0, "betas": (0.9, 0.999)})
        self.named, self.seen = named, list[dict[str, Tensor]]()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})


def prepared(settings: Mapping[str, Any], method: str, **given: Any) -> Prepared:
    """A run's parts, ready for `learn` to make two updates on one batch."""
    sections: dict[str, Any] = {
        "method": {"name": method, **given},
        "optimizer": {"updates": 1, "epochs": 2, "grad_clip": 1e9},
        "eval": {"problems": 0},
        "record": {"overlap": 0},
    }
    settings = for_method(settings, registry.load(method, **given))
    with models_once(torch.float64):
        return prepare(configuration.resolve(configuration.merge(settings, sections)))


def for_method(settings: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Settings without the teacher that a method does not ask, with the further ones and the judge that it does."""
    found = {name: value for name, value in settings.items() if name != "teacher" or teacher_use(method) is not None}
    asked = {model for view in method.views.values() for model in view.models}
    more = {name: {"path": settings["student"]} for name in sorted(asked) if name.startswith("teacher_")}
    return judged(found | ({"models": more} if more else {}), method)


def ragged(setup: Prepared, turns: Mapping[int, tuple[int, ...]] | None = None) -> Pack:
    """Answers of random tokens, the student's and (where the method learns from such) the data's.

    Args:
        setup: The parts of a run.
        turns: Tokens of each turn of the answers that are episodes, such as `TURNS`; random tokens reply to a turn.
    """
    draw, rollouts = torch.Generator().manual_seed(0), list[Rollout]()
    given = "dataset" in setup.method.rollout.sources
    for index, (length, place) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        prompt = setup.source.prompts[place]
        ids: list[int] = torch.randint(5, setup.learner.vocab, (length,), generator=draw).tolist()
        logp_A = -3.0 * torch.rand(length, generator=draw)
        lengths = (turns or {}).get(index, (length,))
        rollout = Rollout(
            prompt,
            _conversation(setup.source.render(prompt), ids, lengths),
            turn_A=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) if turns else None,
            member=index,
            engine_logp_A=logp_A,
            text=setup.student.tokenizer.decode(ids),
            reward=float(index % 2),
        )
        by_data = given and index == len(LENGTHS) - 1
        rollouts.append(replace(rollout, engine_logp_A=None, source="dataset") if by_data else rollout)
    groups = setup.teachers.with_passages(setup.method, in_groups(rollouts))
    return Pack.of([rollout for group in groups for rollout in group])


def _conversation(found: TokenSequence, ids: list[int], lengths: tuple[int, ...]) -> TokenSequence:
    """A prompt, turns of these lengths after it, and replies between them, of tokens that the first turn has, too."""
    for turn, own in enumerate(torch.tensor(ids).split(lengths)):
        found = (found if turn == 0 else found.then(ids[: 1 + turn])).then(own.tolist(), decided=True)
    return found


def even(setup: Prepared, seed: int) -> Pack:
    """Four answers that the student draws, of three tokens each, to prompts drawn with replacement."""
    draw = torch.Generator().manual_seed(seed)
    given = setup.source.prompts
    prompts = [given[place] for place in torch.randint(len(given), (4,), generator=draw).tolist()]
    tokens_RL = torch.tensor([setup.source.render(prompt).ids for prompt in prompts])  # all of one length
    acted_L = torch.arange(tokens_RL.shape[1] + 3) >= tokens_RL.shape[1]
    for _ in range(3):
        with torch.no_grad():
            logits_RV = setup.student.model(input_ids=tokens_RL).logits[:, -1, : setup.learner.vocab]
        tokens_RL = torch.cat([tokens_RL, torch.multinomial(logits_RV.softmax(-1), 1, generator=draw)], dim=1)
    return Pack.of([Rollout(prompt, TokenSequence(tokens_RL[i], acted_L), visit=i) for i, prompt in enumerate(prompts)])


def cut_to(setup: Prepared, batch_tokens: int) -> Prepared:
    """With so many tokens per forward pass."""
    passes = replace(setup.learner.passes, batch_tokens=batch_tokens)
    return replace(setup, learner=replace(setup.learner, passes=passes))


def scored(setup: Prepared, pack: Pack) -> Batch:
    """A batch with all that a run knows of it before it learns."""
    method, learner, groups = setup.method, setup.learner, in_groups(pack.rollouts)
    control = Control(method.controllers, setup.config.seed)
    longest, seed = setup.source.limit, setup.config.seed
    clock = replace(CLOCK, controller_outputs=control.controller_outputs(method), longest=longest, seed=seed)
    needs = setup.teachers.wanted(method, clock.step)
    signals = setup.teachers.score(method, groups, needs, partial(learner.top_ids, method, groups))
    return control.act(learner.score(method, groups, signals, clock), learner)


def learnt(setup: Prepared, batch: Batch) -> list[Step]:
    """The updates that a run makes on it."""
    noted = Noted(setup.student)
    update = Update(setup.learner.passes, setup.learner.settings, noted, lambda step: 1.0)
    _, means, _ = learn(update, batch, 0, Stopwatch())
    return [Step(means.values()["loss"], gradients) for gradients in noted.seen]


def as_run(setup: Prepared, pack: Pack, batch_tokens: int) -> list[Step]:
    """The updates that a run makes on some rollouts, at so many tokens per forward pass."""
    setup = cut_to(setup, batch_tokens)
    return learnt(setup, scored(setup, pack))


def by_padding(setup: Prepared, pack: Pack) -> Step:
    """The same in the plain way."""
    losses = padded_losses(setup, pack)
    named = {n: p for n, p in setup.student.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(losses.loss, list(named.values()), allow_unused=True)
    return Step(losses.loss.item(), {n: g for n, g in zip(named, found, strict=True) if g is not None})


def padded_losses(setup: Prepared, pack: Pack) -> TokenLosses:
    """One padded forward pass of every model, and the definition of the losses."""
    logits, hidden_ND = _padded(setup.student, [own.tokens_L for own in pack.sequences], pack)
    views: dict[str, Any] = {}
    for name in setup.method.views:
        lm, sequences, valid_N = read_by(setup, name, pack)
        with torch.no_grad():
            logits_NV, states_ND = _padded(lm, sequences, pack)
        temperature = setup.method.temperature
        shared_NV = logits_NV[:, : setup.learner.vocab]
        said = Dense.of(shared_NV, pack.steps.tokens_N, temperature=temperature, hidden_ND=states_ND)
        said = replace(said, valid_N=valid_N)
        k = most_ahead(setup.method.needs(name))
        if k:
            ids_NK = logits[:, : setup.learner.vocab].detach().topk(k).indices
            sure_NK = _ahead(lm, sequences, pack, ids_NK, setup.learner.vocab)
        views[name] = Ahead.beside(said, ids_NK, sure_NK) if k else said
    return token_losses(
        setup.method,
        student_logits=logits[:, : setup.learner.vocab],
        student_hidden=hidden_ND,
        teacher_logits=views.pop("teacher", None),
        extra_views=views,
        tokens=pack.steps.tokens_N,
        turns=pack.steps.turn_N,
        rollouts=pack.steps.rollout_N,
        groups=pack.group_R,
        rewards=torch.tensor([rollout.reward for rollout in pack.rollouts]),
        engine_logp=pack.steps.engine_logp_N,
        longest=setup.config.rollout.max_new_tokens,
        step=CLOCK.done,
        total_steps=CLOCK.total,
    )


def student_logits(setup: Prepared, pack: Pack) -> Tensor:
    """The student's logits over the shared ids before each token that was decided, [N, V]."""
    with torch.no_grad():
        return _padded(setup.student, [own.tokens_L for own in pack.sequences], pack)[0][:, : setup.learner.vocab]


def padded_logp(setup: Prepared, pack: Pack) -> Tensor:
    """The student's log-probs of what was written, nats, [N]."""
    return student_logits(setup, pack).log_softmax(-1).gather(1, pack.steps.tokens_N[:, None]).squeeze(1)


def read_by(setup: Prepared, view: str, pack: Pack) -> tuple[LanguageModel, list[Tensor], Tensor | None]:
    """The model behind a view, what it reads of each rollout, and the steps about which it says something.

    Nothing has been learnt yet, so the student as its own teacher has the student's weights, however they move.
    """
    teacher, sees = setup.teachers.behind(setup.method)[view], setup.method.views[view]
    teacher = teacher.local if isinstance(teacher, SelfTeacher) else teacher
    assert isinstance(teacher, LocalTeacher)
    assert not teacher.alignment.stops, "the tiny models have one tokenizer"
    shown = teacher.prompts(pack, sees)
    prompts = [torch.tensor([0] if own is None else own.ids) for own in shown.contexts]
    written = [own.continuation.tokens_L for own in pack.sequences]
    sequences = [torch.cat([ids, own]) for ids, own in zip(prompts, written, strict=True)]
    return teacher.lm, sequences, shown.valid_N(pack)


def _padded(lm: LanguageModel, sequences: list[Tensor], pack: Pack) -> tuple[Tensor, Tensor]:
    """The model's own logits [N, V] and last hidden states [N, D] before each token that a rollout decided.

    With nothing of ours in between.
    """
    ids_RL = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    real_RL = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    said = lm.model(input_ids=ids_RL, attention_mask=real_RL, use_cache=False, output_hidden_states=True)

    def rows(all_RLX: Tensor) -> Tensor:
        found: list[Tensor] = []
        for one_LX, ids, sequence in zip(all_RLX, sequences, pack.sequences, strict=True):
            decided_L = sequence.continuation.action_mask_L
            found.append(one_LX[len(ids) - len(decided_L) - 1 : len(ids) - 1][decided_L])
        return torch.cat(found)

    return rows(said.logits), rows(said.hidden_states[-1])


@torch.no_grad()
def _ahead(lm: LanguageModel, sequences: list[Tensor], pack: Pack, ids_NK: Tensor, vocab: int) -> Tensor:
    """The model's largest probability after each of some ids in place of what was decided, [N, K]: a pass for each."""
    found: list[Tensor] = []
    for ids, sequence in zip(sequences, pack.sequences, strict=True):
        decided_L = sequence.continuation.action_mask_L
        for at in (decided_L.nonzero().flatten() + len(ids) - len(decided_L)).tolist():
            branches = [torch.cat([ids[:at], own[None]]) for own in ids_NK[len(found)]]
            logits_KV = lm.model(input_ids=torch.stack(branches), use_cache=False).logits[:, -1, :vocab]
            found.append(logits_KV.softmax(-1).amax(-1))
    return torch.stack(found)


_models: dict[tuple[str, str, torch.dtype | None], LanguageModel] = {}


@contextlib.contextmanager
def models_once(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within, `prepare` reads every model from disk once and takes copies after that, of this type if one is given."""
    load = loading.load

    def once(config: Any, name: str, role: Any, given: Any = None) -> LanguageModel:
        key = (name, role, dtype)
        if key not in _models:
            _models[key] = load(config, name, role, given)
            if dtype is not None:
                _models[key].model.to(dtype)  # type: ignore[call-overload]
        return _copied(_models[key], sharding=Sharding())

    with pytest.MonkeyPatch.context() as patch:
        for module in (loading, models):
            patch.setattr(module, "load", once)
        yield


def _copied(lm: LanguageModel, **own: Any) -> LanguageModel:
    model = copy.deepcopy(lm.model)
    return replace(lm, model=model, vision=None if lm.vision is None else lm.vision.on(model), **own)


@contextlib.contextmanager
def models_kept() -> Iterator[None]:
    """Within, runs read a model from the same unchanged files with the same settings once, and take copies after that.

    For tests of whole runs that are about something else than loading. Objects, servers, other devices than the CPU and
    rounded weights are loaded as ever.
    """
    load = loading.load

    def kept(config: Any, name: str, role: Any, given: Any = None) -> LanguageModel:
        key = _kept_by(config, name, role, given)
        if key is None:
            return load(config, name, role, given)
        found = _kept.pop(key, None) or load(config, name, role, given)
        _kept[key] = found  # the last one is the one that was asked for last
        for old in list(_kept)[:-_KEEP]:
            del _kept[old]
        own = {"sharding": Sharding(), "working": WorkingCopy(), "notes": [*found.notes], "tried": [*found.tried]}
        return _copied(found, **own)

    with pytest.MonkeyPatch.context() as patch:
        for module in (loading, models):
            patch.setattr(module, "load", kept)
        yield


#: What `models_kept` keeps, at most so many.
_kept: dict[tuple[Any, ...], LanguageModel] = {}
_KEEP = 16


def _kept_by(config: Any, name: str, role: Any, given: Any) -> tuple[Any, ...] | None:
    """All that a loaded model depends on; None where it is not to be kept."""
    if is_url(name) or (given is not None and given.source(name) is not None) or role in config.models:
        return None
    folder, device = Path(models.located(name)), models.device_for(config)
    if device != "cpu" or not folder.is_dir():
        return None
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    stop = tuple(config.rollout.stop or ()) if role in ("student", "base") else ()
    settings = (config.precision, config.attention, stop, config.trust_remote_code, config.weights, config.base)
    return (name, role, str(folder.resolve()), *files, *settings)
