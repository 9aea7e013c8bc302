"""A forecast of a run's memory by part, and the memory that is available. Axis letters: see `retort.core`.

The forecast is of growth above the process as it is before anything is loaded. It knows what the loss core and the
optimizer allocate to the byte; what a family keeps of a forward pass is estimated from its shape, so it is the least
certain part. Of several ranks it is that of one; their parts of a batch are about even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retort.core.per_token import BLOCK_ELEMENTS, chunk_rows
from retort.models.lm import LanguageModel
from retort.models.quantized import plain
from retort.models.sharding import layers_of
from retort.teachers.base import ScoreRequest
from retort.teachers.itself import sides_of
from retort.train.models.judge import asked_model
from retort.train.setup.prepare import Prepared
from retort.train.setup.writing import writings


@dataclass(frozen=True)
class Roles:
    """Bytes of one process of each role, where roles are apart (docs/cluster.md); each above an empty process.

    Attributes:
        rank: A rank that learns: it neither generates nor holds a frozen model that servers may hold.
        generator: A process that generates with a copy of the student.
        teacher: A server of the largest frozen model; None where no such model is in this process.
    """

    rank: int
    generator: int
    teacher: int | None

    @property
    def values(self) -> tuple[tuple[str, float], ...]:
        """The sizes by name, as a check shows them."""
        return tuple((f"{role}_bytes", float(size)) for role, size in vars(self).items() if size is not None)

    def __str__(self) -> str:
        teacher = "" if self.teacher is None else f", a server of the teacher {size_text(self.teacher)}"
        own = f"a rank {size_text(self.rank)}, a process that generates {size_text(self.generator)}{teacher}"
        return f"in processes of their own: {own}"


@dataclass(frozen=True)
class Forecast:
    """Bytes by part.

    Attributes:
        models: Weights of all models (a judge of this process is one), the copies of a student that teaches itself, and
            those in bf16 of weights under an adapter.
        training: Gradients and two moments of Adam, fp32; a second gradient where their variance is measured.
        head: Gradients of head and embeddings while they are formed, before they are added up.
        activations: Activations of the largest micro-batch, kept for its backward pass.
        loss: A chunk of logits of every model, and what autograd keeps of a block.
        signals: The teachers' signals for a batch of rollouts, kept until it is learnt from.
        copies: The student's weights in bf16, where it learns in fp32 and computes in bf16; freed while it learns.
        cache: Keys and values during generation, of the largest there is: of rollouts, held-out completions, texts that
            views show, or a judge's answers; in episodes of several turns also those of others that wait for their
            next turn, as many at most as are generated at once.
        loaded: Weights of all models as they are loaded, before ranks share them.
        whole: Of several ranks: the student's whole weights for passes without gradient, or the layers of a teacher
            that generates, beside the slices.
        gathered: Of several ranks: embedding, head and two layers with their gradients, gathered while learning.
        offloaded: Of models that leave the device between their passes, the largest, and its cache if it generates: one
            is there at a time.
        ranks: Number of ranks; all else is that of one of them.
        roles: What a process of each role needs where roles are apart.
    """

    models: int
    training: int
    head: int
    activations: int
    loss: int
    signals: int
    copies: int
    cache: int
    loaded: int
    whole: int = 0
    gathered: int = 0
    offloaded: int = 0
    ranks: int = 1
    roles: Roles = Roles(0, 0, None)

    @property
    def peak(self) -> int:
        """The peak in bytes: learning, scoring by a model that then leaves, and generation do not happen at once."""
        learning = self.gathered + self.head + self.activations + self.loss
        scoring = self.offloaded + self.copies + self.loss if self.offloaded else 0
        generating = self.whole + self.copies + self.cache
        return self.models + self.training + max(max(learning, scoring) + self.signals, generating)

    def __str__(self) -> str:
        names = {
            "models": "the models",
            "training": "gradients and Adam",
            "head": "the head's gradient while it is formed",
            "activations": "a micro-batch's activations",
            "loss": "chunks of logits",
            "signals": "the teachers' signals",
            "copies": "weights in bf16 to generate with",
            "cache": "the KV cache of generation",
            "whole": "whole weights to generate with",
            "gathered": "layers and head gathered to learn",
            "offloaded": "the largest model that is there for its passes only",
        }
        optional = ("copies", "whole", "gathered", "offloaded")
        sizes = {text: getattr(self, name) for name, text in names.items()}
        shown = {text: sizes[text] for name, text in names.items() if name not in optional or sizes[text]}
        parts = ", ".join(f"{text} {size_text(size)}" for text, size in shown.items())
        where = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"about {size_text(self.peak)} at peak{where}: {parts}"


def forecast(prepared: Prepared) -> Forecast:
    """Forecasts the parts of a run's memory on each rank, in bytes above an empty process."""
    student, config, ranks = prepared.student, prepared.config, prepared.learner.passes.world.size
    lms = list(prepared.lms.values())
    frozen = lms[1:] + [student] * _self_passes(prepared)
    text = student.model.config.get_text_config()
    head = student.kept_head().weight_VD
    learns = head.requires_grad
    untied = student.model.get_input_embeddings().weight is not head
    # The embeddings' own gradient is as large as they are, however few ids occur.
    forming = 4 * head.numel() * 2
    tokens = min(config.optimizer.batch_tokens, _part(_rollout_tokens(prepared, longest=True), ranks))
    rows = min(chunk_rows(prepared.learner.vocab, student.device), tokens)
    product = 4 if prepared.student.precision == "fp32" else 2
    # Student: product and fp32 logits in one where the product is fp32; a teacher's chunk is held beside it.
    chunks = rows * prepared.learner.vocab * (4 + product * len(frozen)) + 6 * 4 * BLOCK_ELEMENTS
    rollouts = _part(prepared.source.count, ranks) * prepared.method.rollout.samples
    evaluated = config.eval.samples * _part(min(64, len(prepared.held_out)), ranks)
    caches = _caches(prepared, max(rollouts, evaluated), evaluated, product, ranks)
    copies, lasting = student.working_bytes()
    if ranks > 1:  # The copies of frozen weights are of gathered ones, and are freed with them.
        copies, lasting = copies + lasting, 0
    own = prepared.teachers.own.bytes if prepared.teachers.own else 0
    frozen_kept, frozen_loaded = _frozen(prepared, ranks)
    found = Forecast(
        models=_part(_bytes(student) + own, ranks) + frozen_kept + lasting,
        training=_part((16 if config.record.gradient_variance_every else 12) * student.trainable_parameters, ranks),
        head=0 if not learns else forming if not untied else 4 * head.numel(),
        activations=tokens * _kept_bytes(text, product, checkpointed=config.optimizer.gradient_checkpointing),
        loss=chunks,
        signals=_signals(prepared, rollouts * config.rollout.max_new_tokens, product, ranks),
        copies=copies,
        cache=max(caches.values()),
        loaded=_bytes(student) + own + lasting + frozen_loaded,
        offloaded=max(lm.offload.bytes + (caches.get(id(lm), 0) if lm.offload.storage else 0) for lm in lms),
        **(_gathered(prepared, ranks) if ranks > 1 else {}),
    )
    return replace(found, roles=_roles(prepared, found, found.models - frozen_kept))


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def size_text(bytes_: float) -> str:
    """A size as text, in MiB or GiB."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def _part(whole: int, ranks: int) -> int:
    """The largest part of what ranks divide."""
    return -(-whole // ranks)


def _bytes(lm: LanguageModel) -> int:
    parts = (part for p in lm.model.parameters() if not p.is_meta for part in plain(p))
    return sum(part.numel() * part.element_size() for part in parts)


def _caches(prepared: Prepared, written: int, evaluated: int, product: int, ranks: int) -> dict[int, int]:
    """Bytes of the largest cache of each model that generates, by the model's `id`.

    Args:
        prepared: The parts of the run.
        written: Completions of the student at once.
        evaluated: Completions of a model that is evaluated.
        product: Bytes of a number.
        ranks: Number of ranks.
    """
    config, student = prepared.config, prepared.student
    longest, parallel = config.rollout.max_new_tokens + _prompt_tokens(prepared), config.rollout.parallel
    most = parallel * (2 if prepared.source.episodes.several_turns else 1)
    generators = [(student, min(most, written), longest)]
    if config.eval.teacher and "teacher" in prepared.lms and prepared.lms["teacher"].here:
        generators.append((prepared.lms["teacher"], min(most, evaluated), longest))
    for own in writings(prepared):
        if own.lm is not None:
            generators.append((own.lm, min(parallel, _part(own.at_once, ranks)), own.prompt + own.longest))
    found: dict[int, int] = {}
    for lm, count, tokens in generators:
        found[id(lm)] = max(found.get(id(lm), 0), _cache(lm, count, tokens, product))
    return found


def _generated(prepared: Prepared, product: int) -> int:
    """Bytes of a process that generates, beside the weights: the cache, a prompt's pass, and two tables of logits."""
    config, student = prepared.config, prepared.student
    count = min(config.rollout.parallel, prepared.source.count * prepared.method.rollout.samples)
    prompt = _prompt_tokens(prepared)
    cache = _cache(student, count, config.rollout.max_new_tokens + prompt, product)
    logits = 2 * 4 * count * prepared.learner.vocab
    return cache + logits + count * prompt * _passing_bytes(student, product)


def _scored(prepared: Prepared, lm: LanguageModel, product: int) -> int:
    """Bytes of a server that scores, beside the weights: a micro-batch in its widest layer, and a chunk of logits."""
    tokens = min(prepared.config.optimizer.batch_tokens, _rollout_tokens(prepared, longest=True))
    rows = min(chunk_rows(prepared.learner.vocab, prepared.student.device), tokens)
    return tokens * _passing_bytes(lm, product) + rows * prepared.learner.vocab * (4 + product)


def _passing_bytes(lm: LanguageModel, product: int) -> int:
    """Bytes per token of a pass that keeps nothing: its state, and what the widest layer holds at once."""
    shape = _Shape.of(lm.model.config.get_text_config())
    attention = product * (2 * shape.heads + 4 * shape.groups) * shape.each
    return 4 * 3 * shape.width + max(attention, product * 3 * shape.wide)


def _roles(prepared: Prepared, found: Forecast, kept: int) -> Roles:
    """What a process of each role needs; `kept` are the bytes of models that a rank has in any case."""
    student, judge = prepared.student, asked_model(prepared.asker)
    product = 4 if student.precision == "fp32" else 2
    frozen = [lm for lm in prepared.lms.values() if lm.model is not student.model and lm.here]
    alone = judge is not None and judge.model not in [student.model, *(lm.model for lm in frozen)]
    kept += _bytes(judge) if judge is not None and alone else 0
    return Roles(
        rank=replace(found, models=kept, cache=0, offloaded=0).peak,
        generator=_bytes(student) + sum(student.working_bytes()) + _generated(prepared, product),
        teacher=max((_whole(lm) + _scored(prepared, lm, product) for lm in frozen), default=None),
    )


def _whole(lm: LanguageModel) -> int:
    """Bytes of a model's weights, also of one that leaves the device between its passes."""
    return max(_bytes(lm), lm.offload.bytes)


def _layer_bytes(lm: LanguageModel) -> int:
    return sum(p.numel() * p.element_size() for layer in layers_of(lm.model) for p in layer.parameters())


def _frozen(prepared: Prepared, ranks: int) -> tuple[int, int]:
    """Bytes of frozen models that a rank keeps, and of these models as they are loaded."""
    models = {id(lm.model): lm for lm in prepared.lms.values() if lm.model is not prepared.student.model}
    sliced, judge = list(models.values()), asked_model(prepared.asker)
    if judge is not None and judge.model is not prepared.student.model:
        models[id(judge.model)] = judge  # which every rank has whole, and asks by itself
    loaded = sum(map(_bytes, models.values()))
    if prepared.config.ranks.teacher != "sharded":
        return loaded, loaded
    layers = sum(map(_layer_bytes, sliced))
    return loaded - layers + _part(layers, ranks), loaded


def _gathered(prepared: Prepared, ranks: int) -> dict[str, Any]:
    """What several ranks gather: see `Forecast.whole` and `Forecast.gathered`."""
    student, config = prepared.student, prepared.config
    layer = _layer_bytes(student) // max(1, len(layers_of(student.model)))
    sources = any("teacher" in method.rollout.sources for _, method in prepared.phases)
    names = {own.model for own in writings(prepared)} | ({"teacher"} if config.eval.teacher or sources else set())
    generate = [lm for name, lm in prepared.lms.items() if name in names and lm is not student]
    of_teacher = max(map(_layer_bytes, generate), default=0) if config.ranks.teacher == "sharded" else 0
    embedding: Any = student.model.get_input_embeddings()
    return {
        "whole": max(_bytes(student), of_teacher),
        "gathered": 4 * (embedding.weight.numel() + student.kept_head().weight_VD.numel()) + 4 * layer,
        "ranks": ranks,
    }


@dataclass(frozen=True)
class _Shape:
    """Numbers of a decoder: width, layers, heads, groups of keys and values, size of each, width in between."""

    width: int
    layers: int
    heads: int
    groups: int
    each: int
    wide: int

    @staticmethod
    def of(text: Any) -> _Shape:
        width, layers, heads = (
            int(getattr(text, name)) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        groups = int(getattr(text, "num_key_value_heads", None) or heads)
        each = int(getattr(text, "head_dim", None) or width // heads)
        return _Shape(width, layers, heads, groups, each, int(getattr(text, "intermediate_size", None) or 4 * width))


def _kept_bytes(text: object, product: int, *, checkpointed: bool) -> int:
    """Bytes per token that a decoder of this shape keeps for its backward pass."""
    shape = _Shape.of(text)
    if checkpointed:
        return 4 * shape.width * (shape.layers + 8)
    # Residual stream and norms stay fp32. Products in bf16 keep a bf16 copy of what goes into them.
    residual = 4 * 8 * shape.width
    attention = product * (6 * shape.heads + 6 * shape.groups) * shape.each
    feed_forward = product * 4 * shape.wide
    return shape.layers * (residual + attention + feed_forward)


def _prompt_tokens(prepared: Prepared) -> int:
    """Number of tokens of the longest prompt among some of the training data."""
    return max((len(prepared.source.render(prompt)) for prompt in prepared.source.prompts[:256]), default=0)


def _rollout_tokens(prepared: Prepared, *, longest: bool) -> int:
    """Number of tokens of a batch of rollouts, prompts included, if every completion has its full length."""
    rollouts = prepared.source.count * prepared.method.rollout.samples
    return rollouts * (prepared.config.rollout.max_new_tokens + _prompt_tokens(prepared)) if longest else rollouts


def _self_passes(prepared: Prepared) -> int:
    """Number of passes over a batch by the student as its own teacher."""
    views = prepared.method.views.values()
    return sum(len(sides_of(view.weights)) for view in views if view.model == "student")


def _signals(prepared: Prepared, steps: int, product: int, ranks: int) -> int:
    """Hidden states where the whole distribution is asked for, a few numbers a step elsewhere."""
    total, head = 0, prepared.student.kept_head().weight_VD.numel()
    for name, view in prepared.method.views.items():
        lm = prepared.lms.get(view.model)
        dense = ScoreRequest(view, prepared.method.needs(name)).whole
        several = prepared.config.teachers.models if view.model == "teacher" else []
        if several and dense:  # all of them where they are mixed, or compared
            widths = [
                prepared.lms[one].model.config.get_text_config().hidden_size for one in several if one in prepared.lms
            ]
            total += steps * sum(map(int, widths)) * product
            continue
        if lm is None:  # A remote teacher sends numbers only.
            total += steps * 4 * 64
            continue
        width = int(lm.model.config.get_text_config().hidden_size)
        sides = sides_of(view.weights)
        total += steps * (width * product * len(sides) if dense else 4 * 64)
        own = prepared.teachers.own
        if ranks > 1 and dense and lm.model is prepared.student.model:  # its gathered head is copied
            total += len(sides) * (product if view.model == "student" else 4) * head
        elif view.model == "student" and dense and own is not None and own.moves_within_batch:
            moving = sum(weights.kind != "frozen" for weights, _ in sides)
            total += moving * product * head
    return total


def _cache(lm: LanguageModel, rollouts: int, longest: int, product: int) -> int:
    shape = _Shape.of(lm.model.config.get_text_config())
    return rollouts * longest * shape.groups * shape.each * shape.layers * 2 * product


def _system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _container() -> int | None:
    """Bytes that the memory limit of the control group leaves, where there is one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # The page cache is released when memory is asked for.
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
