"""What a run says before it starts: honestly, and with a forecast of the memory it will take."""

from __future__ import annotations

import sys

import torch

from retort.apply import wanted
from retort.models.core import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from retort.train.setup import Setup
from retort.train.write import plan_summary


def summary(setup: Setup) -> dict[str, str]:
    """Lines of the start-up summary, by heading."""
    method, config = setup.method, setup.config
    paper = method.paper
    source = f"{paper.title}{', arXiv ' + paper.arxiv if paper.arxiv else ''} ({paper.year})" if paper else "your own"
    asked = {
        view: ", ".join(str(need) for need in sorted(wanted(method, view, teacher.capabilities)))
        for view, teacher in setup.teachers.items()
    }
    updates = min(config.optimizer.updates, setup.batch_prompts * method.rollout.samples) * config.optimizer.epochs
    return {
        "student": f"{setup.student.name}, {_count(setup.student.parameters)} parameters",
        "teacher": f"{setup.teacher_lm.name}, {_count(setup.teacher_lm.parameters)} parameters",
        "method": f"{method.name} ({method.status}): {source}",
        "settings": ", ".join(f"{name} = {value}" for name, value in method.settings.items()),
        **{f"asked of {view}": text for view, text in asked.items()},
        **({"before it": f"{method.before[1].name}, {method.before[0]} batches"} if method.before else {}),
        "data": f"{config.data}: {len(setup.train):,} prompts to learn from, {len(setup.held_out)} held out",
        "graded by": setup.verifier.name if setup.verifier else "nobody (the data has no answers)",
        "batch": f"{plan_summary(method.rollout, setup.batch_prompts)}, {updates} optimizer steps",
        "run": f"{setup.steps} batches, learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule} schedule, {setup.precision} on {setup.student.device.type}, seed {config.seed}",
        "memory": forecast(setup),
    }


def forecast(setup: Setup) -> str:
    """Rough peak of memory: what is loaded, gradients and Adam in fp32, and the larger of learning and writing."""
    student, config = setup.student, setup.config
    text = student.model.config.get_text_config()
    loaded = _loaded(setup)
    learning = 12 * student.parameters  # gradients and two moments; the weights are loaded already
    tokens = config.optimizer.batch_tokens
    kept = 2 if config.optimizer.gradient_checkpointing else 34
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * 2
    # A chunk of the student's logits, one of the teacher's, and what is kept of a block.
    logits = 2 * 4 * min(CHUNK_ELEMENTS, tokens * setup.vocab) + 6 * 4 * BLOCK_ELEMENTS
    longest = config.rollout.max_new_tokens + config.rollout.max_prompt_tokens
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    judged = config.eval.samples * len(setup.held_out)
    rollouts = min(config.rollout.parallel, max(judged, setup.batch_prompts * setup.method.rollout.samples))
    writing = rollouts * longest * heads * width * text.num_hidden_layers * 2 * 4
    parts = {
        "loaded": loaded,
        "gradients and Adam": learning,
        "a forward and backward pass": activations + logits,
        "the cache of generation": writing,
    }
    whole = loaded + learning + max(activations + logits, writing)
    return f"about {_size(whole)} at peak ({', '.join(f'{name} {_size(size)}' for name, size in parts.items())})"


def _loaded(setup: Setup) -> int:
    """Bytes in use already: of the device, or of this process."""
    if setup.student.device.type == "cuda":
        return torch.cuda.memory_allocated(setup.student.device)
    try:
        import resource  # not on Windows
    except ImportError:
        models = (setup.student.model, setup.teacher_lm.model)
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"
