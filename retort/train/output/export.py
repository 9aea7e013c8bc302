"""The trained student as a Hugging Face folder, with a model card (`retort.train.output.card`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from retort.align.stops import STOP_IDS_KEY
from retort.errors import RunError
from retort.files import disk_full, new_folder, reason, write_text
from retort.models.lm import LanguageModel
from retort.ranks import here
from retort.train.output.card import ADAPTER, adapter_card, card
from retort.train.setup.prepare import Prepared


def write_model(
    prepared: Prepared, folder: Path, results: Mapping[str, Any], step: int, check: Callable[[], None] = lambda: None
) -> None:
    """Writes the student as `from_pretrained` opens it: weights (safetensors), tokenizer, generation settings, card.

    An adapter is merged into the weights; by itself it lies beside the folder, as `PeftModel.from_pretrained` opens it.
    Of several ranks, each holds the whole weights for that moment, as it does to generate, and the first one writes.

    Args:
        prepared: The run.
        folder: Of the model.
        results: The before/after table.
        step: Batches done.
        check: Called before anything is written.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    student = prepared.student

    def written(state: dict[str, Tensor] | None) -> None:
        check()
        _write(prepared, folder, results, step, state)

    with student.whole_state() as state:
        here().first(lambda: written(state))


def _write(
    prepared: Prepared,
    folder: Path,
    results: Mapping[str, Any],
    step: int,
    state: dict[str, Tensor] | None,
) -> None:
    student = prepared.student
    weights = state if student.adapter is None else student.adapter.merged(state)
    bare = student.model.generation_config
    try:
        if student.adapter is not None:
            with new_folder(folder.with_name(ADAPTER)) as temporary:
                student.adapter.save(temporary, state)
                write_text(temporary / "README.md", adapter_card(prepared))
        with new_folder(folder) as temporary:
            with _with_stops(student):
                student.model.generation_config = student.saved_generation
                student.model.save_pretrained(temporary, state_dict=weights)
                student.save_tokens(temporary)
            write_text(temporary / "README.md", card(prepared, results, step))
    except Exception as error:  # A tokenizer that meets a full disk raises a plain Exception.
        if not isinstance(error, OSError | SafetensorError) and not disk_full(error):
            raise
        raise RunError(f"cannot write {folder}: {reason(error)}; the last checkpoint is intact") from None
    finally:
        student.model.generation_config = bare


@contextlib.contextmanager
def _with_stops(student: LanguageModel) -> Iterator[None]:
    """Within its block, the student's configurations and tokenizer name the stops of the run.

    An ordinary token (`rollout.stop`) does not become the tokenizer's `eos_token`: a special token is cut differently.
    """
    stops, tokenizer = student.stops, student.tokenizer
    ids = [stops.primary, *sorted(stops.ids - {stops.primary})]
    named: Any = ids[0] if len(ids) == 1 else ids
    config: Any = student.model.config
    # A model of several parts has the key in its text part, too.
    holders: list[Any] = [student.saved_generation, config]
    if config.get_text_config() is not config:
        holders.append(config.get_text_config())
    before = [(holder, getattr(holder, "eos_token_id", None)) for holder in holders]
    eos, had = tokenizer.eos_token, getattr(config, STOP_IDS_KEY, None)
    try:
        for holder in holders:
            holder.eos_token_id = named
        setattr(config, STOP_IDS_KEY, ids)
        if stops.primary in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(stops.primary))
        yield
    finally:
        for holder, value in before:
            holder.eos_token_id = value
        if had is None:
            delattr(config, STOP_IDS_KEY)
        else:
            setattr(config, STOP_IDS_KEY, had)
        tokenizer.eos_token = eos
