"""The conversation of an episode as token sequences: one that grows, or several, each rendered anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retort.align.chat import TemplateOptions
from retort.align.history import Exchange, anew, recent, rewrites_earlier
from retort.align.images import ImageTokens
from retort.align.replies import RewritesEarlierError, reply_ids
from retort.core.rollouts import Message, Prompt
from retort.core.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Following:
    """What the next turn follows.

    Attributes:
        sequence: The sequence that it is added to.
        history: The messages behind the prompt, where that is a new sequence; None where it is the last one, grown.
    """

    sequence: TokenSequence
    history: tuple[Message, ...] | None = None


@dataclass(eq=False)
class Conversation:
    """A conversation so far.

    Attributes:
        prompt: The prompt that began it.
        sequences: Its sequences; the last one is written to.
        histories: See `Rollout`.
        exchanges: The turns that were replied to, and the replies.
        begun: Number of exchanges before the last sequence.
        image_tokens: How the model writes images; None for one of text alone.
    """

    prompt: Prompt
    sequences: list[TokenSequence]
    histories: list[tuple[Message, ...]] = field(default_factory=lambda: [])
    exchanges: list[Exchange] = field(default_factory=lambda: [])
    begun: int = 0
    image_tokens: ImageTokens | None = None

    @property
    def sequence(self) -> TokenSequence:
        """The sequence that is written to."""
        return self.sequences[-1]

    def decide(self, ids: Sequence[int]) -> None:
        """Adds a turn of the model's."""
        self.sequences[-1] = self.sequence.then(ids, decided=True)

    def replied(
        self,
        exchange: Exchange,
        stop: int,
        tokenizer: PreTrainedTokenizerBase,
        template_options: TemplateOptions,
        history: int | None,
    ) -> Following:
        """What the next turn follows, after a reply.

        Args:
            exchange: The last turn, and the reply.
            stop: Id of the token that ended the turn.
            tokenizer: The model's tokenizer.
            template_options: Options of chat templates.
            history: Number of exchanges to show, rendered anew; None: all of them, in a conversation that grows as long
                as the chat template does not write earlier turns anew, and replies hold no image.

        Raises:
            UserError: The chat template cannot write the reply, see `reply_ids` and `retort.align.history.anew`.
        """
        self.exchanges.append(exchange)
        if history is None:
            grown = self._grown(stop, tokenizer, template_options)
            if grown is not None:
                return Following(grown)
        shown = recent(self.exchanges, history, tokenizer)
        return Following(anew(self.prompt, shown, tokenizer, template_options, self.image_tokens), shown)

    def go_on(self, following: Following) -> None:
        """Makes this what the next turn is added to."""
        if following.history is None:
            self.sequences[-1] = following.sequence
            return
        self.sequences.append(following.sequence)
        self.histories.append(following.history)
        self.begun = len(self.exchanges)

    def _grown(
        self, stop: int, tokenizer: PreTrainedTokenizerBase, template_options: TemplateOptions
    ) -> TokenSequence | None:
        """The last sequence with the last reply; None where the chat template would write it otherwise."""
        if any(reply.images for reply in self.exchanges[-1].replies):
            return None  # the reply alone has no place for what stands for its images
        prompt = self.prompt.then(self.histories[-1]) if self.histories else self.prompt
        try:
            ids = reply_ids(prompt, self.exchanges[-1].replies, stop, tokenizer, template_options)
        except RewritesEarlierError:
            return None
        if rewrites_earlier(prompt, self.exchanges[self.begun :], tokenizer, template_options):
            return None
        return self.sequence.then(ids)
