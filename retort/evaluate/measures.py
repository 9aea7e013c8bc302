"""Labels and units of the measures in a before/after table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

__all__ = ["MEASURES", "Measure", "bounds", "measure", "ordered"]


class Measure(NamedTuple):
    """The label, unit and kind of a measure.

    Attributes:
        words: Its name.
        unit: What its numbers are counted in; empty for a share and for a verifier's own measures.
        kind: `share` for a fraction that is shown in per cent.
    """

    words: str
    unit: str = ""
    kind: Literal["number", "share"] = "number"


#: By their names in `eval.json`, in the order in which they are shown.
MEASURES: Mapping[str, Measure] = {
    "success": Measure("episodes that succeed", "", "share"),
    "turns": Measure("turns", "an episode"),
    "tool_errors": Measure("invalid calls", "an episode"),
    "splits": Measure("conversations rendered anew", "an episode"),
    "right_original": Measure("right answers where there is an image", "", "share"),
    "right_pixelated": Measure("right answers with the image pixelated", "", "share"),
    "changed_pixelated": Measure("answers that change when the image is pixelated", "", "share"),
    "length": Measure("length", "tokens"),
    "truncated": Measure("completions cut at the limit", "", "share"),
    "student_entropy": Measure("own entropy", "nats"),
    "student_uncertain": Measure("tokens where it is itself uncertain", "", "share"),
    "uncertain": Measure("tokens where the teacher is uncertain", "", "share"),
    "student_entropy_uncertain": Measure("own entropy where the teacher is uncertain", "nats"),
    "teacher_entropy_uncertain": Measure("teacher's entropy where it is uncertain", "nats"),
    "forward_kl_uncertain": Measure("forward KL where the teacher is uncertain", "nats"),
    "reverse_kl": Measure("reverse KL, all tokens", "nats"),
    "reverse_kl_per_byte": Measure("reverse KL, from the tokens drawn", "nats per byte"),
    "bytes_in_units": Measure("bytes that the teacher scores", "", "share"),
}
#: Estimates that may fall below what they estimate, and so below 0.
_SIGNED = ("reverse_kl_per_byte",)
_PART = "reward/"


#: The same of samples of flow models, where it differs.
_OF_SAMPLES: Mapping[str, Measure] = {"reverse_kl": Measure("reverse KL, all denoising steps", "nats")}


def measure(name: str, each: str = "completion") -> Measure:
    """The label of any measure; `avg@k`, `pass@k` and a verifier's own measures keep their names.

    Args:
        name: Its name in `eval.json`.
        each: What there are k of for each prompt: `completion`, or `sample`.
    """
    if each == "sample" and name in _OF_SAMPLES:
        return _OF_SAMPLES[name]
    if name.startswith(("avg@", "pass@")):
        return Measure(name, "", "share")
    return MEASURES.get(name, Measure(name.removeprefix(_PART)))


def bounds(name: str) -> tuple[float, float]:
    """The smallest and largest possible value of a measure; infinite where only its verifier knows them."""
    if name.startswith("pass@") or (name in MEASURES and MEASURES[name].kind == "share"):
        return 0.0, 1.0
    return (0.0 if name in MEASURES and name not in _SIGNED else -math.inf), math.inf


def ordered(names: Sequence[str]) -> list[str]:
    """Sorts measures: accuracies, the verifier's own, the order of `MEASURES`, then the rest."""
    order = {name: index for index, name in enumerate(MEASURES)}

    def rank(name: str) -> int:
        return -2 if "@" in name else -1 if name.startswith(_PART) else order.get(name, len(order))

    return sorted(dict.fromkeys(names), key=rank)
