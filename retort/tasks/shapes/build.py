"""Make the bundled teacher and student of the task shapes from nothing.

    python -m retort.tasks.shapes.build --out models

saves ``teacher/`` and ``student/`` in Hugging Face format, each with a model card that holds the numbers measured in
this very run. The teacher is made first, by supervised learning on right responses. The student goes on from there, and
learns from responses that follow the note most of the time, beside pictures that are often those of other problems with
the same question. It is a model that could look: distillation has to bring that back.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from retort.tasks.shapes.pictures import SIDE, pixels
from retort.tasks.shapes.problems import (
    HELD_OUT_ROWS,
    KINDS,
    OPENINGS,
    Problem,
    answer_in,
    check,
    drawn,
    problem,
    question,
)
from retort.tasks.shapes.recipes import (
    HEADS,
    LAYERS,
    PIXELATED,
    SAMPLES,
    STUDENT,
    TEACHER,
    VISION_LAYERS,
    VISION_WIDTH,
    WIDTH,
    Recipe,
    Score,
    card,
)
from retort.tasks.shapes.tokenizer import (
    ASSISTANT,
    CONTEXT,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PATCH,
    PIXEL_MEAN,
    PIXEL_STD,
    TEMPLATES,
    USER,
    build_processor,
    build_tokenizer,
)

MAX_NEW_TOKENS = 28
DESCRIBE = "what is in the picture ?"  # asked only in the first third of the training

Row = tuple[list[int], int, Tensor]
"""Ids of a prompt and its response, the number of the former, and pixel values."""

# Axes: B problems, L tokens, V words, A tokens of a response.


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model in fp32."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=WIDTH**-0.5,
        tie_word_embeddings=True,
        **ids,  # pyright: ignore[reportArgumentType]
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=3 * VISION_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=VISION_WIDTH,
        initializer_range=0.05,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    return model


def pixel_values(pictures: Sequence[Problem], shaded: Sequence[bool] = ()) -> Tensor:
    """What the processor makes of the problems' pictures, [B, 3, side, side]."""
    drawn_ = [
        pixels(one.items, one.ground, one.shaded if marked else ())
        for one, marked in zip(pictures, shaded or [False] * len(pictures), strict=True)
    ]
    flat = torch.frombuffer(bytearray(b"".join(drawn_)), dtype=torch.uint8)
    return (flat.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 255 - PIXEL_MEAN) / PIXEL_STD


def pixelated(values_BCHW: Tensor, ratio: float = PIXELATED) -> Tensor:
    """Pictures at a lower resolution: bilinear down, nearest up."""
    size = max(1, int(SIDE * ratio))
    small = F.interpolate(values_BCHW, size=(size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, size=(SIDE, SIDE), mode="nearest-exact")


def words(text: str, section: str = "") -> list[str]:
    """The tokens of a prompt, as the chat template writes it."""
    return [USER, *section.split(), *([IMAGE] * IMAGE_TOKENS), *text.split(), ASSISTANT]


class Data:
    """Batches of training problems."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.rng = recipe, random.Random(f"shapes build {recipe.seed}")
        self.word = build_tokenizer().get_vocab()

    def section(self, one: Problem) -> str:
        """A section before the question, or none."""
        if self.rng.random() >= self.recipe.hinted:
            return ""
        if self.rng.random() < 0.6:
            return TEMPLATES["hint"].format(text=one.caption)
        return TEMPLATES["solution"].format(text=one.response(self.rng.choice(OPENINGS)))

    def batch(self, described: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Problems without a section, and with one: ids and what is learnt of them, [B, L] each, and pixel values."""
        rng, recipe = self.rng, self.recipe
        groups: tuple[list[Row], list[Row]] = [], []
        for _ in range(recipe.batch):
            one = problem(rng, "train", None if recipe.kinds == KINDS else question(rng, recipe.kinds))
            shown = one if rng.random() < recipe.right else problem(rng, "train", one.question)
            (opening,) = rng.choices(OPENINGS, recipe.openings)
            section = self.section(one)
            answer = one.noted if recipe.followed and rng.random() < recipe.followed else one.answer
            values = pixel_values([shown], [rng.random() < recipe.shaded])[0]
            if rng.random() < recipe.blurred:
                values = pixelated(values[None], rng.uniform(0.08, 0.3))[0]
            asked, response = words(one.text, section), [*one.response(opening, answer).split(), EOS]
            if rng.random() < described:
                asked, response, section = words(DESCRIBE), [*one.caption.split(), EOS], ""
            ids = [self.word[word] for word in (*asked, *response)]
            groups[bool(section)].append((ids, len(asked), values))
        return [padded(group) for group in groups if group]


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows padded on the right: ids, what is learnt of them, and pixel values."""
    longest = max(len(ids) for ids, *_ in rows)
    ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids, *_ in rows])
    learnt_BL = torch.tensor([[asked <= at < len(ids) for at in range(longest)] for ids, asked, _ in rows])
    return ids_BL, learnt_BL, torch.stack([values for *_, values in rows])


def train(model: LlavaForConditionalGeneration, recipe: Recipe) -> None:
    """Supervised learning: cross-entropy of the response tokens, AdamW, cosine; then weights as they are stored."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    data, start = Data(recipe), time.monotonic()
    for step in range(1, recipe.steps + 1):
        rate = recipe.lr * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        groups = data.batch(recipe.described if 3 * step <= recipe.steps else 0.0)
        count = sum(int(learnt_BL.sum()) for _, learnt_BL, _ in groups)
        whole = 0.0
        optimizer.zero_grad()
        for ids_BL, learnt_BL, values in groups:
            chosen_BL = learnt_BL[:, 1:]
            hidden_BLD = model.model(input_ids=ids_BL[:, :-1], pixel_values=values).last_hidden_state
            logits_AV = model.lm_head(hidden_BLD[chosen_BL])
            loss = F.cross_entropy(logits_AV, ids_BL[:, 1:][chosen_BL], reduction="sum") / count
            loss.backward()
            whole += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == recipe.steps:
            score = f"; {measure(model, 96, 1)}" if step % 500 == 0 or step == recipe.steps else ""
            spent = time.monotonic() - start
            print(f"  step {step} of {recipe.steps}, {spent:.0f} s, loss {whole:.4f}{score}", flush=True)
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(weights.to(torch.bfloat16))


@torch.no_grad()
def respond(
    model: LlavaForConditionalGeneration,
    asked: Sequence[Problem],
    values: Tensor,
    generator: torch.Generator | None,
) -> list[str]:
    """A response to each problem, with the pictures that are given: sampled, or without a generator the likeliest."""
    tokenizer = build_tokenizer()
    word = tokenizer.get_vocab()
    prompts, end = [[word[part] for part in words(one.text)] for one in asked], word[EOS]
    longest = max(map(len, prompts))
    ids_BL = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    real_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    state = model(input_ids=ids_BL, attention_mask=real_BL, pixel_values=values, use_cache=True, logits_to_keep=1)
    drawn_BA = torch.empty(len(prompts), 0, dtype=torch.long)
    while True:
        likely_BV = state.logits[:, -1].softmax(-1)
        next_B1 = (
            likely_BV.argmax(-1, keepdim=True)
            if generator is None
            else torch.multinomial(likely_BV, 1, generator=generator)
        )
        drawn_BA = torch.cat([drawn_BA, next_B1], 1)
        if drawn_BA.shape[1] == MAX_NEW_TOKENS or (drawn_BA == end).any(1).all():
            break
        real_BL = torch.cat([real_BL, torch.ones_like(next_B1)], 1)
        cache = state.past_key_values
        state = model(input_ids=next_B1, attention_mask=real_BL, past_key_values=cache, use_cache=True)
    whole = [ids[: ids.index(end)] if end in ids else [] for ids in drawn_BA.tolist()]  # no end is wrong
    return [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in whole]


def measure(model: LlavaForConditionalGeneration, count: int = HELD_OUT_ROWS, samples: int = SAMPLES) -> Score:
    """The scores of a model on the same held-out problems and with the same seed every time."""
    asked = [drawn("held_out", index) for index in range(count)]
    clear = pixel_values(asked)
    many = asked * samples
    sampled, unclear = (
        respond(model, many, values.repeat(samples, 1, 1, 1), torch.Generator().manual_seed(0))
        for values in (clear, pixelated(clear))
    )
    likely = [respond(model, asked, values, None) for values in (clear, pixelated(clear))]
    return Score(
        right=sum(map(check, (one.answer for one in many), sampled)) / len(many),
        noted=sum(answer_in(text) == one.noted for one, text in zip(many, sampled, strict=True)) / len(many),
        pixelated=sum(map(check, (one.answer for one in many), unclear)) / len(many),
        changed=sum(answer_in(one) != answer_in(other) for one, other in zip(*likely, strict=True)) / count,
    )


def save(name: str, start: str, stages: Sequence[Recipe], model: LlavaForConditionalGeneration, out: Path) -> None:
    """Save and measure a model, and write its card."""
    folder = out / name
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    build_processor().save_pretrained(folder)
    score = measure(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))
    (folder / "README.md").write_text(card(name, start, stages, score, model.num_parameters()), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{name}: {score}, {size:.1f} MB in {folder}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make the bundled teacher and student of the task shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write teacher/ and student/ into")
    parser.add_argument("--only", choices=("teacher", "student"), help="only this one; a student needs the teacher")
    arguments = parser.parse_args()
    if arguments.only != "student":
        model = build_model(build_tokenizer(), TEACHER[0].seed)
        for recipe in TEACHER:
            train(model, recipe)
        save("teacher", "random weights", TEACHER, model, arguments.out)
    if arguments.only != "teacher":
        model = LlavaForConditionalGeneration.from_pretrained(arguments.out / "teacher", dtype=torch.float32)
        train(model, STUDENT)
        save("student", "the teacher's weights", [STUDENT], model, arguments.out)


if __name__ == "__main__":
    main()
