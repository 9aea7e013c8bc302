"""Alignment of student and teacher: vocabularies, chat templates, stop tokens."""

from retort.align.chat import TemplateOptions, render
from retort.align.stops import StopMap, StopTokens, describe_stop_map, stop_map, stop_tokens
from retort.align.tokens import check_same_tokenizer

__all__ = [
    "StopMap",
    "StopTokens",
    "TemplateOptions",
    "check_same_tokenizer",
    "describe_stop_map",
    "render",
    "stop_map",
    "stop_tokens",
]
