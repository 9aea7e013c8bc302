"""Generation by transformers' continuous batching, over the live weights. Axis letters: see `retort.core`; B is rows.

transformers schedules the requests, keeps their keys and values in pages, and lets a waiting one in as soon as another
ends. It would sample by the global random state, so a logits processor of ours draws every token by the request's own
uniform, and leaves no other: log-probs and completions are those of the own loop, up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from retort.core.rollouts import Status
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.lm import LanguageModel
from retort.models.packing import WRAPPED, wrapped
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.of_model import OfModel
from retort.rollout.engines.sample import sample

#: Tokens of a page. Requests share whole pages of a common prompt, and waste half a page on average.
_PAGE = 16
#: Tokens computed in one pass, at least: a longer prompt is read in parts.
_PASS = 512
#: Bytes for pages and masks on a CPU; elsewhere it is half of the free memory.
_BYTES = 2**32
#: Name of transformers' log of all this, which prints by itself.
_LOG = "ContinuousBatchingLogger"


class ContinuousEngine(OfModel[LanguageModel]):
    """Generates with a model that is in this process, by transformers' continuous batching.

    Whether it computes what the model computes is tried once, on a few tokens, before the first completion.
    """

    reads_images = False

    def __init__(self, lm: LanguageModel, *, vocab: int, max_parallel: int) -> None:
        """Builds the engine.

        Args:
            lm: The model.
            vocab: Only ids below this are tokens.
            max_parallel: Completions generated at once.
        """
        self.lm = lm
        self.vocab = vocab
        self.max_parallel = max_parallel
        self.version = 0

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """See `Engine`; it uses the live weights, and stores their version. Nothing is kept between two calls."""
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`.

        Raises:
            UserError: Also where a prompt is empty, or transformers cannot batch this model.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        if any(request.context.media for request in requests):
            raise UserError(
                "a prompt holds an image, a sound or a video, and rollout.engine=continuous reads text alone; use "
                "rollout.engine=own"
            )
        if not all(len(request.context) for request in requests):
            raise UserError("a prompt is empty, and pages keep nothing of nothing; use rollout.engine=own")
        if not requests:
            return []
        with _generating(self.lm):
            self.check()
            asked = [_Asked(own.context.ids, own.uniforms[: sampling.max_new_tokens].tolist()) for own in requests]
            self._run(asked, _Draw(self.vocab, sampling, asked))
        stops = self.lm.stops.ids
        return [
            Completion(
                own.ids,
                torch.tensor(own.logps, dtype=torch.float32),
                Status.COMPLETED if own.ids[-1] in stops else Status.TRUNCATED,
                self.version,
            )
            for own in asked
        ]

    def check(self) -> None:
        """Tries, once for a model, whether transformers' batching computes what the model computes.

        Raises:
            UserError: It does not, or not at all.
        """
        key = f"continuous {self.lm.arithmetic}"
        if self.lm.trials.get(key):
            return
        with _generating(self.lm):
            problem = self._problem()
        if problem is not None:
            raise UserError(
                f"rollout.engine=continuous: transformers' continuous batching is not for {self.lm.name}: {problem}; "
                "use rollout.engine=own"
            )
        self.lm.trials[key] = True

    def _problem(self) -> str | None:
        """What is wrong with batching this model, in words; three completions that end one by one are the trial."""
        lm = self.lm
        if lm.together_up_to is not None:
            return "its longer sequences may not be computed with others"
        vocab, stop = lm.head().width, lm.stops.primary
        other = next(token for token in range(vocab) if token not in lm.stops.ids)
        prompts = [[(7 * index + length) % vocab for index in range(length)] for length in (2, _PAGE + 5, _PAGE + 5)]
        written = [[stop], [other, stop], [other, other, other, stop]]
        asked = [_Asked(ids, [0.5] * len(own), forced=own) for ids, own in zip(prompts, written, strict=True)]
        log = logging.getLogger(_LOG)
        try:
            log.disabled = True
            self._run(asked, _Draw(vocab, Sampling(4), asked))
        except Exception as error:  # a family may fail in any way on pages that it does not expect
            return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        finally:
            log.disabled = False
        for ids, own, found in zip(prompts, written, asked, strict=True):
            logits_AV = lm.head().logits(lm.hidden([TokenSequence.of(ids).then(own, decided=True)]))
            again_A = logits_AV.float().log_softmax(-1).cpu().gather(1, torch.tensor(own)[:, None]).squeeze(1)
            bound = (
                1e-2 if lm.precision == "fp32" else 0.5
            )  # rounding of logits is an eighth in bf16 where they reach 16
            if not bool(((torch.tensor(found.logps) - again_A).abs() < bound).all()):
                return "it gives other probabilities there than alone"
        return None

    def _run(self, asked: Sequence[_Asked], draw: _Draw) -> None:
        """Has all of them written."""
        stops = sorted(self.lm.stops.ids)
        settings = GenerationConfig(do_sample=False, eos_token_id=stops)
        # The documented entry point, on a view of the model: `lm.model` itself is left as it is.
        manager: Any = ContinuousMixin.init_continuous_batching(
            _View(self.lm),  # pyright: ignore[reportArgumentType]
            generation_config=settings,
            continuous_batching_config=self._pages(asked),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([draw]))
        manager.logit_processor.tensors_required = 1  # it counts only those that it converted
        manager.start()
        left, failed = len(asked), "it ended before all was written"
        try:
            for number, own in enumerate(asked):
                manager.add_request(
                    own.prompt, request_id=str(number), max_new_tokens=len(own.uniforms), eos_token_id=stops
                )
            while left:
                found = manager.get_result(timeout=1)
                if found is None and not manager.is_running():
                    break
                if found is not None and found.error is not None:
                    failed = found.error
                    break
                left -= found is not None and found.is_finished()
        finally:
            manager.stop(hard_stop=left > 0)
            manager.destroy()
        if left:
            raise RuntimeError(failed)

    def _pages(self, asked: Sequence[_Asked]) -> Any:
        """How much is kept and computed at once: room for all that may be written at once, as far as memory goes."""
        lm, most = self.lm, min(self.max_parallel, len(asked))
        passed = max(_PASS, most)
        needs = sorted((len(own.prompt) + len(own.uniforms) for own in asked), reverse=True)
        pages = sum(-(-need // _PAGE) + 1 for need in needs[:most])
        config = lm.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 if lm.precision == "bf16" else 4
        masked = 0 if "flash" in _attention(lm) else passed  # else each pass has a mask over all that is kept
        token = size * (2 * config.num_hidden_layers * heads * width + masked)
        there = _BYTES if lm.device.type == "cpu" else torch.cuda.mem_get_info(lm.device)[0] // 2
        # Where not all fits, transformers lets some wait; the longest must fit.
        fits = max(there // (token * _PAGE), -(-needs[0] // _PAGE) + 2)
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=min(pages, fits),
            max_batch_tokens=passed,
            max_requests_per_batch=most,
            max_blocks_per_request=0,
            use_async_batching=False,  # a token is drawn from the state of its request, which must be up to date
            use_cuda_graph=False,
            auto_switch_to_flash=False,  # the trainer's attention: else both would round apart
        )


@dataclass(eq=False)
class _Asked:
    """A request while it is written: its prompt, uniforms, and what is drawn.

    Attributes:
        prompt: Ids.
        uniforms: One per token that may be written.
        forced: Ids that are written instead of drawn ones.
        ids, logps: What is written, and the log-prob of each, nats.
    """

    prompt: list[int]
    uniforms: list[float]
    forced: list[int] | None = None
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class _Draw(ContinuousBatchingLogitsProcessor):
    """Draws the next token of every request by its own uniform, and leaves the sampler no other."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 (transformers' own way to declare it)
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, vocab: int, sampling: Sampling, asked: Sequence[_Asked]) -> None:
        self.vocab = vocab
        self.sampling = sampling
        self.asked = asked
        self.rows: list[_Asked] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Stores whose tokens come next, in the order of their logits; transformers gets no numbers from here."""
        self.rows = [self.asked[int(own.state.request_id)] for own in requests_with_new_token]
        return torch.zeros(len(self.rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = self.rows
        logits_BV = scores[: len(rows), : self.vocab]
        if rows and rows[0].forced is not None:
            token_B = torch.tensor([own.forced[len(own.ids)] for own in rows if own.forced], device=scores.device)
            logp_B = logits_BV.float().log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)
        else:
            uniforms_B = torch.tensor([own.uniforms[len(own.ids)] for own in rows], dtype=torch.float64)
            drawn = sample(logits_BV, uniforms_B.to(scores.device), self.sampling.temperature, self.sampling.top_p)
            token_B, logp_B = drawn
        for own, token, logp in zip(rows, token_B.tolist(), logp_B.tolist(), strict=True):
            own.ids.append(token)
            own.logps.append(logp)
        scores.fill_(float("-inf"))[: len(rows)].scatter_(1, token_B[:, None], 0.0)
        return scores


class _View:
    """A model as continuous batching is to see it: an attention that it knows, and the precision of its products.

    Our attention (`retort.models.packing`) hands everything but packed rows on to that of transformers, which reads
    pages. Products in bf16 are wanted in transformers' thread, too, and keys may be in fp32 before they are kept.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.dtype = torch.bfloat16 if lm.precision == "bf16" else lm.model.dtype
        self.config = deepcopy(lm.model.config)
        self.config._attn_implementation = _attention(lm)
        self.narrow = lm.precision == "bf16"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm.model, name)

    def eval(self) -> _View:
        return self

    def set_attn_implementation(self, name: str) -> None:
        raise ValueError(f"attention = {_attention(self.lm)} reads no pages, use attention=sdpa")

    def __call__(self, *, cache: Any, **inputs: Any) -> Any:
        with torch.autocast(self.lm.device.type, torch.bfloat16, enabled=self.narrow):
            return self.lm.model(cache=_Cast(cache) if self.narrow else cache, **inputs)


class _Cast(PagedAttentionCache):
    """Pages that take keys and values of any precision."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> Any:
        dtype = self.inner.dtype
        return self.inner.update(key_states.to(dtype), value_states.to(dtype), *args, **more)


def _attention(lm: LanguageModel) -> str:
    """The name that transformers has for the model's attention."""
    found = str(lm.model.config._attn_implementation)
    return next((name for name in WRAPPED if wrapped(name) == found), found)


@contextmanager
def _generating(lm: LanguageModel) -> Iterator[None]:
    """Within, the weights are here and in their precision, and the model is not in its mode for training."""
    training = lm.model.training
    lm.model.eval()
    try:
        with torch.no_grad(), lm.offload.kept(), lm.compute():
            yield
    finally:
        lm.model.train(training)
