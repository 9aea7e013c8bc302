"""Puts a LoRA adapter into a model, by `peft`; see `retort.models.adapter` for the adapter itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from retort.core.random_streams import key
from retort.errors import UserError, did_you_mean, shortened
from retort.models.adapter import NAME, Adapter, need_peft
from retort.models.lm import LanguageModel

if TYPE_CHECKING:
    from peft import LoraConfig

#: peft's name for every linear layer but the head.
ALL_LINEAR = "all-linear"


def add_adapter(
    lm: LanguageModel,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (ALL_LINEAR,),
    rslora: bool = False,
    vision: bool = False,
    seed: int = 0,
) -> None:
    r"""Puts a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) into a model, and freezes all else.

    A layer's product gains :math:`s\,B A x`; B begins at 0, so the model's outputs begin unchanged.

    Args:
        lm: The model; changed in place, `lm.adapter` is the adapter.
        rank: Number of rows of A.
        alpha: The scale is s = alpha / rank.
        targets: Names of layers, or their ends (`q_proj`); `all-linear` is every linear layer but the head, which is
            `lm_head` in most families.
        rslora: Whether s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).
        vision: Whether layers of a vision tower and its projector are among the targets.
        seed: The run's seed; A is drawn from a stream of its own.

    Raises:
        UserError: `peft` is not installed, a target is not in the model, or it is tied to another weight.
    """
    need_peft()
    settings = {"rank": rank, "alpha": alpha, "targets": list(targets), "rslora": rslora}
    chosen = _targets(lm, targets, vision=vision)
    lm.adapter = put_in(lm.model, chosen, settings, name=lm.name, seed=seed, task_type="CAUSAL_LM")


def put_in(
    model: Any,
    chosen: str | list[str],
    settings: Mapping[str, Any],
    *,
    name: str,
    seed: int,
    task_type: str | None = None,
) -> Adapter:
    """Puts `peft`'s layers into any module, in place. A is drawn from a stream of its own, B is 0; all else is frozen.

    Args:
        model: The module.
        chosen: The layers, as `peft` takes them.
        settings: Rank, alpha, targets (as the user named them) and rslora.
        name: The model's name or folder, which `peft` notes in the adapter's folder.
        seed: The run's seed.
        task_type: What `peft` calls the kind of model.

    Raises:
        UserError: `peft` refuses the layers.
    """
    from peft import LoraConfig, get_peft_model

    config: LoraConfig = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules=chosen,
        use_rslora=settings["rslora"],
        bias="none",
        task_type=task_type,
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers will drop
        # For fused experts peft makes a pattern of its own, and warns when that matches nothing.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        torch.manual_seed(key(seed, "adapter"))
        try:
            wrapper: Any = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"lora.targets: {_refusal(model, settings['targets'], error)}") from None
    wrapper.peft_config[NAME].base_model_name_or_path = name
    return Adapter(model, wrapper, settings)


def _refusal(model: Any, targets: Sequence[str], error: ValueError) -> str:
    """The reason why `peft` refuses targets; its own message begins with the printed layer, which has many lines."""
    for target in targets:
        for name, module in model.named_modules():
            if (name == target or name.endswith(f".{target}")) and getattr(module, "weight", None) is None:
                return (
                    f"'{target}' is a {type(module).__name__}, no single layer that peft could adapt; name the layers "
                    "in it, or all-linear, which reaches the experts of a mixture, too"
                )
    return shortened(" ".join(str(error).split()), 300)


def _targets(lm: LanguageModel, targets: Sequence[str], *, vision: bool) -> str | list[str]:
    """The targets for `peft`, which accepts `all-linear` only alone; whole names where a vision tower is left out."""
    model: Any = lm.model
    ends = {"the head": model.get_output_embeddings(), "the embedding": model.get_input_embeddings()}
    outside = set[str]() if vision or lm.vision is None else lm.vision.names()
    inside = [name for name, _ in model.named_modules() if name not in outside]
    known = [name for name in inside if isinstance(model.get_submodule(name), torch.nn.Linear)]
    linear = [name for name in known if model.get_submodule(name) is not ends["the head"]]
    tied = ends["the head"].weight is ends["the embedding"].weight
    chosen: list[str] = []
    for target in targets:
        named = [name for name in inside if name == target or name.endswith(f".{target}")]
        if target != ALL_LINEAR and not named:
            short = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(f"lora.targets: {lm.name} has no layer '{target}'; {did_you_mean(target, short)}")
        for what, module in ends.items():
            if tied and any(model.get_submodule(name) is module for name in named):
                raise UserError(
                    f"lora.targets: '{target}' is {what} of {lm.name}, tied to the other end of the model: merged, an "
                    "adapter on one would change both; leave it out"
                )
        chosen += linear if target == ALL_LINEAR else named if outside else [target]
    return ALL_LINEAR if list(targets) == [ALL_LINEAR] and not outside else chosen
