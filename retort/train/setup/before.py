"""Checks of a run before any weights are read, so that no minutes are spent on one that cannot start.

Settings that the user left open (defaults, and those of the method's paper) are made to fit here; the user's own are
never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retort import registry
from retort.align.chat import Renderer
from retort.align.pair import align_ids
from retort.align.replies import reply_ids
from retort.align.stops import turn_end
from retort.align.tokens import OtherTokenizer
from retort.config import Config
from retort.config.precedence import flat
from retort.core.needs import can_meet
from retort.core.rollouts import Message, Prompt
from retort.errors import UserError
from retort.method import Method
from retort.models.adapter import need_peft
from retort.models.described import Described, describe
from retort.models.endpoint import Endpoint
from retort.models.in_memory import InMemoryModel
from retort.models.lm import LanguageModel
from retort.models.load import refuse_bits
from retort.models.server import Server
from retort.ranks import here
from retort.teachers.spanned import SpanTeacher
from retort.train.events import tracking
from retort.train.models.models import bits_of
from retort.train.models.offloading import refuse_offload
from retort.train.setup import templates
from retort.train.setup.images import refuse_text_alone
from retort.train.setup.whole_head import needs_whole_head, refuse_slices


@dataclass(frozen=True, eq=False)
class CheckedSettings:
    """The result of the checks.

    Attributes:
        config: The resolved configuration, with what was left open made to fit.
        render: Maps a prompt to ids, as the student reads it.
        highest: By role, the largest id in any prompt, and the row that holds it.
    """

    config: Config
    render: Renderer
    highest: Mapping[str, tuple[int, str]]

    def check_ids(self, role: str, lm: LanguageModel) -> None:
        """Raises `UserError` if a prompt holds an id for which the model has no row."""
        token, row = self.highest[role]
        lm.check_ids([token], f"row '{row}': its prompt")


def check_before_loading(
    config: Config,
    method: Method,
    models: Mapping[str, tuple[str, str | InMemoryModel | Server | Endpoint]],
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    notes: list[str],
) -> CheckedSettings:
    """Makes every check of a run that needs no weights.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.
        models: Name and source of every model that is to be loaded, the student first.
        train: Prompts to learn from.
        held_out: Prompts for evaluation.
        notes: Collects notes for the user.

    Raises:
        UserError: Whatever is wrong, in one line.
    """
    tracking.need(config.tracker)
    if config.lora.rank:
        need_peft()
    if config.ranks.head == "vocabulary":
        refuse_slices(config, needs_whole_head(method))
    for role, (name, source) in models.items():
        if (bits := bits_of(config, role)) is not None and not config.cache.only:
            refuse_bits(f"{role} {name}", bits, role, source)
    refuse_offload(config, {"base": models["student"], **models})
    first_note = len(notes)
    config = fit_steps(config, method, len(train), notes)
    found: dict[str, Described] = {role: _describe(config, role, *model) for role, model in models.items()}
    for name, other in list(found.items())[1:]:
        need_alignment(config, method, name, found["student"], other)
    refuse_text_alone(found, [*train, *held_out])
    config = templates.settled(config, {role: one.tokenizer for role, one in found.items()}, notes)
    renders = {
        role: Renderer(one.tokenizer, config.rollout.template_options, one.image_tokens) for role, one in found.items()
    }
    read = templates.check_prompts(config, train, held_out, renders, notes)
    config = fit_lengths(config, found, read, notes)
    notes[first_note:first_note] = paper_settings(config, method)
    return CheckedSettings(config, renders["student"], {role: one.highest for role, one in read.items()})


def need_alignment(config: Config, method: Method, name: str, student: Described, other: Described) -> None:
    """Refuses a model with another tokenizer than the student's, unless units of bytes are all that is asked of it.

    Raises:
        UserError: The method compares ids with it, or whole distributions; or an environment would reply between turns,
            with which the model's chat template cannot go on.
    """
    try:
        align_ids(student.tokenizer, other.tokenizer)
    except OtherTokenizer as error:
        if name in config.teachers.models:
            raise UserError(
                f"teachers.models: {name} has another tokenizer than the student, and several teachers are put "
                f"together token by token; leave it out, or make it the only teacher ({error})"
            ) from None
        refuse_slices(config, f"the {name} has another tokenizer, and units of bytes are compared by the whole head")
        lacking = needs_ids(method, name)
        if lacking:
            raise UserError(f"{lacking}, but {error}: {', '.join(registry.for_two_tokenizers())}") from None
        if config.environment is not None:
            need_replies(config, name, other)


def need_replies(config: Config, name: str, other: Described) -> None:
    """Refuses a model in whose chat template no reply can follow a turn.

    Raises:
        UserError: As said.
    """
    tokenizer: Any = other.tokenizer
    asked, said = Prompt("Hi", (Message("user", "Hi"),)), Message("user", "Go on.")
    end = next(iter(turn_end(tokenizer)), tokenizer.eos_token)
    if end is None:
        return  # its stop is in its other files: what it cannot read is refused when it first scores
    try:
        reply_ids(asked, (said,), tokenizer.convert_tokens_to_ids(end), tokenizer, config.rollout.template_options)
    except UserError as error:
        raise UserError(
            f"the {name} has another tokenizer than the student, in which the replies of an environment "
            f"('{config.environment}') cannot be read: {error}; or use one with the student's tokenizer"
        ) from None


def needs_ids(method: Method, name: str) -> str | None:
    """What a method needs of a model that one with another tokenizer cannot give, as a sentence; None if nothing."""
    phases = [method] if method.before is None else [method.before[1], method]
    for phase in phases:
        views = [view for view, own in phase.views.items() if own.model == name]
        needs = [need for view in views for need in phase.needs(view) if not can_meet(SpanTeacher.capabilities, need)]
        if needs:
            return f"method '{phase.name}' needs {min(needs)} of the {name}"
    return None


def _describe(config: Config, role: str, name: str, source: str | InMemoryModel | Server | Endpoint) -> Described:
    shown = source.name if isinstance(source, InMemoryModel) else name
    stop = config.rollout.stop if role == "student" else None
    return describe(shown, source, role, stop=stop, trust_remote_code=config.trust_remote_code)


def step_count(config: Config, prompts: int) -> int:
    """Number of batches of rollouts in a run over so many prompts."""
    return config.steps or -(-prompts // batch_prompts(config, prompts))


def batch_prompts(config: Config, prompts: int) -> int:
    """Number of prompts per batch: as set, or all there are."""
    return min(config.rollout.prompts, prompts)


def need_groups(config: Config, prompts: int) -> None:
    """Refuses several ranks of which one would have nothing to do.

    Raises:
        UserError: A batch has fewer prompts than there are ranks.
    """
    batch, ranks = batch_prompts(config, prompts), here().size
    if batch < ranks:
        raise UserError(
            f"a batch of {batch} prompts is less than one for each of {ranks} ranks, and the completions of a prompt "
            f"stay together; raise rollout.prompts{'' if prompts >= ranks else ' and give more data'}, or start with "
            f"--nproc-per-node {batch}"
        )
    if config.attention == "auto" and ranks > 1:
        raise UserError(
            "attention = auto is measured, and several ranks may measure differently; name one, as in attention=sdpa"
        )


def fit_steps(config: Config, method: Method, prompts: int, notes: list[str]) -> Config:
    """Makes a paper's steps and warm-up fit the run, or says that the user's do not.

    Args:
        config: The resolved configuration.
        method: The method, with what comes before it.
        prompts: Number of training prompts.
        notes: Collects what was changed.

    Raises:
        UserError: A cold start leaves no step of the run.
    """
    cold = method.before[0] if method.before is not None else 0
    if cold and config.steps is not None and cold >= config.steps and not config.set_by_user("steps"):
        notes.append(f"steps is not {config.steps}, as the paper's: a cold start of {cold} steps would use them up")
        config = config.changed("steps", None)
    steps = step_count(config, prompts)
    if cold >= steps:
        raise UserError(
            f"a cold start of {cold} steps leaves none of the run's {steps} to '{method.name}'; "
            "lower cold_start.steps, or raise steps"
        )
    batch, optimizer = batch_prompts(config, prompts), config.optimizer
    phases = [(steps - cold, method), *([(cold, method.before[1])] if method.before is not None else [])]
    for batches, phase in phases:
        updates = batches * min(optimizer.updates, batch * phase.rollout.samples) * optimizer.epochs
        if optimizer.warmup < updates or not optimizer.warmup:
            continue
        whose = "the run" if len(phases) == 1 else f"the part of the run that is '{phase.name}'"
        short = f"{whose} has {updates} optimizer steps, and a warm-up of {optimizer.warmup}"
        if config.set_by_user("optimizer.warmup"):
            reached = updates / optimizer.warmup
            notes.append(
                f"{short}: the learning rate gets to {reached:.0%} of optimizer.learning_rate; lower optimizer.warmup, "
                "or raise steps"
            )
            continue
        notes.append(f"{short} as the paper's would not end in it: there is none (optimizer.warmup=0)")
        return config.changed("optimizer.warmup", 0)
    return config


def fit_lengths(
    config: Config, models: Mapping[str, Described], read: Mapping[str, templates.Extremes], notes: list[str]
) -> Config:
    """Cuts lengths that the user left open to what the models' contexts hold beside the longest prompt.

    Args:
        config: The resolved configuration.
        models: By role.
        read: The longest prompts, as each model reads them.
        notes: Collects what was changed.

    Raises:
        UserError: A length of the user's does not fit, or no completion at all does.
    """
    evaluated = config.eval.max_new_tokens
    learnt = {role: one.train for role, one in read.items()}
    held_out = {role: one.held_out for role, one in read.items()}
    config = _fit(config, "rollout.max_new_tokens", models, [learnt, *([held_out] if evaluated is None else [])], notes)
    return config if evaluated is None else _fit(config, "eval.max_new_tokens", models, [held_out], notes)


def _fit(
    config: Config,
    key: str,
    models: Mapping[str, Described],
    prompts: Sequence[Mapping[str, tuple[int, str]]],
    notes: list[str],
) -> Config:
    """Fits one length beside the longest of some prompts: (tokens, row) by role; a row without tokens is none."""
    wanted = config.value(key)
    each = [
        (models[role].context - tokens, role, tokens, row)
        for some in prompts
        for role, (tokens, row) in some.items()
        if tokens
    ]
    if not each:
        return config
    room, role, tokens, row = min(each, key=lambda one: one[0])
    model = models[role]
    if wanted <= room:
        return config
    if config.set_by_user(key) or room < 1:
        stretched = model.reach
        longer = (
            f"drop the row, or raise max_position_embeddings in the {role}'s config.json to {stretched}, as far as its "
            "rope_parameters stretch its positions"
        )
        raise UserError(
            f"row '{row}': {tokens} prompt tokens and {wanted} new ones exceed the {role}'s context of "
            f"{model.context}; lower {key}, {'or drop the row' if stretched is None else longer}"
        )
    notes.append(
        f"{key} is {room:,} and not {wanted:,}: beside the longest prompt (row '{row}', {tokens} tokens) the {role}'s "
        f"context of {model.context:,} holds no more"
    )
    return config.changed(key, room)


def paper_settings(config: Config, method: Method) -> list[str]:
    """A note on the settings that come from the method's paper; none without such settings."""
    plain: Any = Config()
    theirs = [
        f"{key}={value}"
        for key, value in flat(method.recipe).items()
        if not config.set_by_user(key) and config.value(key) == value != plain.value(key)
    ]
    paper = method.paper.arxiv if method.paper is not None else None
    whose = f"the paper of '{method.name}'{f' (arXiv {paper})' if paper else ''}"
    return [f"as in {whose}, where you gave nothing: {', '.join(theirs)}"] if theirs else []
