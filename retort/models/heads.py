"""The output head of a model of transformers, whole or of several ranks the rows that one keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from retort.core.head import Head
from retort.models.adapter import Adapter
from retort.models.sharding import slice_of


def head_of(model: Any, adapter: Adapter | None) -> Head:
    """The head as a model holds it, with the scale or soft-cap that the family applies to its logits.

    Args:
        model: Of transformers.
        adapter: The adapter inside the model, if there is one.
    """
    layer: Any = model.get_output_embeddings()
    layer, low_rank = (layer, None) if adapter is None else adapter.on(layer)
    config = model.config.get_text_config()
    # Families name the same transformation differently; `check_head` in `load` catches families with any other.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        layer.weight,
        getattr(layer, "bias", None),
        float(scale),
        getattr(config, "final_logit_softcapping", None),
        low_rank,
    )


def own_rows(head: Head, gathered: Callable[[Tensor], Tensor]) -> Head:
    """Of a head that is spread over ranks, the rows that this rank keeps.

    Args:
        head: As the model holds it.
        gathered: Gathers a tensor; only one of an adapter's factors has a row for each id.
    """
    adapter, bias_V = head.adapter, head.bias_V
    if adapter is not None:
        adapter = replace(adapter, down_QD=gathered(adapter.down_QD), up_VQ=slice_of(adapter.up_VQ))
    bias_V = None if bias_V is None else slice_of(bias_V)
    return replace(head, weight_VD=slice_of(head.weight_VD), bias_V=bias_V, adapter=adapter)
