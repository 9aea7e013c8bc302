"""An engine in processes of its own (vLLM, workers) for a run's rollouts: checks of the settings, and the engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from retort.align.chat import Renderer
from retort.config import Config
from retort.core.rollouts import Prompt
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.ranks import here, local_size
from retort.rollout.engines.base import FollowingEngine
from retort.rollout.engines.follower import PROBE_PROMPTS
from retort.rollout.engines.pool import PoolSettings, WorkerPool
from retort.rollout.engines.vllm import VLLMEngine
from retort.rollout.engines.vllm_generator import VLLMSettings, has_vllm
from retort.rollout.engines.vllm_pool import VLLMPool
from retort.rollout.engines.vllm_server import vllm_of
from retort.wire.workers import placed

#: Arguments of the server that are chosen here.
_OURS = ("--model", "--host", "--port", "--uds", "--skip-tokenizer-init", "--enable-scale-out", "--logprobs-mode")


def check_other_engine(config: Config) -> None:
    """Checks, before anything is loaded, that the settings name someone who can write.

    Raises:
        UserError: No interpreter with vLLM is named, or the run has what vLLM is not offered for.
    """
    asked = config.rollout
    if asked.workers and asked.engine not in ("own", "vllm"):
        raise UserError(
            f"rollout.workers = {asked.workers} belongs to rollout.engine=own or vllm, not to {asked.engine}; set one "
            "of them"
        )
    if asked.engine == "vllm":
        _check_vllm(config)
    else:
        idle = "vllm_python" if asked.vllm_python else "vllm_options" if asked.vllm_options else None
        if idle is not None:
            raise UserError(f"rollout.{idle} belongs to rollout.engine=vllm; set that, or leave it out")
    if asked.workers:
        _check_workers(asked.workers)


def _check_vllm(config: Config) -> None:
    """Refuses vLLM where there is none, or where no process could hold it.

    Raises:
        UserError: That.
    """
    asked = config.rollout
    if asked.vllm_python is None and not has_vllm():
        raise UserError(
            "rollout.engine=vllm needs rollout.vllm_python, the python of an environment that has vLLM; this one has "
            "none (docs/engines.md)"
        )
    if here().size > 1 and not asked.workers and not placed():
        raise UserError(
            "rollout.engine=vllm writes for several ranks as workers: set rollout.workers=1 or more, start one rank, "
            "or use rollout.engine=own"
        )
    ours = next((option for option in asked.vllm_options if option.split("=")[0].replace("_", "-") in _OURS), None)
    if ours is not None:
        raise UserError(f"rollout.vllm_options: {ours.split('=')[0]} is set by the run; leave it out")
    if not placed():  # others have looked for it where it is
        vllm_of(asked.vllm[0])


def other_engine(
    config: Config,
    lm: LanguageModel,
    vocab: int,
    prompts: Sequence[Prompt],
    render: Renderer,
    newest: Callable[[], int],
) -> FollowingEngine | None:
    """The engine in other processes that the settings ask for; None for the loop in this one.

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
    if asked.engine != "vllm" and not asked.workers:
        return None
    probe = [render(prompt) for prompt in prompts[:PROBE_PROMPTS]]
    if asked.engine == "vllm" and lm.image_tokens is not None:
        raise UserError(f"rollout.engine=vllm writes text alone, and {lm.name} reads images; use rollout.engine=own")
    if asked.workers or placed():
        return _pool(config, lm, vocab, probe, newest)
    settings = VLLMSettings(
        asked.vllm[0],
        options=asked.vllm[1:],
        max_parallel=asked.parallel,
        longest=_longest(config),
        bound=asked.noise_bound,
        trust_remote_code=config.trust_remote_code,
    )
    return VLLMEngine(lm, vocab, settings, newest, probe)


def _check_workers(count: int) -> None:
    """Refuses workers where a package that they need is missing, or a rank cannot reach them.

    Raises:
        UserError: That.
    """
    extras = {"fastapi": "serve", "uvicorn": "serve", "httpx2": "remote", "tenacity": "remote"}
    lacking = next((name for name in extras if importlib.util.find_spec(name) is None), None)
    if lacking is not None:
        raise UserError(
            f"rollout.workers = {count} needs the package '{lacking}': pip install 'retort-distill[remote,serve]'"
        )
    if not placed() and here().size > local_size():
        raise UserError(
            f"rollout.workers = {count} would be on the loopback of rank 0's machine, and there are ranks on others; "
            "start the run with `retort train --cluster` (docs/cluster.md), or leave the workers out"
        )


def _pool(
    config: Config, lm: LanguageModel, vocab: int, probe: Sequence[TokenSequence], newest: Callable[[], int]
) -> WorkerPool:
    """The workers of a run.

    Raises:
        UserError: The student reads images.
    """
    asked = config.rollout
    if lm.image_tokens is not None:
        raise UserError(f"rollout.workers generate text alone, and {lm.name} reads images; use rollout.workers=0")
    by_vllm = asked.engine == "vllm"
    settings = PoolSettings(
        asked.workers or len(placed()),
        placed=placed(),
        parallel=asked.parallel,
        longest=_longest(config) if by_vllm else None,
        bound=asked.noise_bound,
        hangs=asked.worker_timeout,
        threads=config.threads,
        trust_remote_code=config.trust_remote_code,
        more=tuple(f"--vllm={word}" for word in asked.vllm),
    )
    return (VLLMPool if by_vllm else WorkerPool)(lm, vocab, settings, newest, probe)


def _longest(config: Config) -> int | None:
    """The longest sequence of a run, tokens; None where only the model's context bounds it."""
    asked = config.rollout
    if config.environment is not None:
        return None
    return max(asked.max_prompt_tokens, asked.max_view_tokens) + asked.max_new_tokens
