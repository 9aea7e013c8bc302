"""A forecast of a run's memory by part, and the memory that is available. Axis letters: see `retort.core`.

The forecast is of growth above the process as it is before anything is loaded. It knows what the loss core and the
optimizer allocate to the byte; what a family keeps of a forward pass is estimated from its shape, so it is the least
certain part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from retort.core.per_token import BLOCK_ELEMENTS, chunk_rows
from retort.models.lm import LanguageModel
from retort.teachers.base import ScoreRequest
from retort.teachers.itself import sides_of
from retort.train.setup.prepare import Prepared


@dataclass(frozen=True)
class Forecast:
    """Bytes by part.

    Attributes:
        models: Weights of all models, the copies of a student that teaches itself, and those in bf16 of weights under
            an adapter.
        training: Gradients and two moments of Adam, fp32; a second gradient where their variance is measured.
        head: Gradients of head and embeddings while they are formed, before they are added up.
        activations: Activations of the largest micro-batch, kept for its backward pass.
        loss: A chunk of logits of every model, and what autograd keeps of a block.
        signals: The teachers' signals for a batch of rollouts, kept until it is learnt from.
        copies: The student's weights in bf16, where it learns in fp32 and computes in bf16; freed while it learns.
        cache: Keys and values during generation of rollouts or held-out completions.
    """

    models: int
    training: int
    head: int
    activations: int
    loss: int
    signals: int
    copies: int
    cache: int

    @property
    def peak(self) -> int:
        """The peak in bytes: learning and generation do not happen at once."""
        learning = self.head + self.activations + self.loss
        return self.models + self.training + max(learning + self.signals, self.copies + self.cache)

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
        }
        sizes = {text: getattr(self, name) for name, text in names.items() if name != "copies" or self.copies}
        parts = ", ".join(f"{text} {size_text(size)}" for text, size in sizes.items())
        return f"about {size_text(self.peak)} at peak: {parts}"


def forecast(prepared: Prepared) -> Forecast:
    """Forecasts the parts of a run's memory, in bytes above an empty process."""
    student, config = prepared.student, prepared.config
    lms = list(prepared.lms.values())
    frozen = lms[1:] + [student] * _self_passes(prepared)
    text = student.model.config.get_text_config()
    head = student.head().weight_VD
    learns = head.requires_grad
    untied = student.model.get_input_embeddings().weight is not head
    # The embeddings' own gradient is as large as they are, however few ids occur.
    forming = 4 * head.numel() * 2
    tokens = min(config.optimizer.batch_tokens, _rollout_tokens(prepared, longest=True))
    rows = min(chunk_rows(prepared.learner.vocab, student.device), tokens)
    product = 4 if prepared.student.precision == "fp32" else 2
    # Student: product and fp32 logits in one where the product is fp32; a teacher's chunk is held beside it.
    chunks = rows * prepared.learner.vocab * (4 + product * len(frozen)) + 6 * 4 * BLOCK_ELEMENTS
    rollouts = prepared.source.count * prepared.method.rollout.samples
    evaluated = config.eval.samples * min(64, len(prepared.held_out))
    generators = [(student, max(rollouts, evaluated))]
    if config.eval.teacher and "teacher" in prepared.lms:
        generators.append((prepared.lms["teacher"], evaluated))
    longest = config.rollout.max_new_tokens + _prompt_tokens(prepared)
    copies, lasting = student.working_bytes()
    return Forecast(
        models=sum(p.numel() * p.element_size() for model in {lm.model for lm in lms} for p in model.parameters())
        + (prepared.teachers.own.bytes if prepared.teachers.own else 0)
        + lasting,
        training=(16 if config.record.gradient_variance_every else 12) * student.trainable_parameters,
        head=0 if not learns else forming if not untied else 4 * head.numel(),
        activations=tokens * _kept_bytes(text, product, checkpointed=config.optimizer.gradient_checkpointing),
        loss=chunks,
        signals=_signals(prepared, rollouts * config.rollout.max_new_tokens, product),
        copies=copies,
        cache=max(_cache(lm, min(config.rollout.parallel, count), longest, product) for lm, count in generators),
    )


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def size_text(bytes_: float) -> str:
    """A size as text, in MiB or GiB."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def _kept_bytes(text: object, product: int, *, checkpointed: bool) -> int:
    """Bytes per token that a decoder of this shape keeps for its backward pass."""
    width, layers = int(getattr(text, "hidden_size")), int(getattr(text, "num_hidden_layers"))  # noqa: B009
    if checkpointed:
        return 4 * width * (layers + 8)
    heads = int(getattr(text, "num_attention_heads"))  # noqa: B009
    groups = int(getattr(text, "num_key_value_heads", None) or heads)
    each = int(getattr(text, "head_dim", None) or width // heads)
    wide = int(getattr(text, "intermediate_size", None) or 4 * width)
    # Residual stream and norms stay fp32. Products in bf16 keep a bf16 copy of what goes into them.
    residual = 4 * 8 * width
    attention = product * (6 * heads + 6 * groups) * each
    feed_forward = product * 4 * wide
    return layers * (residual + attention + feed_forward)


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


def _signals(prepared: Prepared, steps: int, product: int) -> int:
    """Hidden states where the whole distribution is asked for, a few numbers a step elsewhere."""
    total = 0
    for name, view in prepared.method.views.items():
        lm = prepared.lms.get(view.model)
        if lm is None:  # A remote teacher sends numbers only.
            total += steps * 4 * 64
            continue
        dense = ScoreRequest(view, prepared.method.needs(name)).whole
        width = int(lm.model.config.get_text_config().hidden_size)
        sides = sides_of(view.weights)
        total += steps * (width * product * len(sides) if dense else 4 * 64)
        own = prepared.teachers.own
        if view.model == "student" and dense and own is not None and own.moves_within_batch:
            moving = sum(weights.kind != "frozen" for weights, _ in sides)
            total += moving * product * prepared.student.head().weight_VD.numel()
    return total


def _cache(lm: LanguageModel, rollouts: int, longest: int, product: int) -> int:
    text = lm.model.config.get_text_config()
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return rollouts * longest * groups * each * text.num_hidden_layers * 2 * product


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
