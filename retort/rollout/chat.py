"""A model that is asked in conversation, by an engine of this process (or one that serves the exact model)."""

from __future__ import annotations

from collections.abc import Sequence

from retort.align.chat import Renderer
from retort.align.text import completion_text
from retort.chat.base import ChatReply, ChatRequest, Failure, Heard
from retort.chat.record import digest_of
from retort.core.random_streams import uniforms
from retort.core.rollouts import Prompt, Status
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.rollout.engines.base import Engine, Request, Sampling

__all__ = ["LocalChat"]

#: Temperature that stands for 0: the divisor of logits at which the most likely id has all the mass in fp32.
_GREEDY = 1e-6


class LocalChat:
    """A `ChatModel` over an `Engine`, with the model's own chat template.

    An answer depends on the weights and its own request alone, and is the same again. A schema is not enforced: the
    conversation has to say what is wanted. A control token that a message spells is text, as in every prompt here.
    """

    def __init__(self, engine: Engine, render: Renderer, *, name: str, fingerprint: str, batch: int = 64) -> None:
        """Generates nothing yet.

        Args:
            engine: Generates.
            render: Maps a conversation to the model's ids.
            name: Of the model, for messages.
            fingerprint: Of its weights, see `retort.models.fingerprint`.
            batch: Requests that are handed to the engine together; answers are heard after each.
        """
        self.engine, self.render = engine, render
        self.name, self.fingerprint = name, fingerprint
        self._batch = batch

    def chat(self, requests: Sequence[ChatRequest], heard: Heard | None = None) -> list[ChatReply | Failure]:
        """See `ChatModel`."""
        found: dict[int, ChatReply | Failure] = {}

        def add(number: int, answer: ChatReply | Failure) -> None:
            found[number] = answer
            if heard is not None:
                heard(number, answer)

        by_temperature: dict[float, list[tuple[int, Request]]] = {}
        for number, request in enumerate(requests):
            own = self._request(request)
            if isinstance(own, Failure):
                add(number, own)
            else:
                by_temperature.setdefault(max(request.temperature, _GREEDY), []).append((number, own))
        for temperature, numbered in by_temperature.items():
            for start in range(0, len(numbered), self._batch):
                part = numbered[start : start + self._batch]
                sampling = Sampling(max(len(own.uniforms) for _, own in part), temperature)
                completions = self.engine.generate([own for _, own in part], sampling)
                for (number, own), completion in zip(part, completions, strict=True):
                    before = own.context.ids
                    text = completion_text(self.engine.tokenizer, completion.ids, prompt_ids=before)
                    ended = completion.status == Status.COMPLETED
                    add(number, ChatReply(text, len(before), len(completion.ids), ended=ended))
        return [found[number] for number in range(len(requests))]

    def length(self, request: ChatRequest) -> int:
        """Returns the tokens that a conversation takes of the model's context.

        Raises:
            UserError: The model's chat template refuses the conversation.
        """
        return len(self._read(request, digest_of(self.fingerprint, request)))

    def _read(self, request: ChatRequest, digest: str) -> TokenSequence:
        plain = len(request.messages) == 1  # which a model without a chat template reads as bare text
        prompt = Prompt(id=f"{request.purpose} {digest[:8]}", messages=request.messages, plain=plain)
        return self.render(prompt, split=True)

    def _request(self, request: ChatRequest) -> Request | Failure:
        """The request of the engine; a failure where the model cannot read the conversation."""
        digest = digest_of(self.fingerprint, request)
        try:
            context = self._read(request, digest)
        except UserError as error:  # its template refuses the conversation
            return Failure("form", str(error), asked=False)
        room = min(request.max_tokens, self.engine.context - len(context))
        if room < 1:
            problem = (
                f"the conversation has {len(context)} tokens, and the context of {self.name} {self.engine.context}"
            )
            return Failure("long", problem, asked=False)
        numbers = uniforms(request.seed, "chat", digest, count=room)
        return Request(context, numbers)
