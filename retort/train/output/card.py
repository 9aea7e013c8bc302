"""The model card: training, data and results as plain text, in which nothing acts as markup."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from retort.align.stops import named_stops
from retort.config import BUILTIN
from retort.data import HUB_NAME
from retort.errors import counted, visible
from retort.evaluate.measures import measure, ordered
from retort.method import Method
from retort.models import gguf
from retort.models.adapter import described
from retort.models.lm import LanguageModel
from retort.rollout.plan import plan_summary
from retort.train.models.models import located
from retort.train.setup.prepare import Prepared

#: Name of an adapter's folder, beside that of the model.
ADAPTER = "adapter"
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
#: The way to use a student that reads images, for its folder under a name of the reader's.
_SEEING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # of this model
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
asked = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": asked}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
written = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(written, skip_special_tokens=True))
```
"""
#: Pattern of a licence identifier as the hub writes it, such as apache-2.0.
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")


def card(prepared: Prepared, results: Mapping[str, Any], step: int) -> str:
    """The model card of the student after a run.

    Args:
        prepared: The parts of the run.
        results: The before/after table.
        step: Number of batches that the student learnt from.
    """
    method, config, optimizer = prepared.method, prepared.config, prepared.config.optimizer
    student, teacher = prepared.student, prepared.teachers.lms.get("teacher")
    settings = ", ".join(f"{name} = {value}" for name, value in method.settings.items())
    base, (licence, words) = _hub_name(student.name), model_licence(student.name)
    more = _base_model(base) + ([f"license: {licence}"] if licence else [])
    more += ["pipeline_tag: image-text-to-text"] if student.vision else []
    lines = [
        *front("transformers", ["on-policy-distillation", "retort"], more),
        f"# {plain_text(short(student.name))}, distilled with {plain_text(method.name)}",
        "",
        _trained(method.rollout.sources),
        "",
        f"- student: {code(short(student.name))} ({student.parameters:,} parameters{_rounded(student)})",
        *([_adapted(prepared)] if student.adapter else []),
        *(
            [f"- teacher: {code(short(teacher.name))} ({teacher.parameters:,} parameters{_rounded(teacher)})"]
            if teacher
            else []
        ),
        *([f"- teacher: {plain_text(prepared.teachers.models['teacher'].name)}"] if config.teachers.models else []),
        *[f"- teacher: {text}" for text in self_teachers(method)],
        *[f"- {who}: {code(short(lm.name))}{_rounded(lm)}, frozen" for who, lm in beside(prepared).items()],
        f"- method: {code(method.name)} ({plain_text(standing(method))})",
        f"- settings of the method: {plain_text(settings) or 'none'}",
        *([f"- before it: {code(method.before[1].name)}, {method.before[0]} batches"] if method.before else []),
        f"- stops with: {code(named_stops(student.stops, student.tokenizer))}",
        f"- data: {code(short(str(config.data)))}, {len(prepared.source.prompts)} prompts",
        *([_images(prepared)] if student.vision else []),
        f"- training: {step} steps, each on {plan_summary(method.rollout, prepared.source.count)}; AdamW, learning "
        f"rate {optimizer.learning_rate:g}, {optimizer.schedule} schedule, warm-up {optimizer.warmup}; seed "
        f"{config.seed}; fp32 master weights, {prepared.student.precision} products",
        f"- versions: {versions()}",
        f"- licence: {words}; what the teacher's allows is for you to check",
        "",
        *([_SEEING] if student.vision else []),
        *table(results),
    ]
    return "\n".join(lines) + "\n"


def _images(prepared: Prepared) -> str:
    """A line on the images that a student has seen, and on whether its tower learnt from them."""
    vision, prompts = prepared.student.vision, prepared.source.prompts
    learnt = "learnt" if vision is not None and vision.learns else "did not learn"
    return f"- images: in {sum(bool(own.images) for own in prompts)} of these prompts; the vision tower {learnt}"


def beside(prepared: Prepared) -> dict[str, LanguageModel]:
    """The frozen models besides the teacher, by their label."""
    others = {name: lm for name, lm in prepared.lms.items() if name not in ("student", "teacher")}
    return {name if name == "base" else f"model '{name}'": lm for name, lm in others.items()}


def adapter_card(prepared: Prepared) -> str:
    """The card of an adapter's folder."""
    student = prepared.student
    base = _hub_name(student.name)
    lines = [
        *front("peft", ["lora", "on-policy-distillation", "retort"], _base_model(base)),
        f"# A LoRA adapter of {plain_text(short(student.name))}, distilled with {plain_text(prepared.method.name)}",
        "",
        f"Load {code(short(student.name))}, then `PeftModel.from_pretrained(model, folder)`. It was trained on fp32 "
        "weights; the same student, merged, is the folder `model` of the run.",
    ]
    return "\n".join(lines) + "\n"


def standing(method: Method) -> str:
    """The status of a method and its source, or that it is the user's own."""
    paper = method.paper
    if paper is None:
        return "a method of the user's own"
    source = f"{paper.title} ({paper.year}{', arXiv ' + paper.arxiv if paper.arxiv else ''})"
    if not method.parts_as_published:
        return f"changed by the user, not as published: {source}"
    return f"{method.status}: {source}"


def self_teachers(method: Method) -> list[str]:
    """Descriptions of the student as its own teacher, one for each way in which its weights move."""
    moving = dict.fromkeys(view.weights for view in method.views.values() if view.model == "student")
    return [f"the student itself, {weights.words}" for weights in moving]


def model_licence(name: str) -> tuple[str | None, str]:
    """The licence of a model as its folder states it: the hub's identifier, if there is one, and a description."""
    place = Path(located(name))
    if located(name) != name:
        return "apache-2.0", "`apache-2.0`, as Retort's, with which the student comes"
    if gguf.is_gguf(name):
        found = gguf.licence(name) or ""
        if _LICENCE.fullmatch(found):
            return found, f"{code(found)}, as the student's file states"
        return None, "not known: the student's file states none"
    folder = place if place.is_dir() else _cached(name)
    if folder is None:
        return None, "not known here: see the student's page"
    found = _front_matter(folder / "README.md").get("license")
    if isinstance(found, str) and _LICENCE.fullmatch(found):
        return found, f"{code(found)}, as the student's card states"
    file = next((folder / one for one in _LICENCE_FILES if (folder / one).is_file()), None)
    if file is not None:
        return None, f"see the student's {code(file.name)}, which begins with {code(_first_line(file))}"
    return None, "not known: the student's folder states none"


def _front_matter(file: Path) -> Mapping[str, Any]:
    """The front matter of a model card; empty where there is none that can be read."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(file) if file.is_file() else None
    except Exception:  # Whatever is wrong with this YAML, it names no licence.
        return {}
    return found if isinstance(found, Mapping) else {}


def _first_line(file: Path) -> str:
    with file.open("rb") as opened:
        lines = opened.read(4096).decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), "nothing")[:80]


def _cached(name: str) -> Path | None:
    """The folder into which the hub's library has loaded a model; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # The hub has no such name.
        return None
    return Path(found).parent if isinstance(found, str) else None


def _hub_name(name: str) -> str | None:
    """The hub name `owner/name` of a model that comes from the hub; None for any other."""
    cached = re.search(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)[/\\]snapshots(?:[/\\]|$)", name)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    own = located(name) != name or Path(name).exists() or ":" in name
    return None if own or HUB_NAME.fullmatch(name) is None else name


def short(name: str) -> str:
    """A short name: hub names and built-in names whole, of a path its last part."""
    return name if _hub_name(name) == name or name in BUILTIN or located(name) != name else Path(name).name


def versions() -> str:
    """Versions of what a run computes with, in one line."""
    import transformers

    import retort

    found = {"retort": retort.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in (found | {"python": platform.python_version()}).items())


def _base_model(name: str | None) -> list[str]:
    return [f"base_model: {json.dumps(name)}"] if name else []


def front(library: str, tags: list[str], more: list[str]) -> list[str]:
    """The front matter of a card."""
    return ["---", f"library_name: {library}", f"tags: [{', '.join(tags)}]", *more, "---", ""]


def plain_text(text: str) -> str:
    """Escapes a text for the card: no markup, no HTML, no table cell, no control character."""
    return re.sub(r"([\\\\`*\[\]<>|&])", r"\\\1", visible(text))


def code(text: str) -> str:
    """Formats a text as code, between more backticks than it holds in a row."""
    inside = visible(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", inside)), default=0) + 1)
    edge = " " if inside[:1] == "`" or inside[-1:] == "`" else ""
    return f"{fence}{edge}{inside}{edge}{fence}"


def _rounded(lm: LanguageModel) -> str:
    return f", {lm.rounded}" if lm.rounded else ""


def _adapted(prepared: Prepared) -> str:
    adapter = prepared.student.adapter
    assert adapter is not None
    return (
        f"- trained {described(adapter.settings)}: {prepared.student.trainable_parameters:,} parameters learnt. It is "
        f"merged into these weights; by itself it is in the run's folder `{ADAPTER}`"
    )


def _trained(sources: frozenset[str]) -> str:
    """A sentence about the training that says which model generated the completions."""
    if sources == {"student"}:
        return "Trained by on-policy distillation with Retort: the student generated, the teacher scored every token."
    who = {"student": "the student", "teacher": "the teacher", "dataset": "the data"}
    wrote = " and ".join(who[source] for source in ("student", "teacher", "dataset") if source in sources)
    return f"Trained by distillation with Retort: {wrote} gave the completions, and the teacher scored every token."


def table(results: Mapping[str, Any]) -> list[str]:
    """Measures down, models across, as the console shows them."""
    rows = results.get("rows")
    if not rows:
        return ["No evaluation was made."]
    of = results.get("each", "completion")
    graded = f" ({results['graded']} of them graded)" if "graded" in results else ""
    lines = [
        f"Held-out prompts: {results['problems']}{graded}, {counted(results['k'], of)} each; "
        "in brackets 95 % intervals over prompts.",
        "",
        f"| | {' | '.join(plain_text(row['who']) for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in ordered([name for row in rows for name in row if name != "who"]):
        words, unit, kind = measure(name, of)
        label = f"{words}, {unit}" if unit else words
        lines.append(f"| {plain_text(label)} | {' | '.join(_cell(row.get(name), kind) for row in rows)} |")
    return lines


def _cell(cell: Mapping[str, Any] | None, kind: str) -> str:
    if not cell:
        return "-"
    form = "{:.1%}" if kind == "share" else "{:z.3f}"
    known = cell["low"] is not None and cell["high"] is not None
    ends = f" ({form.format(cell['low'])} to {form.format(cell['high'])})" if known else ""
    return form.format(cell["value"]) + ends
