"""Image-text models: packed and padded against one by one, real processors, decoding, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import FAMILIES
from PIL import Image

from retort.align.chat import rendered
from retort.core.images import PLACEHOLDER, PromptImage
from retort.core.random_streams import uniforms
from retort.core.rollouts import Message, Prompt
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.models.image_trials import with_images
from retort.models.images import made_up, same_image_tokens
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.lora import add_adapter
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.engines.decode import can_decode
from retort.rollout.engines.hf import HFEngine

WIDE, TALL = made_up(40, 24, 0), made_up(20, 70, 3)


@pytest.fixture(scope="module")
def image_lm(image_folder: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """Loads a frozen model of a family, once; tests change nothing of it."""
    made: dict[str, LanguageModel] = {}

    def load(family: str) -> LanguageModel:
        if family not in made:
            made[family] = loaded(image_folder(family), role="teacher")
        return made[family]

    return load


def loaded(folder: Path, role: str = "student", precision: Any = "fp32", **more: Any) -> LanguageModel:
    return load_model(str(folder), role=role, precision=precision, device=torch.device("cpu"), **more)


def batch(lm: LanguageModel) -> list[TokenSequence]:
    """Prompts with one image, with several and with none; two completions of one of them, one with a stray id."""
    assert lm.vision is not None
    one = with_images(lm, 3, [WIDE], 5, 1)
    return [
        one,
        one.prefix.then([5, lm.vision.mark, 7, 9, 11, 13], decided=True),
        with_images(lm, 2, [TALL, WIDE], 4, 2),
        TokenSequence.of([9, 4]).then([3, 5, 8], decided=True),
        with_images(lm, 2, [TALL], 3, 5).then([20, 21]).then([22, 23], decided=True),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_batches_are_those_of_one_by_one_in_value_and_gradient(
    image_folder: Callable[[str], Path], family: str
) -> None:
    lm = loaded(image_folder(family))
    assert lm.vision is not None and lm.vision.joins and lm.packs and lm.shared_prefixes
    lm.model.double()
    sequences = batch(lm)
    found: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {}
    for way in ("alone", "padded", "packed", "unshared"):
        lm.model.zero_grad()
        lm.shared_prefixes = way == "packed"
        hidden_ND = getattr(lm, "packed" if way == "unshared" else way)(sequences)
        weight_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (hidden_ND * weight_ND).sum().backward()
        gradients = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
        found[way] = hidden_ND.detach(), gradients
    expected_ND, expected = found.pop("alone")
    assert any(float(expected[name].abs().max()) > 1e-3 for name in expected if "vis" in name)
    for hidden_ND, gradients in found.values():
        # Norms of these families round to fp32, whatever the weights are in.
        torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-6, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            most = 1e-6 * max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=most)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_changes_what_follows_it_and_nothing_else(
    image_lm: Callable[[str], LanguageModel], family: str
) -> None:
    lm = image_lm(family)
    other = made_up(40, 24, 9)
    first, second = with_images(lm, 3, [WIDE], 5, 1), with_images(lm, 3, [other], 5, 1)
    assert torch.equal(first.tokens_L, second.tokens_L)
    with torch.no_grad():
        one_ND, two_ND = lm.hidden([first, batch(lm)[3]]), lm.hidden([second, batch(lm)[3]])
    assert ((one_ND - two_ND)[:5].norm(dim=1) > 1e-3).all()
    torch.testing.assert_close(one_ND[5:], two_ND[5:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_prompt_is_what_the_processor_makes_of_the_conversation(
    image_lm: Callable[[str], LanguageModel], family: str
) -> None:
    lm = image_lm(family)
    assert lm.vision is not None
    messages = (
        Message("user", f"{PLACEHOLDER}What is it?\n\n", images=(WIDE,)),
        Message("assistant", "A wall."),
        Message("user", f"And {PLACEHOLDER} beside {PLACEHOLDER}\n?", images=(TALL, WIDE)),
    )
    for count in (1, 3):
        prompt = Prompt("a", messages[:count])
        context = rendered(prompt, lm.tokenizer, image_tokens=lm.image_tokens)
        turns = [
            {
                "role": turn["role"],
                "content": [{"type": "text", "text": turn["content"]}]
                if isinstance(turn["content"], str)
                else turn["content"],
            }
            for turn in (message.as_dict() for message in messages[:count])
        ]
        images = iter(image.decoded() for image in prompt.images)
        for turn in turns:
            turn["content"] = [
                {**part, "image": next(images)} if part["type"] == "image" else part for part in turn["content"]
            ]
        expected = lm.vision.processing.processor.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert context.tokens_L.tolist() == expected["input_ids"][0].tolist()
        assert [own.payload for own in context.media] == list(prompt.images)
        lm.check_media([context], "a prompt")
        # What the model computes is what it computes of the processor's own inputs.
        with torch.no_grad():
            last_D = lm.model(**expected).logits[0, -1]
            own_D = lm.head().logits(lm.hidden([context.then([7], decided=True)]))[0]
        torch.testing.assert_close(own_D, last_D, rtol=1e-4, atol=1e-5)


def requests(lm: LanguageModel, room: int = 10) -> list[Request]:
    contexts = [own.prefix.then([20]) for own in batch(lm)]
    contexts.append(contexts[0].then([lm.vision.mark, 7], decided=True))  # type: ignore[union-attr]
    return [Request(own, uniforms(0, "rollouts", n, count=room)) for n, own in enumerate(contexts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_images_are_the_same_in_any_batch_and_by_generate(
    image_lm: Callable[[str], LanguageModel], family: str
) -> None:
    lm = image_lm(family)
    with torch.no_grad():
        assert can_decode(lm)
    sampling = Sampling(10, 1.3)
    engines = [HFEngine(lm, vocab=lm.head().width, max_parallel=size) for size in (16, 4, 4)]
    engines[2].loops = False
    together, halves, by_generate = (engine.generate(requests(lm), sampling) for engine in engines)
    alone = [engines[0].generate([one], sampling)[0] for one in requests(lm)]
    assert len({tuple(own.ids) for own in together}) >= 4
    for request, one, *others in zip(requests(lm), together, halves, by_generate, alone, strict=True):
        for other in others:
            assert one.ids == other.ids
            torch.testing.assert_close(one.logp_A, other.logp_A, rtol=1e-4, atol=1e-5)
        sequence = request.context.read().then(one.ids, decided=True)
        with torch.no_grad():
            logits_AV = lm.head().logits(lm.alone([sequence]))
        logp_AV = (logits_AV / 1.3).log_softmax(-1)
        scored_A = logp_AV.gather(1, torch.tensor(one.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(one.logp_A, scored_A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_a_completion_may_follow_an_image_at_once(image_lm: Callable[[str], LanguageModel], family: str) -> None:
    lm = image_lm(family)
    context = batch(lm)[2].prefix
    assert context.media[-1].position + context.media[-1].length == len(context)
    engine = HFEngine(lm, vocab=lm.head().width, max_parallel=2)
    found = engine.generate([Request(context, uniforms(0, "rollouts", 1, count=8))], Sampling(8))[0]
    with torch.no_grad():
        logp_AV = lm.head().logits(lm.alone([context.then(found.ids, decided=True)])).log_softmax(-1)
    scored_A = logp_AV.gather(1, torch.tensor(found.ids)[:, None]).squeeze(1)
    torch.testing.assert_close(found.logp_A, scored_A, rtol=1e-4, atol=1e-4)


def test_an_image_is_encoded_once_for_all_rollouts_of_its_prompt(image_folder: Callable[[str], Path]) -> None:
    lm = loaded(image_folder("idefics3"))
    assert lm.vision is not None
    context = with_images(lm, 3, [WIDE], 1, 1).prefix
    asked = [Request(context, uniforms(0, "rollouts", n, count=3)) for n in range(8)]
    engine = HFEngine(lm, vocab=lm.head().width, max_parallel=8)
    engine.generate(asked, Sampling(3))
    before = lm.vision.encoded
    engine.generate(asked, Sampling(3))
    assert lm.vision.encoded == before + 1
    sequences = [context.then([5, 6 + n], decided=True) for n in range(8)]
    lm.hidden(sequences).sum().backward()
    assert lm.vision.encoded == before + 2


def test_features_of_a_frozen_tower_are_kept_and_those_of_a_learning_one_are_not(
    image_folder: Callable[[str], Path],
) -> None:
    lm = loaded(image_folder("llava"))
    assert lm.vision is not None
    sequence = with_images(lm, 3, [WIDE], 4, 1)
    with torch.no_grad():
        first_ND = lm.hidden([sequence])
        for parameter in lm.vision.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(lm.hidden([sequence]), first_ND, atol=1e-4)
    lm.vision.freeze()
    lm.hidden([sequence])
    before = lm.vision.encoded
    lm.hidden([sequence]).sum().backward()
    assert lm.vision.encoded == before
    assert all(p.grad is None for p in lm.vision.parameters())
    assert lm.model.get_input_embeddings().weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("vision", [False, True])
def test_an_adapter_is_in_the_text_model_and_in_the_tower_only_if_asked(
    image_folder: Callable[[str], Path], vision: bool
) -> None:
    pytest.importorskip("peft")
    for targets in (["all-linear"], ["q_proj", "v_proj"]):
        lm = loaded(image_folder("llava"))
        assert lm.vision is not None
        add_adapter(lm, rank=2, alpha=4.0, targets=targets, vision=vision)
        assert any("language_model" in name for name in lm.trainable())
        assert any("vision_tower" in name for name in lm.trainable()) == vision == lm.vision.learns
        lm.hidden(batch(lm)).sum().backward()


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_bf16_reads_images_to_its_rounding_with_weights_that_are_cast_once(
    image_folder: Callable[[str], Path], family: str
) -> None:
    lm = loaded(image_folder(family), precision="bf16")
    assert lm.vision is not None and lm.vision.joins and lm.packs
    tower = sum(2 * p.numel() for module in lm.vision.modules().values() for p in module.parameters() if p.ndim == 2)
    assert lm.working_bytes()[0] > tower / 2
    with torch.no_grad():
        alone_ND, packed_ND = lm.alone(batch(lm)).float(), lm.packed(batch(lm)).float()
    assert ((packed_ND - alone_ND).norm(dim=1) < 0.05 * alone_ND.norm(dim=1)).all()


def test_a_family_that_cannot_join_images_is_computed_one_at_a_time_with_a_note(
    image_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from retort.models.vision import Vision

    whole = loaded(image_folder("llava"))
    monkeypatch.setattr(Vision, "joined", lambda *_, **__: 1 / 0)
    lm = loaded(image_folder("llava"))
    assert lm.vision is not None and not lm.vision.joins and not lm.packs
    assert any("one at a time" in note for note in lm.notes)
    with torch.no_grad():
        torch.testing.assert_close(lm.hidden(batch(lm)), whole.alone(batch(whole)))
    engine = HFEngine(lm, vocab=lm.head().width, max_parallel=4)
    found = engine.generate(requests(lm), Sampling(5))
    assert engine.loops is False
    expected = HFEngine(whole, vocab=lm.head().width, max_parallel=4)
    monkeypatch.undo()
    for one, two in zip(found, expected.generate(requests(whole), Sampling(5)), strict=True):
        assert one.ids == two.ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_is_read_again_with_its_processor(
    image_lm: Callable[[str], LanguageModel], family: str, tmp_path: Path
) -> None:
    lm = image_lm(family)
    lm.model.save_pretrained(tmp_path)
    lm.save_tokens(tmp_path)
    again = loaded(tmp_path, role="teacher")
    assert again.image_tokens is not None and lm.image_tokens is not None
    assert again.image_tokens.ids(TALL) == lm.image_tokens.ids(TALL)
    with torch.no_grad():
        torch.testing.assert_close(again.hidden(batch(again)), lm.hidden(batch(lm)))


def test_settings_of_a_video_part_that_cannot_be_made_here_stay_in_the_folder(
    image_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("with torchvision the video part is made")
    settings = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3}
    source = image_folder("qwen3_vl") / "video_preprocessor_config.json"
    source.write_text(json.dumps(settings))
    try:
        lm = loaded(image_folder("qwen3_vl"), role="teacher")
    finally:
        source.unlink()
    lm.save_tokens(tmp_path)
    assert json.loads((tmp_path / "video_preprocessor_config.json").read_text()) == settings


def prompt_with_image(image: PromptImage = WIDE) -> Prompt:
    return Prompt("row 3", (Message("user", f"{PLACEHOLDER}?", images=(image,)),))


def refused(lm: LanguageModel, match: str, prompt: Prompt | None = None) -> None:
    """The model reads text as ever, and an image is one line."""
    text = rendered(Prompt("b", (Message("user", "hi"),)), lm.tokenizer, image_tokens=lm.image_tokens)
    with torch.no_grad():
        assert lm.hidden([text.then([5], decided=True)]).isfinite().all()
    with pytest.raises(UserError, match=match) as error:
        rendered(prompt or prompt_with_image(), lm.tokenizer, image_tokens=lm.image_tokens)
    assert "\n" not in str(error.value)


def changed(folder: Path, target: Path, name: str, change: Callable[[dict[str, Any]], Any] | None) -> Path:
    """A copy of a folder with one JSON file changed, or left out."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    if change is None:
        (target / name).unlink()
        return target
    settings = json.loads((target / name).read_text())
    change(settings)
    (target / name).write_text(json.dumps(settings))
    return target


def test_without_pillow_text_is_read_and_an_image_is_one_line(
    image_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "PIL" else found(name, *more))
    refused(
        loaded(image_folder("llava"), role="teacher"), r"images need Pillow: pip install 'retort-distill\[vision\]'"
    )


def test_without_a_processor_text_is_read_and_an_image_is_one_line(
    image_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(image_folder("llava"), tmp_path, "processor_config.json", None)
    refused(loaded(folder, role="teacher"), "no processor in its folder")


def test_a_processor_that_writes_another_number_of_tokens_than_there_are_features_is_one_line(
    image_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(
        image_folder("llava"), tmp_path, "processor_config.json", lambda own: own.update(num_additional_image_tokens=3)
    )
    refused(loaded(folder, role="teacher"), "writes 18 placeholder tokens .* makes 16 features")


def test_a_processor_that_cannot_be_made_is_one_line(image_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = changed(
        image_folder("llava"),
        tmp_path,
        "processor_config.json",
        lambda own: own["image_processor"].update(image_processor_type="NoSuchProcessor"),
    )
    refused(loaded(folder, role="teacher"), "its processor cannot be made")


def test_media_that_the_model_cannot_read_are_one_line(
    image_lm: Callable[[str], LanguageModel], model_folder: Callable[..., Path]
) -> None:
    lm, text = image_lm("idefics3"), loaded(model_folder(chat=True))
    good = batch(lm)[0]
    own = good.media[0]
    short = TokenSequence.of(good.prefix.ids, (Media(own.digest, own.position, own.length - 1, own.payload),))
    with pytest.raises(UserError, match="the processor of .* makes 33 of it"):
        lm.check_readable([short])
    sound = TokenSequence.of(good.prefix.ids, (Media("x", own.position, own.length, b"RIFF"),))
    with pytest.raises(UserError, match="a sound or a video"):
        lm.check_readable([sound])
    with pytest.raises(UserError, match="read as a model of text alone"):
        text.hidden([good])


def test_a_teacher_with_another_number_of_image_tokens_is_named(image_lm: Callable[[str], LanguageModel]) -> None:
    student, teacher = image_lm("llava"), image_lm("idefics3")
    same_image_tokens(student, student, [WIDE, TALL])
    with pytest.raises(UserError, match=r"an image of 40 x 24 pixels is 16 tokens to the student .* 33 to the teacher"):
        same_image_tokens(student, teacher, [WIDE, TALL])


def test_an_image_that_the_processor_refuses_is_one_line(image_lm: Callable[[str], LanguageModel]) -> None:
    lm = image_lm("qwen2_vl")
    thin = PromptImage.of(Image.new("RGB", (2000, 2)))
    refused(lm, "refuses an image of 2000 x 2 pixels", prompt_with_image(thin))
