"""Real tokenizers: every pair of them, on text of many kinds.

`RETORT_REAL` names the folder that keeps them (`python tests/real/fetch.py FOLDER` fills it); without it they are
fetched anew.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fetch import NAMES, Unavailable, folder, loaded

from retort.align.pieces import inner_pieces, pieces
from retort.align.reread import TeacherText
from retort.align.retokenize import retokenize
from retort.align.shared import shared
from retort.align.spans import units
from retort.align.stops import StopTokens
from retort.align.text import control_tokens
from retort.core.sequences import TokenSequence

pytestmark = pytest.mark.real

TEXTS = {
    "english": "The quick brown fox doesn't jump; it's 3:45 p.m. on Tuesday, isn't it?",
    "numbers": "1234567890 3.14159 -42 1,000,000 2+2=4 0x1F 1e-6",
    "chinese": "你好,世界!今天天气很好。我们去公园吧,𠮷野家也去。",
    "emoji": "🙂👩\u200d🔬 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪",
    "marks": "e\u0301 é a\u0308\u0323 Å \u00c5 q\u0307\u0323 x",
    "ligatures": "ﬁ ½ ﷺ ① Ⅷ",
    "code": "def f(x):\n\treturn {k: v**2 for k in x}   # squared\n\n\n\t\tif a   !=  b:\r\n    pass\r\n",
    "blanks": "  leading, and trailing   ",
    "only blanks": "\n\n \t ",
    "odd blanks": "a\u00a0b\u3000c\u200bd\ufeffe\u2028f",
    "hindi": "नमस्ते दुनिया, यह एक परीक्षण है।",
    "arabic": "مرحبا بالعالم، السَّلامُ عليكم.",
    "other scripts": "한국어 กรุงเทพมหานคร ქართული עברית",
    "byte names": "<0x41> <0xE4><0xBD><0xA0> \\x41",
    "control tokens": "<bos> <|im_end|> </s> <|endoftext|> <think> <end_of_turn> <|eot_id|> <unk> <pad>",
    "marks of tokenizers": "a▁b ▁ Ġ Ċ ##s ÿþ",
    "control characters": "\x00\x01\x7f",
    "unknown": "\ufffd\ufffd",
    "latex": r"$$\frac{1}{2}\boxed{\sqrt{x^2+1}}$$ a_1 \leq b",
}
PAIRS = [(one, other) for one in NAMES for other in NAMES]
#: Texts that they rewrite: Qwen composes characters (NFC), Gemma reads its mark for a blank as a blank.
REWRITTEN = {"qwen3": {"marks"}, "gemma3": {"marks of tokenizers"}, "gemma3-270m": {"marks of tokenizers"}}


@lru_cache
def tokenizer_of(name: str) -> Any:
    try:
        return loaded(name, folder())
    except Unavailable as error:
        return str(error)


def real(name: str) -> Any:
    found = tokenizer_of(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def stops(tokenizer: Any) -> StopTokens:
    return StopTokens(frozenset({tokenizer.eos_token_id}), tokenizer.eos_token_id)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_tiled_and_decodes_to_itself(name: str) -> None:
    tokenizer = real(name)
    for kind, text in TEXTS.items():
        found = retokenize(tokenizer, text)
        assert b"".join(found.pieces) == text.encode(), kind
        assert any(found.rewritten) == (kind in REWRITTEN.get(name, ())), kind
        spelt = b"".join(pieces(tokenizer, found.ids, before=[*found.ids[:3]]))
        assert (spelt == text.encode()) != any(found.rewritten), kind
        assert not any(found.unknown) and not set(control_tokens(tokenizer).values()) & set(found.ids)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_pair(one: str, other: str) -> None:
    student, teacher = real(one), real(other)
    text = TeacherText(student, teacher, stops(student), stops(teacher))
    for kind, said in TEXTS.items():
        ours = retokenize(student, said)
        asked = TokenSequence.of(student.encode("Q:", add_special_tokens=False)[-1:])
        sequence = asked.then([*ours.ids, student.eos_token_id], decided=True)
        found = text.read(sequence, [[5]])
        spelt = pieces(student, ours.ids, before=[5])
        theirs = retokenize(teacher, b"".join(spelt).decode())
        assert found.sequence.actions_A.tolist() == [*theirs.ids, teacher.eos_token_id], kind
        assert found.coverage.bytes == len(b"".join(spelt)) and not found.coverage.lost, kind
        assert (found.coverage.controls, found.coverage.controls_lost) == (1, 0)
        common = set(accumulate(map(len, spelt))) & set(accumulate(map(len, theirs.pieces)))
        ends = accumulate(len(b"".join(spelt[mine])) for mine, _ in units(spelt, theirs.pieces))
        assert set(ends) == common and int(found.unit_A.max()) == len(common) == int(found.unit_B.max()), kind
        if one == other and kind not in REWRITTEN.get(one, ()):
            assert bool(found.single_U.all()) and found.sequence.actions_A.tolist() == sequence.actions_A.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_cut_after_any_token(name: str) -> None:
    student, teacher = real(name), real("smollm2" if name != "smollm2" else "qwen3")
    text = TeacherText(student, teacher, stops(student), stops(teacher))
    ids = retokenize(student, TEXTS["emoji"] + TEXTS["hindi"] + "𠮷").ids
    for end in range(1, len(ids)):
        found = text.read(TokenSequence.of([5]).then(ids[:end], decided=True), [[5]])
        whole = b"".join(pieces(student, ids[:end], before=[5]))
        partial = len(whole) - len(whole.decode(errors="ignore").encode())
        assert found.coverage.lost.get("invalid", 0) >= partial and found.coverage.bytes == len(whole)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_shared_vocabularies_spell_the_same(one: str, other: str) -> None:
    student, teacher = real(one), real(other)
    found = shared(student, teacher, stops(student), stops(teacher))
    ours, theirs = (ids.tolist()[:-1] for ids in found)
    assert inner_pieces(student, ours) == inner_pieces(teacher, theirs)
    assert len(found) > 30_000 and found.ambiguous == 0
    assert len(set(ours)) == len(set(theirs)) == len(ours)
