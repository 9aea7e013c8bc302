"""A student's weights as a folder that an engine opens: safetensors and a configuration, no tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from retort.errors import RunError
from retort.files import disk_full, reason, remove, write_text
from retort.models.lm import LanguageModel


def weights_of(lm: LanguageModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model by the names of its folder, those of an adapter merged into them.

    Args:
        lm: The model.
        state: Its state where it is spread over ranks, see `LanguageModel.whole_state`.
    """
    if lm.adapter is not None:
        return lm.adapter.merged(state)
    return dict(lm.model.state_dict() if state is None else state)


@torch.no_grad()
def save_weights(lm: LanguageModel, weights: Mapping[str, Tensor], folder: Path, vocab: int, *, untied: bool) -> None:
    """Writes a model for an engine, in the precision in which it computes.

    Rows of the embedding and of the head behind `vocab` are left out, so that no id there can be generated: they are
    padding, or tokens that not all models of the run have.

    Args:
        lm: The model.
        weights: Its weights by the names of its folder.
        folder: Its folder; what was there before is removed. Nothing in it has to outlive the machine.
        vocab: Only ids below this are tokens.
        untied: Write a head that is the embedding as a tensor of its own: on a CPU vLLM packs the head when it starts,
            and a reload would leave that copy as it was.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    rows = _rows(lm)
    dtype = torch.bfloat16 if lm.precision == "bf16" else torch.float32
    made: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay tied

    def given(name: str, tensor: Tensor) -> Tensor:
        kept = tensor[:vocab] if name in rows else tensor
        key = (kept.data_ptr(), kept.shape)
        if key not in made:
            narrow = kept.is_floating_point() and kept.dtype != dtype
            made[key] = kept.to(dtype) if narrow else kept.contiguous()
        elif untied and name in rows:
            return made[key].clone()
        return made[key]

    state = {name: given(name, tensor) for name, tensor in weights.items()}
    bare = lm.model.generation_config
    try:
        with writing(folder):
            remove(folder)
            folder.mkdir()
            lm.model.generation_config = lm.saved_generation
            with _tied(lm.model.config, not untied):
                lm.model.save_pretrained(folder, state_dict=state)
            # Whoever asks for a completion says where it stops and how it is sampled.
            (folder / "generation_config.json").unlink(missing_ok=True)
            _with_vocab(folder / "config.json", vocab)
    finally:
        lm.model.generation_config = bare


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, a folder is written; where that fails, nothing of it stays.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    try:
        yield
    except Exception as error:  # a tokenizer that meets a full disk raises a plain Exception
        with contextlib.suppress(OSError):
            remove(folder)
        if not isinstance(error, OSError | SafetensorError) and not disk_full(error):
            raise
        raise RunError(f"cannot write {folder}: {reason(error)}; the last checkpoint is intact") from None


def _rows(lm: LanguageModel) -> set[str]:
    """Names, in the model's folder, of what has a row for each id."""
    found = [lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
    own = {id(parameter) for module in found if module is not None for parameter in module.parameters()}
    named = lm.model.named_parameters(remove_duplicate=False)
    whole = {name for name, parameter in named if id(parameter) in own}
    return whole if lm.adapter is None else {kept for name in whole if (kept := lm.adapter.own_name(name)) is not None}


@contextlib.contextmanager
def _tied(config: Any, stays: bool) -> Iterator[None]:
    """Within its block, the configuration of a model says that its head is no embedding, unless it `stays`."""
    key = "tie_word_embeddings"
    holders = [] if stays else list({id(own): own for own in (config, config.get_text_config())}.values())
    before = [getattr(own, key, False) for own in holders]
    for own in holders:
        setattr(own, key, False)
    try:
        yield
    finally:
        for own, value in zip(holders, before, strict=True):
            setattr(own, key, value)


def _with_vocab(path: Path, vocab: int) -> None:
    """Sets the number of ids in a configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    text["vocab_size"] = min(vocab, int(text["vocab_size"]))
    write_text(path, json.dumps(config, indent=2))
