"""An engine in a process of its own (vLLM) for the rollouts of a run: checks of the settings, and the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retort.align.chat import Renderer
from retort.config import Config
from retort.core.rollouts import Prompt
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.ranks import here
from retort.rollout.engines.vllm import PROBE_PROMPTS, VLLMEngine, VLLMSettings
from retort.rollout.engines.vllm_server import vllm_of

#: Arguments of the server that are chosen here.
_OURS = ("--model", "--host", "--port", "--uds", "--skip-tokenizer-init", "--enable-scale-out", "--logprobs-mode")


def check_other_engine(config: Config) -> None:
    """Checks, before anything is loaded, that the settings name someone who can write.

    Raises:
        UserError: No interpreter with vLLM is named, or the run has what vLLM is not offered for.
    """
    asked = config.rollout
    if asked.engine != "vllm":
        idle = "vllm_python" if asked.vllm_python else "vllm_options" if asked.vllm_options else None
        if idle is not None:
            raise UserError(f"rollout.{idle} belongs to rollout.engine=vllm; set that, or leave it out")
        return
    if asked.vllm_python is None:
        raise UserError(
            "rollout.engine=vllm needs rollout.vllm_python, the python of an environment that has vLLM, which may not "
            "be this one (docs/engines.md)"
        )
    if here().size > 1:
        raise UserError("rollout.engine=vllm is not offered on several ranks; start one, or use rollout.engine=own")
    ours = next((option for option in asked.vllm_options if option.split("=")[0].replace("_", "-") in _OURS), None)
    if ours is not None:
        raise UserError(f"rollout.vllm_options: {ours.split('=')[0]} is set by the run; leave it out")
    vllm_of(asked.vllm_python)


def other_engine(
    config: Config,
    lm: LanguageModel,
    vocab: int,
    prompts: Sequence[Prompt],
    render: Renderer,
    newest: Callable[[], int],
) -> VLLMEngine | None:
    """The engine in another process that the settings ask for; None for the loop in this one.

    Args:
        config: The resolved configuration.
        lm: The student.
        vocab: Only ids below this are tokens.
        prompts: Those of the run; the first few are the probe that both sides complete and score.
        render: Renders a prompt as the student reads it.
        newest: Returns the number of optimizer steps that the student has taken.

    Raises:
        UserError: vLLM cannot write for this student.
    """
    asked = config.rollout
    if asked.engine != "vllm":
        return None
    assert asked.vllm_python is not None  # checked by `check_other_engine`
    if lm.image_tokens is not None:
        raise UserError(f"rollout.engine=vllm writes text alone, and {lm.name} reads images; use rollout.engine=own")
    settings = VLLMSettings(
        asked.vllm_python,
        options=tuple(asked.vllm_options),
        max_parallel=asked.parallel,
        longest=_longest(config),
        bound=asked.noise_bound,
        trust_remote_code=config.trust_remote_code,
    )
    return VLLMEngine(lm, vocab, settings, newest, [render(prompt) for prompt in prompts[:PROBE_PROMPTS]])


def _longest(config: Config) -> int | None:
    """The longest sequence of a run, tokens; None where only the model's context bounds it."""
    asked = config.rollout
    if config.environment is not None:
        return None
    return max(asked.max_prompt_tokens, asked.max_view_tokens) + asked.max_new_tokens
