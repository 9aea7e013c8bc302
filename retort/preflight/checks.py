"""The quick checks of a pair: nothing is generated. Axis letters: see `retort.core`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from retort.align.chat import Renderer
from retort.align.encode import Spelt, response_ids
from retort.align.stops import named_stops, turn_end
from retort.align.text import control_tokens, decode
from retort.align.tokens import vocabulary_width
from retort.core.needs import SAMPLED
from retort.core.rollouts import Message, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Dense, Sampled
from retort.errors import UserError, shortened, visible
from retort.models.lm import LanguageModel
from retort.preflight.findings import Check
from retort.teachers.local import LocalTeacher, reduced
from retort.train.setup.memory import available, forecast, size_text
from retort.train.setup.prepare import Prepared
from retort.train.setup.templates import check_rendered, ends, thinking_note

#: Rows of the data that models are probed on.
PROBES = 16
#: Tokens of each that are looked at.
PROBE_TOKENS = 256
#: A teacher whose surprise is this share of ln(vocabulary) knows no more than random weights.
UNTRAINED = 0.9
#: Below this many ids a vocabulary belongs to a toy, which may never have learnt to predict its prompts.
REAL_VOCABULARY = 1000
#: Characters of a prompt that are shown.
SHOWN = 300
#: Nats by which two passes over one text may differ: rounding, and what is not rounding any more.
ROUNDING, RANDOM = 1e-4, 1e-2
#: Shares of the memory there is from which a forecast is worth a word, and from which it cannot work.
TIGHT, TOO_MUCH = 0.9, 1.3

_CONVERSATION = Prompt("probe", (Message("user", "What is 2 + 2?"),), plain=True)


def quick_checks(prepared: Prepared) -> list[Check]:
    """All of them, in the order in which a user would want to know."""
    pair: list[Callable[[Prepared], Check]] = [check_special_tokens, check_stops, check_chat_templates]
    alone: list[Callable[[Prepared], Check]] = [check_prompt_ends, check_prompts, check_vocabulary, check_lengths]
    loaded: list[Callable[[Prepared], Check]] = [check_teacher_loaded, check_teacher_repeats]
    if prepared.teachers.lms.get("teacher") is None:  # a student that teaches itself agrees with itself on all of that
        pair = loaded = []
    return [check(prepared) for check in (*pair, *alone, *loaded, check_memory)]


def check_special_tokens(prepared: Prepared) -> Check:
    """Whether both sides treat the same tokens as special."""
    why = "a control token to one side that is text to the other is written by one and not expected by the other"
    other_lm = _teacher(prepared)
    ours, theirs = (
        {i: name for name, i in control_tokens(lm.tokenizer).items()} for lm in (prepared.student, other_lm)
    )
    read, vocab = _read(prepared), prepared.learner.vocab
    theirs = {read(i): name for i, name in theirs.items()}
    only = sorted(i for i in ours.keys() ^ theirs.keys() if i < vocab)
    roles = {
        role: (mine, other)
        for role in ("bos_token_id", "pad_token_id", "unk_token_id")
        if (mine := getattr(prepared.student.tokenizer, role)) != (other := read(getattr(other_lm.tokenizer, role)))
    }
    parts = []
    if only:
        named = ", ".join(
            f"{ours.get(i) or theirs.get(i)} ({i}, {'student' if i in ours else 'teacher'})" for i in only[:4]
        )
        parts.append(f"{len(only)} token(s) special to one side only: {named}")
    if "bos_token_id" in roles:
        mine, other = roles["bos_token_id"]
        parts.append(f"the student's text begins with id {mine}, the teacher's with {other}")
    if not parts:
        return Check("special tokens", "ok", f"the same {len(ours)} on both sides", why)
    return Check(
        "special tokens",
        "warn",
        "; ".join(parts),
        why,
        "give both the same tokenizer files if they are of one family; else look at the first rollouts in report.html",
    )


def check_stops(prepared: Prepared) -> Check:
    """Which tokens end the writing of either side, and whether the primary ones are among the ids of both."""
    why = "a student that is never told to stop writes until it is cut off, and learns from that"
    local = _local(prepared)
    student, teacher = prepared.student.stops, _teacher(prepared).stops
    read = _read(prepared)
    primary, theirs_too = read(teacher.primary), {read(i) for i in teacher.ids}
    if any(stop >= prepared.learner.vocab for stop in (student.primary, primary)):  # `prepare` refuses it as well
        saw = f"stops {student.primary} and {teacher.primary}, of {prepared.learner.vocab:,} ids that both share"
        return Check("stop token", "fatal", saw, why, "choose a stop that both have: rollout.stop, or eos_token")
    ours, theirs = (named_stops(lm.stops, lm.tokenizer) for lm in (prepared.student, _teacher(prepared)))
    saw = f"both stop with {ours}, which is among the shared ids"
    if student.ids != theirs_too or student.primary != primary:
        saw = f"the student stops with {ours}, the teacher with {theirs}"
    if local is not None and local.alignment.stops:
        saw += f"; {local.alignment.describe(prepared.student.tokenizer, _teacher(prepared).tokenizer)}"
    both = {"student": prepared.student, "teacher": _teacher(prepared)}
    doubts = [doubt for who, lm in both.items() if (doubt := _other_end(who, lm))]
    swap = local.alignment.stops.swap if local is not None else {}
    if {swap.get(i, i) for i in theirs_too} != student.ids:
        doubts.append("the two sets differ")
    if not doubts:
        return Check("stop token", "ok", saw, why)
    remedy = (
        "set rollout.stop (the student), or eos_token_id in generation_config.json, to what the model ends its "
        "answers with; where each stops as it should, this is only to be known"
    )
    return Check("stop token", "warn", "; ".join([saw, *doubts]), why, remedy)


def _other_end(who: str, lm: LanguageModel) -> str | None:
    """A doubt about a chat template that ends an assistant's turn with none of the model's stops."""
    written = turn_end(lm.tokenizer)
    names = {str(lm.tokenizer.convert_ids_to_tokens(i)) for i in lm.stops.ids}
    if not written or names & set(written):
        return None
    return f"the {who}'s chat template ends an assistant's turn with {written[0]}, at which it does not stop"


def check_chat_templates(prepared: Prepared) -> Check:
    """Whether a user's message reads the same to both."""
    why = "the teacher judges what it reads: in another template, or in none, it judges another conversation"
    ours, theirs = prepared.student.tokenizer, _teacher(prepared).tokenizer
    if not ours.chat_template and not theirs.chat_template:
        return Check("chat template", "ok", "neither side has one: prompts are bare text to both", why)
    if bool(ours.chat_template) != bool(theirs.chat_template):
        who, other = ("student", "teacher") if ours.chat_template else ("teacher", "student")
        return Check(
            "chat template",
            "warn",
            f"only the {who} has one; to the {other} prompts are bare text",
            why,
            f"copy the template the {other} was trained with into its folder (chat_template.jinja)",
        )
    local = _local(prepared)
    assert local is not None
    try:
        mine, other = prepared.source.render(_CONVERSATION), local.alignment.ours(local.render(_CONVERSATION))
    except UserError as error:
        return Check("chat template", "fatal", str(error), why, "repair the template; it refuses a plain question")
    if mine == other:
        return Check("chat template", "ok", f"a probe question is the same {len(mine)} ids to both", why)
    at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return Check(
        "chat template",
        "warn",
        f"a probe question is {len(mine)} ids to the student and {len(other)} to the teacher, other ones from {at} on",
        why,
        "fine if each has the template it was trained with; a student that is to use the teacher's needs it now",
    )


def check_prompt_ends(prepared: Prepared) -> Check:
    """Whether prompts end where an answer begins, as each template's own conversations tell."""
    why = "a model whose turn is not begun writes the beginning itself, or goes on for the user, and learns from that"
    headers, found, fatal = ends(_readers(prepared))
    if found:
        remedy = (
            "end the template (chat_template.jinja in the model's folder) with {% if add_generation_prompt %}, what "
            "it writes before answers, {% endif %}; or take the template that the model was trained with"
        )
        return Check("prompt's end", "fatal" if fatal else "warn", "; ".join(found), why, remedy)
    if not headers:
        return Check("prompt's end", "ok", "no chat template: answers continue the bare text", why)
    same = len(set(headers.values())) == 1
    saw = [next(iter(headers.values()))] if same else [f"{end} ({who})" for who, end in headers.items()]
    return Check("prompt's end", "ok", f"answers begin after {', '.join(saw)}", why)


def check_prompts(prepared: Prepared) -> Check:
    """What all prompts look like to the models, by one of them: control tokens and all."""
    why = "what is shown here is what the models read, to the last token; a control token in a prompt is text to them"
    readers = _readers(prepared)
    shown = [f"row '{prepared.source.prompts[0].id}' is {_shown(prepared.source.prompts[0], readers)}"]
    tokenizers = {who: render.tokenizer for who, render in readers.items()}
    thinking = thinking_note(tokenizers, prepared.source.render.template_options)
    shown += [thinking] if thinking else []
    doubts = check_rendered([*prepared.source.prompts, *prepared.held_out], readers)
    remedy = "see docs/prompts.md for what is read as what" if doubts else ""
    return Check("prompts", "warn" if doubts else "ok", "; ".join([*doubts, *shown]), why, remedy)


def _shown(prompt: Prompt, readers: Mapping[str, Renderer]) -> str:
    """A prompt as each reads it, in one part where that is the same."""
    ids = {who: render(prompt) for who, render in readers.items()}
    same = len({tuple(readers[who].tokenizer.convert_ids_to_tokens(own)) for who, own in ids.items()}) == 1
    whom = {"both" if len(ids) > 1 else "the student": ids["student"]} if same else ids
    texts = [
        (who, len(own), visible(shortened(decode(readers["student" if same else who].tokenizer, own), SHOWN)))
        for who, own in whom.items()
    ]
    return ", and ".join(f'{count} ids to {who if same else f"the {who}"}: "{text}"' for who, count, text in texts)


def check_vocabulary(prepared: Prepared) -> Check:
    """Whether the models have a row for every id, and how much is padding."""
    why = "an id without a row cannot be read; a row without an id is padding, and must get no probability"
    parts, missing = [], []
    for who, lm in prepared.lms.items():
        rows, ids = lm.head().width, vocabulary_width(lm.tokenizer)
        parts.append(f"{who} {rows:,} rows for {ids:,} ids")
        if rows < ids:
            missing.append(f"the {who}'s model lacks rows for ids {rows} to {ids - 1}")
    saw = f"{'; '.join(parts)}; {prepared.learner.vocab:,} shared, the rest gets no probability"
    if missing:
        remedy = "resize its embeddings to its tokenizer, or take the tokenizer that it was trained with"
        saw = f"{saw}; {' and '.join(missing)}, of which the data's prompts hold none"
        return Check("vocabulary", "warn", saw, why, remedy)
    return Check("vocabulary", "ok", saw, why)


def check_lengths(prepared: Prepared) -> Check:
    """Whether answers grow past a length from which the student reads again what it has read."""
    why = (
        "a token is learnt from after all of its answer; where that changes how its beginning is read, the student "
        "learns about another distribution than it wrote from"
    )
    at = prepared.student.rereads_from
    if at is None:
        return Check(
            "lengths", "ok", "the student reads what stands before a token the same, however long it gets", why
        )
    longest = prepared.config.rollout.max_new_tokens
    lengths = [len(prepared.source.render(prompt)) for prompt in prepared.source.prompts]
    over = sum(length <= at < length + longest for length in lengths)
    saw = f"from {at} tokens on the student reads with other rotary factors, also what it read before"
    if not over:
        return Check("lengths", "ok", f"{saw}; no answer can grow past that", why)
    remedy = f"keep prompt and answer within {at} tokens: lower rollout.max_new_tokens"
    return Check(
        "lengths", "fatal", f"{saw}; answers to {over} of {len(lengths)} prompts can grow past it", why, remedy
    )


def check_teacher_loaded(prepared: Prepared) -> Check:
    """Whether the teacher is a trained model: random weights are as surprised by any text as a fair die."""
    why = "weights that were not loaded (a renamed layer, a wrong file) leave random ones, and everything still runs"
    probe = _probe(prepared)
    if probe is None:
        return Check("teacher is loaded", "ok", "not looked at: this teacher is not a model in this process", why)
    pack, text = probe
    logp_N = _scored(prepared, pack)
    surprise, die = -float(logp_N.double().mean()), math.log(prepared.learner.vocab)
    nats = f"{surprise:.2f} nats a token (perplexity {_perplexity(surprise)})"
    saw = f"{nats} on {text}; random weights give about {die:.2f}"
    values = (("nats_per_token", surprise), ("uniform_nats", die))
    if surprise < UNTRAINED * die:
        return Check("teacher is loaded", "ok", saw, why, values=values)
    sure = text.startswith("answers") or prepared.learner.vocab >= REAL_VOCABULARY
    return Check(
        "teacher is loaded",
        "fatal" if sure else "warn",
        saw,
        why,
        "look for warnings about missing or unexpected weights while it loads; if it is meant to be random, set "
        "checks = 'warn'"
        if sure
        else "a small model that never learnt to predict its prompts says the same; add a column `response` to be sure",
        values,
    )


def check_teacher_repeats(prepared: Prepared) -> Check:
    """Whether the teacher says the same of the same text twice."""
    why = "a teacher that answers by chance (dropout, a quantised cache) teaches noise, and no run can be repeated"
    probe = _probe(prepared)
    if probe is None:
        return Check("teacher repeats", "ok", "not looked at: this teacher is not a model in this process", why)
    pack, text = probe
    apart = float((_scored(prepared, pack) - _scored(prepared, pack)).abs().max())
    saw = f"two passes over {text} differ by {apart:.1e} nats at most"
    values = (("largest_difference", apart),)
    if apart <= ROUNDING:
        return Check("teacher repeats", "ok", saw, why, values=values)
    remedy = "switch off dropout or sampling in the teacher; on a GPU try torch.use_deterministic_algorithms(True)"
    return Check("teacher repeats", "warn" if apart <= RANDOM else "fatal", saw, why, remedy, values)


def check_memory(prepared: Prepared) -> Check:
    """Whether a run will fit."""
    why = "a run that dies of memory does so at its longest rollouts, hours in"
    found, there = forecast(prepared), available(prepared.student.device)
    if there is None:
        return Check("memory", "ok", f"{found}; this system does not say how much there is", why)
    there += found.models  # loaded already
    share = found.peak / there
    saw = f"{found} of {size_text(there)} on {prepared.student.device.type}"
    values = (("forecast_bytes", float(found.peak)), ("available_bytes", float(there)))
    if share < TIGHT:
        return Check("memory", "ok", saw, why, values=values)
    remedy = (
        "lower optimizer.batch_tokens (activations), rollout.parallel (the cache) or rollout.max_new_tokens; "
        "optimizer.gradient_checkpointing=true keeps a tenth of the activations"
    )
    return Check("memory", "warn" if share < TOO_MUCH else "fatal", saw, why, remedy, values)


# --- inside ---


def _teacher(prepared: Prepared) -> LanguageModel:
    return prepared.teachers.lms["teacher"]  # there is one, or `quick_checks` leaves out what is about it


def _readers(prepared: Prepared) -> dict[str, Renderer]:
    """How student and teacher read prompts."""
    local = _local(prepared)
    return {"student": prepared.source.render} | ({} if local is None else {"teacher": local.render})


def _local(prepared: Prepared) -> LocalTeacher | None:
    for name, view in prepared.method.views.items():
        teacher = prepared.teachers.behind(prepared.method)[name]
        if view.model == "teacher" and isinstance(teacher, LocalTeacher):
            return teacher
    return None


def _read(prepared: Prepared) -> Callable[[Any], Any]:
    """An id of the teacher's (or none) as the student's for the same token."""
    local = _local(prepared)
    return lambda i: i if local is None or i is None else local.alignment.ours([i])[0]


def _probe(prepared: Prepared) -> tuple[Pack, str] | None:
    """Some of the data as if a student had written it: answers if there are any, else the prompts themselves."""
    local = _local(prepared)
    if local is None:
        return None
    rollouts: list[Rollout] = []
    answered = all(prompt.response is not None for prompt in prepared.source.prompts[:PROBES])
    for prompt in prepared.source.prompts[:PROBES]:
        prompt_ids = local.render(prompt)
        if answered:
            ids = _answer_ids(prompt_ids, str(prompt.response), _teacher(prepared))
        else:
            ids, prompt_ids = prompt_ids[1:], prompt_ids[:1]
        ids = [token for token in ids if token < local.alignment.width][:PROBE_TOKENS]
        if ids:
            rollouts.append(Rollout(prompt, TokenSequence.of(prompt_ids).then(ids, decided=True)))
    what = "answers" if answered else "prompts"
    return (Pack.of(rollouts), f"{what} of the data") if rollouts else None


def _answer_ids(prompt_ids: list[int], response: str, lm: LanguageModel) -> list[int]:
    """An answer of the data after a prompt; none that spells what the tokenizer cannot encode."""
    try:
        return response_ids(prompt_ids, response, lm.tokenizer)
    except Spelt:
        return []


def _scored(prepared: Prepared, pack: Pack) -> Tensor:
    """The teacher's log-probs of what it reads, [N], nats."""
    lm = _teacher(prepared)
    hidden_ND = lm.all_hidden([rollout.sequence for rollout in pack.rollouts], prepared.config.optimizer.batch_tokens)

    def logits(rows: Tensor | slice) -> Tensor:
        with lm.compute():
            return lm.head().logits(hidden_ND[rows], prepared.learner.vocab)

    signal = reduced(
        Dense(pack.steps.tokens_N.to(lm.device), lm.name, logits, prepared.learner.vocab), frozenset({SAMPLED})
    )
    assert isinstance(signal, Sampled)
    return signal.logp_N.cpu()


def _perplexity(nats: float) -> str:
    return f"{math.exp(nats):,.1f}" if nats < 20 else f"e^{nats:.0f}"
