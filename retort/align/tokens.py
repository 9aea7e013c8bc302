"""The check that token ids mean the same to student and teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retort.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PROBES", "OtherTokenizer", "check_same_tokenizer", "encoded", "vocabulary_width"]

#: Two tokenizers with one vocabulary can still cut text differently (other merges, normaliser or splitting of digits).
PROBES = (
    "The quick brown fox doesn't jump; it's 3:45 p.m.",
    "1234567890 3.14159 -42 1,000,000 2+2=4",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # squared\n\n\t\tif a != b:",
    r"\frac{1}{2}\boxed{\sqrt{x^2+1}} $a_1 \leq b$",
    "Größe, naïve façade, Привет мир, 你好世界, こんにちは, مرحبا, नमस्ते, 한국어",
    "e\u0301 é \ufb01 ½ 👩‍🔬🙂   spaces  \r\n\u00a0end ",
)


class OtherTokenizer(UserError):
    """Two tokenizers are not the same: a method that compares ids has nothing to compare."""


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """Checks that an id is the same token for both, and that both cut text into the same ids.

    Padded vocabularies are fine (rows of a model beyond its tokenizer's ids are unused), and so are tokens that one
    side has beyond the other's last id, and ids that one side leaves unused.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.

    Returns:
        The number of ids that both share: ids 0 to that number minus 1 are comparable.

    Raises:
        OtherTokenizer: An id or a text means something else to the teacher.
        UserError: One of them has no tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    width = min(max(vocab.values(), default=-1) + 1 for vocab in (ours, theirs))
    if width == 0:
        raise UserError("the tokenizer of the student or of the teacher has no tokens at all")
    differing = _differing(ours, theirs, width)
    if differing:
        shown = "; ".join(f"id {i} is {s!r} for the student, {t!r} for the teacher" for i, s, t in differing[:3])
        raise OtherTokenizer(
            f"student and teacher have different tokenizers: {len(differing)} of {width} ids disagree ({shown}). "
            f"{_REMEDY}"
        )
    for probe in PROBES:
        ours_ids, theirs_ids = encoded(student, probe), encoded(teacher, probe)
        if ours_ids != theirs_ids:
            raise OtherTokenizer(
                f"student and teacher have one vocabulary but cut text differently: {probe[:20]!r}... is "
                f"{_shown(ours_ids)} for the student and {_shown(theirs_ids)} for the teacher. {_REMEDY}"
            )
    return width


def vocabulary_width(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's largest id plus 1 (not the number of tokens: there may be gaps)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


_REMEDY = "Use a teacher of the student's family, or a method for two tokenizers"


def _differing(ours: dict[str, int], theirs: dict[str, int], width: int) -> list[tuple[int, str | None, str | None]]:
    """Disagreeing ids below `width` in order: (id, student's token, teacher's token), None for a token elsewhere."""
    if ours == theirs:
        return []
    # The two vocabularies usually differ in few items, so everything after this line is short.
    our_only = {i: token for token, i in ours.items() - theirs.items() if i < width}
    their_only = {i: token for token, i in theirs.items() - ours.items() if i < width}
    differing: list[tuple[int, str | None, str | None]] = []
    for i in sorted(our_only.keys() | their_only.keys()):
        mine, other = our_only.get(i), their_only.get(i)
        # An id that one side leaves unused is fine, unless that side has the same token under another id.
        unused = (other is None and mine not in theirs) or (mine is None and other not in ours)
        if not unused:
            differing.append((i, mine, other))
    return differing


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of a text; None where the tokenizer cannot encode it."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False))
    except Exception:  # a small vocabulary without an unknown token; the other side must then fail, too
        return None


def _shown(ids: list[int] | None) -> str:
    return "not encodable" if ids is None else f"{len(ids)} tokens {str(ids[:4])[:-1]}, ...]"
