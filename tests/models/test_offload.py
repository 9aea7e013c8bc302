"""Weights that leave the device between passes: gone when they are said to be, and the same when they are back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from image_models import make_image_model
from imaged import picture
from safetensors.torch import load_file, save_file

from retort.core.random_streams import uniforms
from retort.core.sequences import Media, TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.models.offload import InFiles, InHost, Room
from retort.rollout.engines.base import Sampling
from retort.rollout.engines.hf import HFEngine, Request


def loaded(folder: Path) -> LanguageModel:
    return load_model(str(folder), role="teacher", precision="fp32", device=torch.device("cpu"))


def away(folder: Path, storage: Any = "disk", room: Room | None = None) -> LanguageModel:
    lm = loaded(folder)
    waiting = partial(InFiles, f"teacher {folder}", str(folder)) if storage == "disk" else InHost
    staying = [part for part in lm.kept_head().parts if part is not None]
    lm.offload.begin(lm.model, staying, storage, waiting, room or Room())
    return lm


@pytest.fixture(scope="module")
def folder(model_folder: Callable[..., Path]) -> Path:
    return model_folder(seed=2, padded_to=64)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A folder whose files a test may change."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "model"))


def texts() -> list[TokenSequence]:
    return [TokenSequence.of([5 + n]).then([9, 12 + n, 7, 20][: 2 + n], decided=True) for n in range(3)]


def taken(lm: LanguageModel) -> int:
    """Bytes of memory behind its weights."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in lm.model.parameters() if not p.is_meta
    }
    return sum(storages.values())


def head_bytes(lm: LanguageModel) -> int:
    return sum(part.numel() * part.element_size() for part in lm.head().parts if part is not None)


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_weights_are_there_for_a_pass_only_and_say_the_same(folder: Path, storage: str) -> None:
    plain, lm = loaded(folder), away(folder, storage)
    assert lm.offload.bytes == taken(plain) - head_bytes(plain), "all but the head"
    for _ in range(2):
        assert taken(lm) == head_bytes(lm) and not lm.offload.here
        assert torch.equal(lm.all_hidden(texts(), 64), plain.all_hidden(texts(), 64))
    assert lm.offload.reads == 2, "once for each pass over several batches"
    ids_RL = torch.tensor([[5, 6, 7]])
    assert torch.equal(lm.model(input_ids=ids_RL).logits, plain.model(input_ids=ids_RL).logits), "a pass of anybody's"
    assert taken(lm) == head_bytes(lm)
    assert (lm.device, lm.parameters, lm.rows) == (plain.device, plain.parameters, plain.rows)
    assert (lm.digest(), lm.whole_digest()) == (plain.digest(), plain.whole_digest())
    assert taken(lm) == head_bytes(lm) and not any(p.requires_grad for p in lm.model.parameters())


def test_they_are_read_once_for_a_completion(folder: Path) -> None:
    def generated(lm: LanguageModel) -> list[list[int]]:
        requests = [Request(TokenSequence.of([5, 6 + n]), uniforms(0, "rollouts", n, count=8)) for n in range(3)]
        with lm.whole():
            return [list(one.ids) for one in HFEngine(lm, vocab=61, max_parallel=3).generate(requests, Sampling(8))]

    lm = away(folder)
    assert generated(lm) == generated(loaded(folder))
    assert lm.offload.reads == 1 and not lm.offload.here
    with lm.whole():
        assert not lm.offload.here, "nothing was asked of it"
    assert lm.offload.reads == 1


def test_a_model_that_takes_another_s_place_lets_it_leave_and_both_come_back(
    folder: Path, model_folder: Callable[..., Path]
) -> None:
    room = Room()
    one, two = away(folder, room=room), away(model_folder(seed=3, padded_to=64), room=room)
    expected = [loaded(Path(lm.name)).all_hidden(texts(), 64) for lm in (one, two)]
    with one.whole(), two.whole():
        for lm, other, hidden_ND in [(one, two, expected[0]), (two, one, expected[1]), (one, two, expected[0])]:
            assert torch.equal(lm.all_hidden(texts(), 64), hidden_ND)
            assert lm.offload.here and not other.offload.here
            assert taken(other) == head_bytes(other)
    assert [lm.offload.here for lm in (one, two)] == [False, False]


def test_an_untied_embedding_leaves_and_a_pass_that_fails_leaves_nothing_behind(
    model_folder: Callable[..., Path],
) -> None:
    untied = model_folder(seed=2, tied=False)
    lm = away(untied)
    assert lm.model.get_input_embeddings().weight.is_meta
    assert torch.equal(lm.all_hidden(texts(), 64), loaded(untied).all_hidden(texts(), 64))
    with pytest.raises(Exception, match="index"):
        lm.model(input_ids=torch.tensor([[10**6]]))
    assert not lm.offload.here and taken(lm) == head_bytes(lm)


def test_files_that_changed_meanwhile_are_refused(own: Path) -> None:
    lm, file = away(own), own / "model.safetensors"
    lm.all_hidden(texts(), 64)
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="teacher .*model.safetensors was changed since it was loaded; put back what it"
    ):
        lm.all_hidden(texts(), 64)
    file.unlink()
    with pytest.raises(UserError, match="model.safetensors cannot be read any more: .*; put it back"):
        lm.all_hidden(texts(), 64)
    assert not lm.offload.here and taken(lm) == head_bytes(lm)


def test_weights_that_are_not_in_the_files_as_they_are_held_are_refused(own: Path) -> None:
    lm = loaded(own)
    name, weight = next(iter(lm.model.base_model.layers.named_parameters()))
    weight.data[0] += 1.0
    with pytest.raises(UserError, match=f"offload = disk needs every weight in its files.*'layers.{name}' is not"):
        lm.offload.begin(lm.model, [lm.head().weight_VD], "disk", partial(InFiles, "teacher x", str(own)), Room())
    assert lm.offload.here and lm.offload.storage is None and lm.all_hidden(texts(), 64).isfinite().all()


def test_a_prefix_of_the_family_s_is_no_other_weight(own: Path) -> None:
    """As in the files of a model whose text model is a part."""
    weights, file = load_file(own / "model.safetensors"), own / "model.safetensors"
    lm = loaded(own)
    save_file({f"language_{name}": weight for name, weight in weights.items()}, file, metadata={"format": "pt"})
    expected = lm.all_hidden(texts(), 64)
    with pytest.raises(UserError, match="offload = disk needs every weight"):
        InFiles("teacher x", str(own), {"layers.7.nothing": torch.zeros(1)})
    lm.offload.begin(lm.model, [lm.head().weight_VD], "disk", partial(InFiles, "teacher x", str(own)), Room())
    assert torch.equal(lm.all_hidden(texts(), 64), expected)


def test_an_image_text_model_leaves_whose_files_name_its_parts_otherwise(tmp_path: Path) -> None:
    folder = make_image_model(tmp_path / "model", "llava", seed=2)
    lm, gone = loaded(folder), away(folder)
    image = picture()
    tokens = list(lm.image_tokens.ids(image))  # type: ignore[union-attr]
    prompt = TokenSequence.of([5, *tokens, 9], (Media(image.digest, 1, len(tokens), image),))
    sequences = [*texts(), prompt.then([7, 8, 20], decided=True), prompt.then([11], decided=True)]
    expected = lm.all_hidden(sequences, 512)
    assert taken(gone) == head_bytes(gone)
    assert torch.equal(gone.all_hidden(sequences, 512), expected)
    assert taken(gone) == head_bytes(gone), "its vision tower leaves, too"
