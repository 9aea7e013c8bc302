"""A language model on another machine: hidden states come over the wire, and the head once. Axes: `retort.core`.

To everything here it is a `LanguageModel` that does not learn: its tokenizer is here, batches are made here as they
would be made for a model in this process, and the server computes them as `LanguageModel.hidden` would. In fp32, on
the same machine, the numbers are the same to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from retort.align.images import ImageTokens
from retort.align.stops import StopTokens
from retort.core.head import Head
from retort.core.random_streams import uniforms
from retort.core.sequences import Media, TokenSequence
from retort.errors import SignalError, UserError
from retort.models.images import ImageProcessing, made_up
from retort.models.lm import LanguageModel
from retort.models.server import Server, about_of
from retort.ranks import World
from retort.wire.batches import neighbours
from retort.wire.client import RefusedError
from retort.wire.media import images_in
from retort.wire.protocol import GENERATE, HEAD, HIDDEN, LACKING, SCORE, About, packed

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: What an answer takes besides its numbers, bytes.
_ENVELOPE = 2**16
#: Sequences of the probe, and tokens of each.
_PROBES, _PROBE_TOKENS = 4, 16
#: Attempts at a request whose images the server did not keep.
_ATTEMPTS = 3


class _Shell(torch.nn.Module):
    """Stands where the layers of a model in this process do: it holds the configuration, and no layer."""

    generation_config: Any = None

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.device, self.dtype = config, device, dtype

    @property
    def base_model(self) -> _Shell:
        return self


@dataclass(eq=False)
class ServedModel(LanguageModel):
    """A frozen model that a server holds.

    Attributes:
        server: The server.
        scores: What it said of a probe at the start, log-probs in nats; see `verify`.
    """

    here: ClassVar[bool] = False
    server: Server = field(kw_only=True)
    scores: list[float] = field(kw_only=True)

    @staticmethod
    def of(
        server: Server, tokenizer: Any, config: Any, device: torch.device, image_tokens: ImageTokens | None
    ) -> ServedModel:
        """Makes a served model a language model of this process.

        Args:
            server: The server.
            tokenizer: Its tokenizer.
            config: Its configuration of transformers.
            device: The device on which its numbers are wanted.
            image_tokens: How images are written into its prompts; None for a model of text alone.

        Raises:
            UserError: The server cannot be asked, or contradicts itself.
            SignalError: Its answer to a probe is of no use.
        """
        about = server.about
        shell = cast("Any", _Shell(config, device, _DTYPES[about.precision]))
        made = ServedModel(
            shell,
            tokenizer,
            StopTokens(frozenset({*about.stops, about.stop}), about.stop),
            server.name,
            about.precision,
            cast("Any", None),
            packs=about.packs,
            shared_prefixes=about.shared_prefixes,
            together_up_to=about.together_up_to,
            rereads_from=about.rereads_from,
            rounded=about.rounded,
            server=server,
            scores=[],
            image_tokens=image_tokens,
        )
        made.scores = made.probe()
        if server.narrow and about.precision != "bf16":
            made.notes.append(
                f"hidden states of {server.name} travel in bf16 (server.payload): a token's log-prob is "
                f"{made.noise():.1e} nats from the exact one on average, on a probe"
            )
        return made

    @property
    def about(self) -> About:
        """The model as the server described it at the start."""
        return self.server.about

    @property
    def parameters(self) -> int:
        return self.about.parameters

    def trainable(self) -> dict[str, Parameter]:
        return {}

    def weights(self) -> dict[str, Parameter]:
        """None of them is here."""
        return {}

    @property
    def rows(self) -> int:
        return self.about.rows

    def digest(self) -> str:
        return self.about.digest

    def whole_digest(self) -> str:
        return self.about.weights

    @property
    def arithmetic(self) -> str:
        # The weights are what the server says that they are: its numbers never stand for those of a model that was read
        # here, nor those that were rounded on their way for others.
        travels = "bf16" if self.server.narrow else "own"
        return f"served {self.about.precision} {self.about.attention}, sent in {travels}"

    def head(self) -> Head:
        return self._head

    def kept_head(self) -> Head:
        return self._head

    @cached_property
    def _head(self) -> Head:
        about, dtype = self.about, self.model.dtype
        limit = about.vocab * (about.width + 1) * dtype.itemsize + _ENVELOPE
        found = self.server.client.get_tensors(HEAD, most_bytes=limit)
        weight_VD, bias_V = found.get("weight_VD"), found.get("bias_V")
        wanted = [(weight_VD, (about.vocab, about.width)), *([(bias_V, (about.vocab,))] if bias_V is not None else [])]
        for own, shape in wanted:
            if own is None or tuple(own.shape) != shape or not own.is_floating_point() or not own.isfinite().all():
                raise SignalError(f"{self.name}: the head that it sends is not finite, or not {list(shape)}")
        assert weight_VD is not None
        bias_V = None if bias_V is None else bias_V.to(self.device)
        # A parameter of the model here, as in every other one, so that it is counted where memory is.
        self.model.head = Parameter(weight_VD.to(self.device), requires_grad=False)
        return Head(self.model.head, bias_V, about.scale, about.soft_cap)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank asks by itself; there is nothing to gather."""
        yield

    def spread_layers(self, world: World) -> None:
        """Does nothing: its layers are on the server."""

    def hidden(self, sequences: Sequence[TokenSequence]) -> Tensor:
        self.check_readable(sequences)
        steps, width = sum(own.steps for own in sequences), self.about.width
        dtype = torch.bfloat16 if self.server.narrow else self.model.dtype
        limit = steps * width * dtype.itemsize + _ENVELOPE
        found = self._ask(HIDDEN, sequences, {"narrow": self.server.narrow}, limit).get("hidden_ND")
        if found is None or tuple(found.shape) != (steps, width) or found.dtype != dtype:
            shape = None if found is None else [*found.shape]
            raise SignalError(f"{self.name}: was asked for {steps} hidden states of {width}, and sent {shape}")
        if not bool(found.isfinite().all()):
            raise SignalError(f"{self.name}: a hidden state that it sends is NaN or infinite")
        return found.to(self.device, self.model.dtype)

    def all_hidden(self, sequences: Sequence[TokenSequence], budget: int) -> Tensor:
        """See `LanguageModel`; each batch is a request."""
        batches = self.batches(sequences, min(budget, self.about.most_tokens)) if sequences else []
        found = self.server.client.each(lambda batch: self.hidden([sequences[i] for i in batch]), batches)
        parts: dict[int, Tensor] = {}
        for batch, hidden_ND in zip(batches, found, strict=True):
            parts.update(zip(batch, hidden_ND.split([sequences[i].steps for i in batch]), strict=True))
        none = torch.zeros(0, self.about.width, dtype=self.model.dtype, device=self.device)
        return torch.cat([parts[index] for index in range(len(sequences))]) if parts else none

    def score(
        self,
        sequences: Sequence[TokenSequence],
        budget: int,
        settings: Mapping[str, Any],
        ids_NK: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Numbers about the decided tokens, reduced by the server; see `retort.teachers.local.numbers`.

        Args:
            sequences: The sequences.
            budget: Most tokens of a forward pass.
            settings: `vocab`, `temperature`, `entropy` (whether it is wanted) and `top_k`.
            ids_NK: Ids at which log-probs are wanted as `at`.

        Raises:
            SignalError: The answer is about other tokens, or lacks something.
        """
        self.check_readable(sequences)
        groups = neighbours([len(own) for own in sequences], self.about.most_tokens)
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + sum(own.steps for own in sequences[group]))

        def part(number: int) -> dict[str, Tensor]:
            own, steps = sequences[groups[number]], slice(starts[number], starts[number + 1])
            given = {} if ids_NK is None else {"ids_NK": ids_NK[steps].cpu()}
            return self._part(own, given, {**settings, "budget": budget})

        parts = self.server.client.each(part, range(len(groups)))
        return {name: torch.cat([own[name] for own in parts]).to(self.device) for name in parts[0]}

    def _part(
        self, sequences: Sequence[TokenSequence], more: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The answer to one request for numbers, once it is known to be about what was asked."""
        tokens_N = torch.cat([own.actions_A for own in sequences])
        steps, top_k = len(tokens_N), int(settings["top_k"])
        kept = min(top_k, int(settings["vocab"]))
        given = more["ids_NK"].shape[1] if "ids_NK" in more else 0
        shapes: dict[str, tuple[int, ...]] = {"tokens_N": (steps,), "sampled": (steps,)}
        shapes |= {"entropy": (steps,)} if settings["entropy"] else {}
        shapes |= {"ids": (steps, kept), "logp": (steps, kept)} if top_k else {}
        shapes |= {"at": (steps, given)} if given else {}
        found = self._ask(SCORE, sequences, settings, 16 * steps * (4 + kept + given) + _ENVELOPE, more)
        for name, shape in shapes.items():
            own = found.get(name)
            if own is None or tuple(own.shape) != shape:
                there = None if own is None else [*own.shape]
                raise SignalError(f"{self.name}: was asked for {name} {list(shape)}, and sent {there}")
        if not torch.equal(found["tokens_N"], tokens_N):
            raise SignalError(f"{self.name}: its answer is about other tokens than it was asked about")
        ids = found.get("ids")
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < int(settings["vocab"]):
            raise SignalError(f"{self.name}: it sends ids that are none")
        return {name: found[name] for name in shapes if name != "tokens_N"}

    def completions(
        self, sequences: Sequence[TokenSequence], uniforms: Sequence[Tensor], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Completions that the server generates: `ids_T` end to end, `logp_T`, and `lengths_S`.

        Args:
            sequences: Contexts.
            uniforms: Random numbers of each.
            settings: Of the sampling.
        """
        more = {"uniforms_U": torch.cat(list(uniforms)), "rooms_S": torch.tensor([len(own) for own in uniforms])}
        contexts = [own.read() for own in sequences]
        return self._ask(GENERATE, contexts, settings, 16 * sum(map(len, uniforms)) + _ENVELOPE, more)

    def probe(self) -> list[float]:
        """Log-probs that the server gives to the tokens of a few fixed sequences, nats."""
        asked, vocab = self._probes()
        settings = {"vocab": vocab, "temperature": 1.0, "entropy": False, "top_k": 0}
        found = self.score(asked, _PROBES * _PROBE_TOKENS, settings)["sampled"]
        if not bool(found.isfinite().all()) or bool((found > 1e-3).any()):
            raise SignalError(f"{self.name}: it gives log-probs that are none (NaN, infinite or above 0)")
        return [float(own) for own in found]

    def noise(self) -> float:
        """Mean distance of a log-prob of the probe by hidden states as they travel from the server's own, nats."""
        asked, vocab = self._probes()
        hidden_ND = self.all_hidden(asked, _PROBES * _PROBE_TOKENS)
        with torch.no_grad(), self.compute():
            logp_NV = self.head().logits(hidden_ND, vocab).float().log_softmax(-1)
        tokens_N1 = torch.cat([own.actions_A for own in asked])[:, None].to(self.device)
        exact_N = torch.tensor(self.scores, device=self.device)
        return float((logp_NV.gather(1, tokens_N1).squeeze(1) - exact_N).abs().mean())

    def _probes(self) -> tuple[list[TokenSequence], int]:
        """The sequences of the probe, and the number of ids that they are of."""
        vocab = min(self.about.vocab, self.about.rows)
        ids = [
            (uniforms(0, "probe", "server", number, count=_PROBE_TOKENS) * vocab).long().tolist()
            for number in range(_PROBES)
        ]
        contexts = [TokenSequence.of(own[:1]) for own in ids]
        if isinstance(self.image_tokens, ImageProcessing):  # the last one's; else another processor would not show
            image = made_up()
            own = self.image_tokens.ids(image)
            if len(own) + _PROBE_TOKENS <= self.context:
                contexts[-1] = contexts[-1].then(own, media=(Media(image.digest, 0, len(own), image),))
        return [own.then(more[1:], decided=True) for own, more in zip(contexts, ids, strict=True)], vocab

    def listen(self, say: Callable[[str], object]) -> None:
        """See `retort.teachers.base.Remote`."""
        self.server.client.say = say

    def verify(self, tolerance: float, before: Sequence[float] | None = None) -> None:
        """Checks that the server still has the model that it had.

        Args:
            tolerance: Nats by which log-probs of the probe may differ on average.
            before: What it said of the probe earlier; None: at the start.

        Raises:
            UserError: It has another one.
            UnreachableError: It does not answer.
        """
        now, then = about_of(self.server.client), list(before or self.scores)
        apart = [abs(a - b) for a, b in zip(self.probe(), then, strict=True)]
        if now.digest != self.about.digest or sum(apart) > tolerance * len(apart):
            raise UserError(
                f"{self.name}: it has another model than before (its log-probs of a probe are "
                f"{sum(apart) / len(apart):.2g} nats apart on average, and server.tolerance is {tolerance:g}); start "
                "it with the model that it had"
            )

    def _ask(
        self,
        path: str,
        sequences: Sequence[TokenSequence],
        settings: Mapping[str, Any],
        limit: int,
        more: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Asks the server about the weights that it had at the start: it refuses where it has others.

        Images that it does not hold are sent before; one that was started anew, or made room for others, lacks some.
        """
        asked, sent = {**settings, "weights": self.about.digest}, packed(sequences) | dict(more or {})
        images = images_in(sequences)
        for _ in range(_ATTEMPTS):
            self.server.images.send(images)
            try:
                return self.server.client.post_tensors(path, sent, asked, most_bytes=limit)
            except RefusedError as error:
                if error.status != LACKING:
                    raise
            self.server.images.forget(images)
        raise UserError(
            f"{self.name}: it does not keep the {len(images)} images of one batch until they are read; make them "
            "smaller, set optimizer.batch_tokens lower, or let fewer runs ask it at once"
        )
