"""A model that the caller holds in memory; a run works with a copy of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PAIR = (
    "give a model of transformers with its tokenizer, as a pair: (model, tokenizer); one that reads images with its "
    "processor: (model, processor)"
)


@dataclass(frozen=True, eq=False)
class InMemoryModel:
    """A model and its tokenizer, or its processor of images. None is changed: a run trains and moves only a copy.

    The weights of a model that does not learn are shared with the caller's where dtype and device allow, so they cost
    no memory twice. The caller must not change them during the run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: Any = None

    @staticmethod
    def from_pair(role: str, given: Any) -> InMemoryModel:
        """Takes a pair from the caller.

        Raises:
            UserError: It is no pair of a model and a tokenizer, or the model's weights cannot be copied and learn.
        """
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        pair: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        if len(pair) != 2:
            alone = f"a {type(given).__name__}" if len(pair) == 1 else f"{len(pair)} things"
            raise UserError(f"{role} is {alone}; {_PAIR}, or name a folder or a model of the hub")
        model, tokenizer = pair
        processor = tokenizer if hasattr(tokenizer, "image_processor") and hasattr(tokenizer, "tokenizer") else None
        tokenizer = tokenizer if processor is None else processor.tokenizer
        if not isinstance(model, PreTrainedModel):
            merge = "; merge its adapter first (merge_and_unload)" if hasattr(model, "merge_and_unload") else ""
            raise UserError(f"{role}: its model is a {type(model).__name__}{merge}; {_PAIR}")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"{role}: its tokenizer is a {type(tokenizer).__name__}; {_PAIR}")
        held = InMemoryModel(model, tokenizer, processor)
        problem = held._problem()
        if problem is not None:
            raise UserError(f"{role} {held.name}: {problem}")
        return held

    @property
    def name(self) -> str:
        """The name it was loaded from, or its family, for messages."""
        origin = Path(str(getattr(self.model, "name_or_path", "") or "")).name
        return f"{origin or type(self.model).__name__} (in memory)"

    def copy(self, *, learns: bool, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
        """The model for a run, in evaluation mode.

        Args:
            learns: Whether to copy every weight; else those that have the dtype already are shared.
            dtype: Dtype of its weights, except those that the family keeps in fp32; buffers keep theirs.
            attention: Attention implementation of transformers; None for the model's own.
        """
        # `deepcopy` takes what it finds in this memo as copied: tied weights stay tied, and nothing is copied and then
        # cast, or copied only to be shared.
        known: dict[int, Any] = {}
        exact = set(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        for name, parameter in self.model.named_parameters():
            kind = torch.float32 if exact & set(name.split(".")) else dtype
            values = parameter.detach().to(dtype=kind, copy=learns)
            known[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
        made = cast("Any", copy.deepcopy(self.model, known)).eval()
        if made.is_activation_checkpointing:
            made.activation_checkpointing_disable()
        if attention is not None:
            made.set_attn_implementation(attention)
        return made

    def _problem(self) -> str | None:
        """The reason why it cannot be used, or None."""
        model: Any = self.model
        if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
            return "its weights are quantised; load it without quantisation"
        if getattr(model, "_hf_peft_config_loaded", False):
            return "it carries an adapter; merge that first, and let the run add its own (lora.rank)"
        if any(parameter.is_meta for parameter in model.parameters()):
            return "some of its weights are not in memory (offloaded, or never loaded); load it whole"
        if len({parameter.device for parameter in model.parameters()}) > 1:
            return "its weights are on several devices; load it onto one"
        if model.get_output_embeddings() is None:
            return f"a {type(model).__name__} has no head that says which token comes next; load it as a causal model"
        return None
