"""The trained student as a Hugging Face folder with a model card."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retort.align.stops import WRITTEN, named_stops
from retort.errors import RunError, visible
from retort.files import disk_full, new_folder, reason, write_text
from retort.method import Method
from retort.models.adapter import described
from retort.models.lm import LanguageModel
from retort.train.setup import Setup

#: Folder of an adapter, beside that of the model.
ADAPTER = "adapter"


def write_model(setup: Setup, folder: Path, results: Mapping[str, Any], step: int) -> None:
    """Writes the student as `from_pretrained` opens it: weights (safetensors), tokenizer, generation settings, card.

    An adapter is merged into the weights; by itself it lies beside the folder, as `PeftModel.from_pretrained` opens it.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    student = setup.student
    merged = None if student.adapter is None else student.adapter.merged()
    bare = student.model.generation_config
    try:
        if student.adapter is not None:
            with new_folder(folder.with_name(ADAPTER)) as temporary:
                student.adapter.save(temporary)
                write_text(temporary / "README.md", _adapter_card(setup))
        with new_folder(folder) as temporary:
            with _says_where_it_stops(student):
                student.model.generation_config = student.written_generation
                student.model.save_pretrained(temporary, state_dict=merged)
                student.tokenizer.save_pretrained(temporary)
            write_text(temporary / "README.md", card(setup, results, step))
    except Exception as error:  # a tokenizer that meets a full disk raises plain Exception
        if not isinstance(error, OSError | SafetensorError) and not disk_full(error):
            raise
        raise RunError(f"cannot write {folder}: {reason(error)}; the last checkpoint is intact") from None
    finally:
        student.model.generation_config = bare


@contextlib.contextmanager
def _says_where_it_stops(student: LanguageModel) -> Iterator[None]:
    """Within, the student's configurations and tokenizer name the stops that the run had, whoever named them first.

    An ordinary token (`rollout.stop`) does not become the tokenizer's `eos_token`: a special token is cut differently.
    """
    stops, tokenizer = student.stops, student.tokenizer
    ids = [stops.primary, *sorted(stops.ids - {stops.primary})]
    named: Any = ids[0] if len(ids) == 1 else ids
    config: Any = student.model.config
    # A model of several parts has the key in the part that writes, too.
    holders: list[Any] = [student.written_generation, config]
    if config.get_text_config() is not config:
        holders.append(config.get_text_config())
    before = [(holder, getattr(holder, "eos_token_id", None)) for holder in holders]
    eos, had = tokenizer.eos_token, getattr(config, WRITTEN, None)
    try:
        for holder in holders:
            holder.eos_token_id = named
        setattr(config, WRITTEN, ids)
        if stops.primary in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(stops.primary))
        yield
    finally:
        for holder, value in before:
            holder.eos_token_id = value
        if had is None:
            delattr(config, WRITTEN)
        else:
            setattr(config, WRITTEN, had)
        tokenizer.eos_token = eos


def _adapter_card(setup: Setup) -> str:
    name = Path(setup.student.name).name
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, on-policy-distillation, retort]",
        "---",
        "",
        f"# A LoRA adapter of {_words(name)}, distilled with {_words(setup.method.name)}",
        "",
        f"Load {_code(name)}, then `PeftModel.from_pretrained(model, folder)`. It was trained on fp32 weights; the "
        "same student, merged, is the folder `model` of the run.",
    ]
    return "\n".join(lines) + "\n"


def card(setup: Setup, results: Mapping[str, Any], step: int) -> str:
    """The model card: what was done with what, and what came of it."""
    method, config = setup.method, setup.config
    paper = method.paper
    origin = f"{paper.title} ({paper.year}{', arXiv ' + paper.arxiv if paper.arxiv else ''})" if paper else "custom"
    settings = ", ".join(f"{name} = {value}" for name, value in method.settings.items())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [on-policy-distillation, retort]",
        "---",
        "",
        f"# {_words(Path(setup.student.name).name)}, distilled with {_words(method.name)}",
        "",
        _trained(method.rollout.sources),
        "",
        f"- student: {_code(Path(setup.student.name).name)} ({setup.student.parameters:,} parameters)",
        *([_adapted(setup)] if setup.student.adapter else []),
        *(
            [f"- teacher: {_code(Path(setup.teacher_lm.name).name)} ({setup.teacher_lm.parameters:,} parameters)"]
            if setup.teacher_lm
            else []
        ),
        *[f"- teacher: {text}" for text in self_teachers(method)],
        *([f"- base: {_code(Path(setup.base_lm.name).name)}, frozen"] if setup.base_lm else []),
        f"- method: {_code(method.name)} ({method.status}): {_words(origin)}",
        f"- settings: {_words(settings)}",
        *([f"- before it: {_code(method.before[1].name)}, {method.before[0]} batches"] if method.before else []),
        f"- stops with: {_code(named_stops(setup.student.stops, setup.student.tokenizer))}",
        f"- data: {_code(Path(str(config.data)).name)}, {len(setup.train)} prompts",
        f"- training: {step} batches of {setup.batch_prompts} prompts, seed {config.seed}, fp32 master weights, "
        f"{setup.precision} products",
        "",
        *_table(results),
    ]
    return "\n".join(lines) + "\n"


def _words(text: str) -> str:
    """A text from anywhere as words of a page: no markup, no HTML, no cell of a table, no character that is obeyed."""
    return re.sub(r"([\\\\`*\[\]<>|&])", r"\\\1", visible(text))


def _code(text: str) -> str:
    """A text from anywhere as code, between more backticks than it holds in a row."""
    inside = visible(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", inside)), default=0) + 1)
    edge = " " if inside[:1] == "`" or inside[-1:] == "`" else ""
    return f"{fence}{edge}{inside}{edge}{fence}"


def self_teachers(method: Method) -> list[str]:
    """The student as its own teacher, in words, once for each way in which its weights move."""
    moving = dict.fromkeys(view.weights for view in method.views.values() if view.model == "student")
    return [f"the student itself, {weights.words}" for weights in moving]


def _adapted(setup: Setup) -> str:
    adapter = setup.student.adapter
    assert adapter is not None
    return (
        f"- trained {described(adapter.settings)}: {setup.student.trainable_parameters:,} parameters learnt. It is "
        f"merged into these weights; by itself it is in the run's folder `{ADAPTER}`"
    )


def _trained(sources: frozenset[str]) -> str:
    """What was done, in a sentence; honest about who wrote."""
    if sources == {"student"}:
        return (
            "Trained by on-policy distillation with Retort: the student wrote, the teacher answered every token of it."
        )
    who = {"student": "the student", "teacher": "the teacher", "dataset": "the data"}
    wrote = " and ".join(who[source] for source in ("student", "teacher", "dataset") if source in sources)
    return (
        f"Trained by distillation with Retort: {wrote} gave the answers, and the teacher answered every token of them."
    )


def _table(results: Mapping[str, Any]) -> list[str]:
    if not results.get("rows"):
        return ["No evaluation was made."]
    names = [name for name in results["rows"][0] if name != "who"]
    lines = [
        f"Held-out prompts: {results['problems']}{_graded(results)}, {results['k']} answers each; 95 % intervals over "
        "prompts.",
        "",
        "| | " + " | ".join(map(_words, names)) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in results["rows"]:
        cells = [_cell(row.get(name)) for name in names]
        lines.append(f"| {_words(row['who'])} | " + " | ".join(cells) + " |")
    return lines


def _graded(results: Mapping[str, Any]) -> str:
    return f" ({results['graded']} of them graded)" if "graded" in results else ""


def _cell(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "-"
    known = cell["low"] is not None and cell["high"] is not None
    return f"{cell['value']:z.3f}" + (f" ({cell['low']:z.3f} to {cell['high']:z.3f})" if known else "")
