"""What other trainers call their settings, and which of ours does it: a name that is none of ours leads to one.

Names are pointed to and never taken for ours: the same word counts other things elsewhere (sequences, devices,
optimizer steps), and a number that was copied would quietly mean something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["ELSEWHERE", "Ours", "ours_for", "place"]


@dataclass(frozen=True)
class Ours:
    """What a setting of another trainer is here.

    Attributes:
        settings: Full names of ours, the nearest first; of a method's if they begin with `method.`. None: nothing is
            to be set.
        how: How a number is converted, or what differs; empty where it is the same.
    """

    settings: tuple[str, ...]
    how: str = ""

    def __str__(self) -> str:
        """An ending for an error message."""
        how = f" ({self.how})" if self.how and self.settings else self.how
        return f"here it is {' and '.join(self.settings)}{how}" if self.settings else how


_A_STEP = "the prompts of a whole step, on all devices; what is computed at once is bounded by optimizer.batch_tokens"
_IN_TOKENS = "a step is rollout.prompts prompts, computed in pieces of so many tokens, whatever memory there is"
_BETA = "of the method gkd with the JSD; for 0 and 1: method.divergence=forward_kl and reverse_kl"
_ROWS = "steps = epochs * rows / rollout.prompts; left out, a run goes through the data once"
_ONE_TABLE: tuple[tuple[str, Ours], ...] = (
    ("lr learning_rate peak_lr max_lr", Ours(("optimizer.learning_rate",))),
    ("lr_scheduler_type lr_scheduler scheduler lr_decay_style", Ours(("optimizer.schedule",))),
    ("min_lr_rate min_lr_ratio", Ours(("optimizer.final",))),
    ("min_lr", Ours(("optimizer.final",), "as a share of the learning rate")),
    ("warmup_steps num_warmup_steps lr_warmup_steps", Ours(("optimizer.warmup",))),
    ("warmup_ratio lr_warmup_steps_ratio", Ours(("optimizer.warmup",), "ratio * steps * optimizer.updates")),
    ("adam_beta1", Ours(("optimizer.beta1",))),
    ("adam_beta2", Ours(("optimizer.beta2",))),
    ("max_grad_norm clip_grad gradient_clip_val max_norm", Ours(("optimizer.grad_clip",))),
    ("optim", Ours((), "the optimizer is AdamW; its settings are in the section optimizer")),
    ("batch_size train_batch_size per_device_train_batch_size rollout_batch_size", Ours(("rollout.prompts",), _A_STEP)),
    ("micro_batch_size ppo_micro_batch_size_per_gpu", Ours(("optimizer.batch_tokens",), _IN_TOKENS)),
    ("gradient_accumulation_steps", Ours(("optimizer.batch_tokens",), _IN_TOKENS)),
    ("ppo_mini_batch_size mini_batch_size", Ours(("optimizer.updates",), "mini-batches per batch, not their size")),
    ("num_iterations ppo_epochs", Ours(("optimizer.epochs",))),
    ("activation_checkpointing enable_gradient_checkpointing", Ours(("optimizer.gradient_checkpointing",))),
    ("max_steps total_training_steps num_steps", Ours(("steps",), "batches of rollouts, not optimizer steps")),
    ("num_train_epochs num_epochs total_epochs", Ours(("steps",), _ROWS)),
    (
        "max_length max_seq_length max_seq_len sequence_len seq_len max_model_len",
        Ours(("rollout.max_prompt_tokens", "rollout.max_new_tokens"), "prompt and answer are bounded apart"),
    ),
    ("max_prompt_length prompt_length", Ours(("rollout.max_prompt_tokens",))),
    (
        "max_completion_length max_response_length response_length max_tokens",
        Ours(("rollout.max_new_tokens",), "of held-out answers: eval.max_new_tokens"),
    ),
    ("num_generations rollouts_per_example n", Ours(("method.samples",), "answers per prompt")),
    ("temperature", Ours(("method.temperature",), "of held-out answers: eval.temperature")),
    ("lmbda", Ours(("method.on_policy_fraction",), "of the method gkd")),
    ("beta", Ours(("method.teacher_weight",), _BETA)),
    ("epsilon clip_ratio cliprange", Ours(("method.clip",), "of the methods that have it")),
    ("bf16", Ours(("precision",), "precision=bf16")),
    ("fp16", Ours(("precision",), "bf16 or fp32; there is no fp16")),
    ("torch_dtype dtype mixed_precision", Ours(("precision",))),
    ("attn_implementation flash_attention", Ours(("attention",))),
    ("lora_r r use_peft adapter peft", Ours(("lora.rank",))),
    ("lora_alpha", Ours(("lora.alpha",))),
    ("lora_dropout", Ours(("lora.dropout",))),
    ("lora_target_modules target_modules lora_target_linear", Ours(("lora.targets",))),
    ("use_rslora", Ours(("lora.rslora",))),
    ("model model_name_or_path model_name base_model model_path", Ours(("student",))),
    ("teacher_model_name_or_path teacher_model teacher_name", Ours(("teacher",))),
    ("ref_model ref_model_name_or_path", Ours(("base",))),
    ("dataset dataset_name datasets train_files train_dataset data_files", Ours(("data",))),
    ("eval_dataset val_files test_datasets", Ours(("eval.data",))),
    ("dataset_split dataset_train_split", Ours(("split",))),
    ("max_samples max_train_samples train_max_samples", Ours(("limit",))),
    ("output_dir default_local_dir save_dir out_dir", Ours(("out",))),
    ("run_name experiment_name", Ours(("out",), "a run is named by its folder")),
    ("eval_steps eval_interval test_freq", Ours(("eval.every",), "steps are batches of rollouts")),
    ("save_steps save_freq save_interval", Ours(("checkpoint.every",), "steps are batches of rollouts")),
    ("save_total_limit", Ours(("checkpoint.keep",))),
    ("logging_steps log_interval", Ours((), "nothing is to be set: every step is written to metrics.jsonl")),
    ("report_to logger wandb_project use_wandb", Ours(("tracker",), "tensorboard, wandb or trackio")),
    ("resume_from_checkpoint resume_mode", Ours((), "go on with: retort train --resume RUN")),
    ("random_seed", Ours(("seed",))),
    ("reward_funcs reward_function reward_fn reward", Ours(("task",), "math, exact, ... or module:function")),
)
#: Their name -> ours.
ELSEWHERE = {name: ours for names, ours in _ONE_TABLE for name in names.split()}


def ours_for(name: str, known: Collection[str]) -> Ours | None:
    """Which setting does what a name that is none of ours means elsewhere, or in another section.

    Args:
        name: As the user wrote it, with or without sections, with `-` or `_`.
        known: Full names of all settings, a chosen method's (`method.samples`) included.

    Returns:
        None where the name is no other trainer's, and the end of no setting's.
    """
    last = name.lstrip("-").replace("-", "_").rpartition(".")[2].lower()
    found = ELSEWHERE.get(last)
    if found is not None:
        # A method's own setting is one only where that method has it.
        there = [own for own in found.settings if not own.startswith("method.") or own in known]
        return found if there == list(found.settings) or not place(last, known) else Ours(place(last, known))
    places = place(last, known)
    return Ours(places) if places else None


def place(last: str, known: Collection[str]) -> tuple[str, ...]:
    """Full names of the settings whose last part is `last`, at most three."""

    def ends() -> Iterator[str]:
        for name in known:
            if name.rpartition(".")[2] == last:
                yield name

    return tuple(ends())[:3]
