"""Chat templates of the families that people use, as data for tests.

Reconstructions: each writes, for conversations of text, what the template that the family publishes writes, and was
compared with that one when it was made; tools, images and checks of roles are left out. Special tokens are the
families' own, ordinary words are learnt on the spot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A family's template.

    Attributes:
        template: Jinja.
        special: Its control tokens.
        bos: The one that begins a text, if any.
        eos: The one that ends one.
        words: Tokens of its own that are ordinary text.
        system: Whether it takes a system message.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    words: tuple[str, ...] = ()
    system: bool = True


_CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_QWEN25 = (
    "{%- if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}" + _CHATML + "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
# An answer after the last question is put behind an empty thought, older ones lose theirs.
_QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, said = '', m.content %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
{%- else %}{{- said }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
_LLAMA_TURNS = """\
{%- macro turn(role, text) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text + '<|eot_id|>' }}\
{%- endmacro %}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- bos_token }}
{{- turn('system', 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + own) }}
{%- for m in rest %}{{- turn(m.role, m.content | trim) }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
_LLAMA31 = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n" + _LLAMA_TURNS
_LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}\n" + _LLAMA_TURNS
)
_GEMMA_TURNS = (
    "{%- for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' "
    "+ (before if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
)
_GEMMA2 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{%- endif %}{%- set rest, before = messages, '' %}" + _GEMMA_TURNS
)
_GEMMA3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' %}"
    "{%- set rest, before = messages[1:], messages[0].content + '\\n\\n' %}"
    "{%- else %}{%- set rest, before = messages, '' %}{%- endif %}" + _GEMMA_TURNS
)
# The system's message stands before the last question, and nothing begins an answer.
_NEMO = """\
{{- bos_token }}
{%- set own = messages[0].content if messages[0].role == 'system' else none %}
{%- for m in (messages[1:] if own is not none else messages) %}
{%- if m.role == 'assistant' %}{{- m.content + eos_token }}
{%- elif loop.last and own is not none %}{{- '[INST]' + own + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}
{%- endfor %}
"""
# A blank stands before answers: no header, and none at a prompt's end.
_MISTRAL3 = _NEMO.replace("'[INST]'", "'[INST] '").replace(
    "m.content + eos_token", "' ' + m.content | trim + eos_token"
)
# Its own words for the system are longer.
_MISTRAL_SMALL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set own, rest = messages[0].content, messages[1:] %}
{%- else %}{%- set own, rest = 'You are Mistral Small 3. The current date is ' + today + '.', messages %}{%- endif %}
{{- '[SYSTEM_PROMPT]' + own + '[/SYSTEM_PROMPT]' }}
{%- for m in rest %}
{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}{%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}
"""
_DEEPSEEK = (
    "{{ bos_token }}{%- for m in messages if m.role == 'system' %}{{ m.content }}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] "
    "+ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{%- endif %}"
)

_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_THINK = ("<think>", "</think>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]", "</s>")
_SENTENCE = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_LLAMA: dict[str, Any] = {"special": _HEADERS, "eos": "<|eot_id|>", "bos": "<|begin_of_text|>"}
_GEMMA: dict[str, Any] = {"special": ("<start_of_turn>", "<end_of_turn>"), "eos": "<eos>", "bos": "<bos>"}

FAMILIES = {
    "qwen2.5": Family(_QWEN25, _IM, "<|im_end|>"),
    "qwen3": Family(_QWEN3, _IM, "<|im_end|>", words=_THINK),
    "llama3.1": Family(_LLAMA31, **_LLAMA),
    "llama3.2": Family(_LLAMA32, **_LLAMA),
    "gemma2": Family(_GEMMA2, **_GEMMA, system=False),
    "gemma3": Family(_GEMMA3, **_GEMMA),
    "mistral-nemo": Family(_NEMO, _INST, "</s>", "<s>"),
    "mistral-v3": Family(_MISTRAL3, _INST, "</s>", "<s>"),
    "mistral-small": Family(_MISTRAL_SMALL, (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>"),
    "deepseek-r1": Family(_DEEPSEEK, ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"), _END, _SENTENCE, words=_THINK),
}


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with a family's control tokens, its beginning of text and its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    special = list(dict.fromkeys([*([family.bos] if family.bos else []), family.eos, *family.special]))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user assistant system model", "What is 2 + 2? Today Date:"] * 3, trainer)
    inner.add_tokens([AddedToken(word, special=False, normalized=False) for word in family.words])
    if family.bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, inner.token_to_id(family.bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=family.bos, eos_token=family.eos, clean_up_tokenization_spaces=False
    )
    made.chat_template = family.template
    return made
