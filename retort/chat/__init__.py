"""Models that only talk: what is asked of them, what comes back, and what is made of an answer that is none."""

from retort.chat.base import Asker, ChatModel, ChatReply, ChatRequest, Failure, Heard, Question, Unusable

__all__ = ["Asker", "ChatModel", "ChatReply", "ChatRequest", "Failure", "Heard", "Question", "Unusable"]
