"""Templates of the texts that a teacher is shown. A run replaces any of them by name (`[templates]`).

`frame` takes the prompt's own last turn as `{prompt}`, the sections one after another as `{sections}`, and `{closing}`.
A section takes the text that it shows as `{text}`; `example`, which shows another problem solved, also `{prompt}`, and
`speech`, of one expert in a discussion, who that was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from retort.errors import UserError, did_you_mean

#: Defaults, for models that read English. They are no paper's words, because published ones differ.
TEMPLATES: Mapping[str, str] = {
    "frame": "{prompt}\n\n{sections}\n\n{closing}",
    "solution": "A worked solution, for your eyes only:\n<solution>\n{text}\n</solution>",
    "answer": "The correct final answer is:\n<answer>\n{text}\n</answer>",
    "outcome": "How a correct solution ends:\n<outcome>\n{text}\n</outcome>",
    "hint": "A hint, which leaves the work to you:\n<hint>\n{text}\n</hint>",
    "demonstration": "An example of a good response:\n<example>\n{text}\n</example>",
    "wrong": "A response that is known to be wrong:\n<wrong>\n{text}\n</wrong>",
    "success": "An earlier attempt that was correct:\n<correct>\n{text}\n</correct>",
    "failure": "An earlier attempt that failed; do not repeat its mistakes:\n<failed>\n{text}\n</failed>",
    "feedback": "What was found wrong with your earlier attempt:\n<feedback>\n{text}\n</feedback>",
    "example": "Another problem, solved:\n<problem>\n{prompt}\n</problem>\n<response>\n{text}\n</response>",
    "expert": "You are expert {text} of several who discuss this question.",
    "discussion": "What the experts have said:\n<discussion>\n{text}\n</discussion>",
    "speech": "[{prompt}]\n{text}",
    "debate_first": "Give your own answer, worked out step by step. The discussion with the other experts follows.",
    "debate_again": "Weigh what was said and give your answer anew, worked out step by step. You need not agree.",
    "confidence": "End with a line <<CONFIDENCE=N>>, where N, a whole number from 0 to 100, says how sure you are.",
    "reason": "Explain in your own words how this leads to the answer, and why each step holds.",
    "rationale": "What you noted about this:\n<notes>\n{text}\n</notes>",
    "summarise": "Sum up the attempt in a single sentence: what it tried and how it ended. Write it as "
    "<summary>...</summary>.",
    "attempt": "An attempt at this question:\n<attempt>\n{text}\n</attempt>",
    "summary": "Another attempt, in a sentence:\n<summary>\n{text}\n</summary>",
    "closing": "Now answer the original question in your own words, working it out step by step.",
}

#: Placeholders that a template must hold.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "frame": ("prompt", "sections"),
    **dict.fromkeys(("closing", "expert", "debate_first", "debate_again", "confidence", "reason", "summarise"), ()),
}
_PLACEHOLDER = re.compile(r"\{(prompt|sections|closing|text)\}")


def templates(changed: Mapping[str, str]) -> dict[str, str]:
    """All templates, with some of them replaced.

    Raises:
        UserError: A name is unknown, or a text lacks a placeholder.
    """
    for name, text in changed.items():
        if name not in TEMPLATES:
            raise UserError(f"templates.{name}: there is no such template; {did_you_mean(name, TEMPLATES)}")
        for placeholder in _NEEDED.get(name, ("text",)):
            if text.count(f"{{{placeholder}}}") != 1:
                raise UserError(f"templates.{name} = {text!r}: it must hold {{{placeholder}}} once")
    return {**TEMPLATES, **changed}


def fill(template: str, **texts: str) -> str:
    """Fills in the placeholders of a template, all at once: a text that looks like a placeholder stays text."""
    return _PLACEHOLDER.sub(lambda match: texts.get(match[1], match[0]), template).strip()
