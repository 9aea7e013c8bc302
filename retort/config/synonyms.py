"""Settings of other trainers and which of Retort's they correspond to, so that an unknown name leads to the known one.

Such a name is pointed to and never accepted: the same word counts other things elsewhere (sequences, devices,
optimizer steps), and a number that was copied would quietly mean something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["ELSEWHERE", "Ours", "ours_for", "settings_named"]


@dataclass(frozen=True)
class Ours:
    """The settings here that correspond to a setting of another trainer.

    Attributes:
        settings: Full names of ours, the nearest first; of a method's if they begin with `method.`. None: nothing is
            to be set.
        how: The conversion of a number, or what differs; empty where nothing does.
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
_NOTHING, _NONE = "nothing is to be set", "there is nothing of the kind"
_TEMPLATE = "prompts go through the tokenizer's own chat template, which no setting replaces"
_WHOLE = "rollouts are drawn from the whole distribution, which is scored; of held-out completions: eval.top_p"
_ROWS = "steps = epochs * rows / rollout.prompts; left out, a run goes through the data once"
_ONE_TABLE: tuple[tuple[str, Ours], ...] = (
    ("lr learning_rate peak_lr max_lr", Ours(("optimizer.learning_rate",))),
    ("lr_scheduler_type lr_scheduler scheduler scheduler.type lr_decay_style", Ours(("optimizer.schedule",))),
    ("min_lr_rate min_lr_ratio cosine_min_lr_ratio", Ours(("optimizer.final",))),
    ("min_lr", Ours(("optimizer.final",), "as a share of the learning rate")),
    ("warmup_steps num_warmup_steps lr_warmup_steps", Ours(("optimizer.warmup",))),
    ("warmup_ratio lr_warmup_steps_ratio", Ours(("optimizer.warmup",), "ratio * steps * optimizer.updates")),
    ("betas adam_betas", Ours(("optimizer.beta1", "optimizer.beta2"))),
    ("adam_beta1 betas1", Ours(("optimizer.beta1",))),
    ("adam_beta2 betas2", Ours(("optimizer.beta2",))),
    ("max_grad_norm clip_grad gradient_clip_val max_norm", Ours(("optimizer.grad_clip",))),
    ("optim", Ours((), "the optimizer is AdamW; its settings are in the section optimizer")),
    ("batch_size train_batch_size per_device_train_batch_size rollout_batch_size", Ours(("rollout.prompts",), _A_STEP)),
    ("micro_batch_size ppo_micro_batch_size_per_gpu", Ours(("optimizer.batch_tokens",), _IN_TOKENS)),
    ("ppo_max_token_len_per_gpu max_token_len_per_gpu", Ours(("optimizer.batch_tokens",))),
    (
        "sample_packing packing use_dynamic_bsz",
        Ours((), f"{_NOTHING}: rows are always packed, to optimizer.batch_tokens"),
    ),
    ("token_batch_size", Ours((), f"{_NONE}: a batch is a number of prompts, rollout.prompts")),
    ("gradient_accumulation_steps", Ours(("optimizer.batch_tokens",), _IN_TOKENS)),
    ("ppo_mini_batch_size mini_batch_size", Ours(("optimizer.updates",), "mini-batches per batch, not their size")),
    ("num_iterations ppo_epochs", Ours(("optimizer.epochs",))),
    ("activation_checkpointing enable_gradient_checkpointing model.ac", Ours(("optimizer.gradient_checkpointing",))),
    ("max_steps total_training_steps num_steps", Ours(("steps",), "batches of rollouts, not optimizer steps")),
    ("num_train_epochs num_epochs total_epochs", Ours(("steps",), _ROWS)),
    ("epochs", Ours(("steps",), f"{_ROWS}; passes over one batch of rollouts: optimizer.epochs")),
    (
        "max_length max_seq_length max_seq_len sequence_len seq_len max_model_len",
        Ours(("rollout.max_prompt_tokens", "rollout.max_new_tokens"), "prompt and completion are bounded apart"),
    ),
    ("max_prompt_length prompt_length", Ours(("rollout.max_prompt_tokens",))),
    (
        "max_completion_length max_response_length response_length max_tokens max_completion_tokens",
        Ours(("rollout.max_new_tokens",), "of held-out completions: eval.max_new_tokens"),
    ),
    ("num_generations rollouts_per_example group_size n", Ours(("method.samples",), "completions per prompt")),
    ("temperature", Ours(("method.temperature",), "of held-out completions: eval.temperature")),
    ("lmbda", Ours(("method.on_policy_fraction",), "of the method gkd")),
    ("beta", Ours(("method.teacher_weight",), _BETA)),
    ("epsilon clip_ratio cliprange", Ours(("method.clip",), "of the methods that have it")),
    ("bf16", Ours(("precision",), "precision=bf16")),
    ("fp16", Ours(("precision",), "bf16 or fp32; there is no fp16")),
    ("torch_dtype dtype mixed_precision", Ours(("precision",))),
    ("attn_implementation flash_attention model.attn", Ours(("attention",))),
    ("lora_r lora_rank r use_peft adapter peft", Ours(("lora.rank",))),
    ("lora_alpha", Ours(("lora.alpha",))),
    ("lora_dropout", Ours(("lora.dropout",))),
    ("lora_target_modules target_modules lora_target_linear", Ours(("lora.targets",))),
    ("use_rslora peft_use_rslora", Ours(("lora.rslora",))),
    ("model model_name_or_path model_name base_model model_path model.path model.name", Ours(("student",))),
    (
        "teacher_model_name_or_path teacher_model teacher_name teacher.name teacher.path teacher.model.path "
        "teacher_models.*.model_path",
        Ours(("teacher",)),
    ),
    (
        "teacher.base_url teacher_model_server_url kd_online_server_base_url",
        Ours(("teacher",), "a model in the same process, no server"),
    ),
    ("ref_model ref_model_name_or_path", Ours(("base",))),
    ("dataset dataset_name datasets datasets.path train_files train_dataset data_files", Ours(("data",))),
    ("train.source", Ours(("data", "task"), "rows and a grader instead of an environment")),
    ("prompt_key dataset_text_field", Ours(("columns",), "columns.prompt=NAME")),
    ("field_messages", Ours(("columns",), "columns.messages=NAME")),
    ("reward_model.ground_truth", Ours(("columns",), "columns.answer=reward_model.ground_truth")),
    ("datasets.type chat_template", Ours((), f"{_TEMPLATE}; columns.messages=NAME says where the conversation is")),
    ("chat_template_kwargs chat_template_kwargs.*", Ours(("rollout.thinking",), "no other argument is passed")),
    ("enable_thinking", Ours(("rollout.thinking",))),
    ("train_on_inputs", Ours((), f"{_NOTHING}: prompts are never learnt")),
    ("eval_dataset val_files test_datasets", Ours(("eval.data",))),
    ("dataset_split dataset_train_split", Ours(("split",))),
    ("max_samples max_train_samples train_max_samples", Ours(("limit",))),
    ("output_dir default_local_dir save_dir out_dir", Ours(("out",))),
    ("run_name experiment_name", Ours(("out",), "a run is named by its folder")),
    ("eval_steps eval_interval test_freq eval.interval", Ours(("eval.every",), "steps are batches of rollouts")),
    ("eval_strategy do_eval evals_per_epoch", Ours(("eval.every",), "in steps; before and after the run by default")),
    ("val_before_train", Ours(("eval.problems",), "before and after the run by default; 0: never")),
    ("val_set_size eval.num_examples", Ours(("eval.problems",), "a number of prompts, no share")),
    ("val_kwargs.n eval.n eval.group_size", Ours(("eval.samples",))),
    ("val_kwargs.temperature", Ours(("eval.temperature",))),
    ("val_kwargs.top_p", Ours(("eval.top_p",))),
    ("save_steps save_freq save_interval ckpt.interval", Ours(("checkpoint.every",), "steps are batches of rollouts")),
    ("save_strategy saves_per_epoch", Ours(("checkpoint.every",), "in steps")),
    ("save_total_limit max_actor_ckpt_to_keep ckpt.keep_last", Ours(("checkpoint.keep",))),
    (
        "logging_steps log_interval logging_strategy",
        Ours((), f"{_NOTHING}: every step is written to metrics.jsonl, and to the tracker if there is one"),
    ),
    ("log_completions num_completions_to_print", Ours(("record.rollouts",), "rollouts a step, token by token")),
    ("report_to logger wandb_project use_wandb monitors.wandb", Ours(("tracker",), "tensorboard, wandb or trackio")),
    ("resume_from_checkpoint resume_mode", Ours((), "go on with: retort train --resume RUN")),
    ("random_seed", Ours(("seed",))),
    (
        "reward_funcs reward_function reward_fn reward custom_reward_function custom_reward_function.*",
        Ours(("task",), "math, exact, ... or module:function"),
    ),
    (
        "seq_kd",
        Ours(("cold_start.steps", "cold_start.answers"), "a first phase on the teacher's completions, no mixture"),
    ),
    ("sampling.source", Ours(("cold_start.steps", "cold_start.loss"), "a first phase of a run, not a run")),
    ("kd_alpha kd_ce_alpha", Ours((), f"{_NONE}: two losses are not added; cold_start.loss=sft comes first instead")),
    ("kd_beta", Ours(("method.divergence",), "of the method gkd")),
    ("kd_temperature", Ours(("method.loss_temperature",), "of the method temperature")),
    ("kd_online_topk distillation_loss.topk", Ours(("method.top_k",), "of the method topk_kl")),
    ("kd_normalize_topk", Ours(("method.tail",), "of the method topk_kl, which renormalises unless told")),
    ("loss_mode loss_type algo.type", Ours(("method",), "a loss is a method: see `retort methods`")),
    ("adv_estimator", Ours(("method",), "see `retort methods`; grpo without a teacher: rlsd with method.share=0")),
    ("use_policy_gradient", Ours(("method",), "opd learns by the policy gradient; see `retort methods`")),
    (
        "use_task_rewards distillation_loss_coef",
        Ours(("method",), "sdpo and rlsd learn from grades as well; most methods do not"),
    ),
    ("kl_coef kl_loss_coef init_kl_coef", Ours(("method",), "the divergence is the loss itself: see `retort methods`")),
    ("loss_max_clamp", Ours((), f"{_NONE}: power_opd and skew_kl are bounded by themselves")),
    ("loss_agg_mode", Ours((), f"{_NONE}: what a loss is averaged over is the method's")),
    ("distillation.enabled", Ours((), f"{_NOTHING}: whatever is run distils; see `retort methods`")),
    ("max_off_policy_steps", Ours((), f"{_NONE}: rollouts are those of the current weights; see optimizer.updates")),
    ("rollout.top_p rollout.top_k rollout.min_p min_p repetition_penalty", Ours((), f"{_NONE}: {_WHOLE}")),
    ("max_num_seqs", Ours(("rollout.parallel",), "rollouts generated at once")),
    (
        "use_vllm vllm_mode vllm vllm.*",
        Ours(("rollout.engine", "rollout.vllm_python"), "vLLM has an environment and a process of its own"),
    ),
    (
        "vllm_gpu_memory_utilization gpu_memory_utilization",
        Ours(("rollout.vllm_options",), "an argument of vLLM's server, such as --gpu-memory-utilization=0.4"),
    ),
    ("use_liger_kernel use_liger liger_kernel", Ours((), f"{_NOTHING}: the loss is computed in pieces by itself")),
    (
        "deepspeed deepspeed.* fsdp fsdp_config fsdp_config.* n_gpus_per_node num_gpus nnodes tensor_parallel_size",
        Ours((), f"{_NONE}: a run is one process on one device"),
    ),
    (
        "load_in_4bit load_in_8bit qlora bnb_4bit_compute_dtype",
        Ours((), f"{_NONE}: no weights are quantised; lora.rank makes an adapter"),
    ),
    ("push_to_hub hub_model_id", Ours((), f"{_NONE}: upload the run's folder `model` by yourself")),
)
#: Their name -> ours. A name with dots is one in that section of theirs; `*` stands for any name.
ELSEWHERE = {name: ours for names, ours in _ONE_TABLE for name in names.split()}


def ours_for(name: str, known: Collection[str]) -> Ours | None:
    """Finds the setting that does what a name means in another trainer, or in another section.

    Args:
        name: As the user wrote it, with or without sections, with `-` or `_`.
        known: Full names of all settings, a chosen method's (`method.samples`) included.

    Returns:
        None where the name is no other trainer's, and the end of no setting's.
    """
    parts = name.lstrip("-").replace("-", "_").lower().split(".")
    last = parts[-1]
    found = next((ELSEWHERE[form] for form in _forms(parts) if form in ELSEWHERE), None)
    if found is not None:
        # A method's own setting is one only where that method has it.
        there = [own for own in found.settings if not own.startswith("method.") or own in known]
        near = settings_named(last, known)
        return found if there == list(found.settings) or not near else Ours(near)
    near = settings_named(last, known)
    return Ours(near) if near else ELSEWHERE.get(f"{parts[-2]}.*") if len(parts) > 1 else None


def _forms(parts: Sequence[str]) -> Iterator[str]:
    """The ends of a name by which it may be known, the longest first; `*` stands for a name that its user chose."""
    yield from (".".join(parts[start:]) for start in range(len(parts) - 1))
    yield from (f"{above}.*.{parts[-1]}" for above in parts[-3:-2])
    yield parts[-1]


def settings_named(last: str, known: Collection[str]) -> tuple[str, ...]:
    """Full names of the settings whose last part is `last`, at most three."""

    def ends() -> Iterator[str]:
        for name in known:
            if name.rpartition(".")[2] == last:
                yield name

    return tuple(ends())[:3]
