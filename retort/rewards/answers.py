r"""Simple kinds of answers, read without math-verify: a number, a letter of a multiple choice, or a word.

A number is compared as an exact number, a letter as a letter, a word as a word. This module decides these cases, right
or wrong; math-verify gets only the others (expressions, intervals, sets, matrices).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

__all__ = [
    "Number",
    "choice",
    "comparable",
    "hopeless",
    "letter_of",
    "number",
    "same_number",
    "stated",
    "tidy",
    "without_letter",
    "word",
]

#: Most digits of a number, and of an exponent of ten; a longer text is not read as a number.
MOST_DIGITS = 400
#: Largest numeric exponent and factorial that are computed.
MOST_EXPONENT, MOST_FACTORIAL = 20_000, 5_000
MOST_DEPTH = 60
#: Least digits of a decimal that may round a fraction; and digits that a printed float has.
ROUNDED, FLOAT = 6, 15

_UNITS = {
    name: names.split()[0]
    for names in (
        "% percent percentage pct", "deg degree degrees", "$ dollar dollars usd", "cent cents ¢", "€ euro euros eur",
        "£ pound pounds gbp", "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres", "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres", "in inch inches", "ft foot feet", "yd yard yards",
        "mi mile miles", "mg milligram milligrams", "g gram grams", "kg kilogram kilograms", "lb lbs",
        "oz ounce ounces", "ml milliliter milliliters millilitre millilitres", "l liter liters litre litres",
        "s sec secs second seconds", "min mins minute minutes", "h hr hrs hour hours", "day days", "week weeks",
        "month months", "year years", "mph", "km/h kmh kph", "m/s", "unit units", "unit2", "unit3",
    )
    for name in names.split()
}  # fmt: skip
_TEXT = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|operatorname|bf|rm|boldsymbol)"
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_POWER = r"(?:[eE](?P<e>[+-]?[0-9]+)|\\times10\^(?:\{(?P<p>[+-]?[0-9]+)\}|(?P<q>[0-9]+)))"
_SIGNED = rf"[+-]?(?:{_PLAIN})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)?\\frac(?:\{{(?P<a>{_SIGNED})\}}|(?P<a1>[0-9]))"
    rf"(?:\{{(?P<b>{_SIGNED})\}}|(?P<b1>[0-9]))"
    rf"|(?:(?P<mixed>[0-9]+)_)?(?P<c>{_SIGNED})/(?P<d>{_SIGNED})"
    rf"|(?P<plain>{_PLAIN}){_POWER}?)"
)


@dataclass(frozen=True)
class Number:
    """An exact number as the text gives it.

    Attributes:
        value: The value, without regard to a percent sign.
        digits: Significant digits if it is given as a decimal, else 0.
        unit: Short name of the unit; "" if there is none.
    """

    value: Fraction
    digits: int = 0
    unit: str = ""

    def exact(self) -> str:
        """The number for math-verify, which reads "1e-05" as 1."""
        a, b = self.value.as_integer_ratio()
        return (str(a) if b == 1 else rf"\frac{{{a}}}{{{b}}}") + (r"\%" if self.unit == "%" else "")


def tidy(text: str) -> str:
    """An answer without decoration: dollars, spacing commands, sizes of brackets, emphasis, a full stop."""
    text = text.replace("\u2212", "-").replace("−", "-").replace("\u00a0", " ").replace("{,}", ",")
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)(?![a-z])", r"\\frac", text)
    # A thin blank joins digits only where it groups thousands; elsewhere it still separates them.
    text = re.sub(r"(?<=[0-9])(?:\\[,!]|~)(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9])(?:\\[,!;:]|\\q?quad(?![a-z])|(?<!\\)\$)(?=[0-9])", " ", text)
    text = re.sub(
        r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])|\\(?:displaystyle|,|!|;|:|quad|qquad)(?![a-z])", "", text
    )
    text = re.sub(r"\\ |~", " ", text).replace(r"\(", "").replace(r"\)", "")
    # Emphasis is at the edge of words; between a base and its exponent ** is a power.
    text = re.sub(r"(?<![0-9A-Za-z)}])\*\*|\*\*(?![0-9A-Za-z({\\-])", "", text)
    text = re.sub(r"\*\*\s*(-?[0-9.]+)", r"^{\1}", text).replace("**", "^")
    text = re.sub(r"(?<!\\)\$", "", text).strip()
    text = re.sub(
        r"^(?:so\s+)?(?:the\s+)?(?:final\s+)?(?:correct\s+)?answer(?:\s+is\s*:?|\s*:)\s*", "", text, flags=re.IGNORECASE
    )
    return text.removesuffix(".").strip()


def number(text: str) -> Number | None:
    """The number that a tidy text is, with its unit; None if it is anything else."""
    if len(text) > MOST_DIGITS:
        return None
    text, unit = _unit(text)
    text = re.sub(r"(?<=[0-9]) +(?=[+-]?[0-9]+/)", "_", text.strip())
    text = re.sub(r"\s*(?:\\cdot|×|\\times)\s*(?=10\s*\^)", r"\\times", text).replace("10 ^", "10^")
    if re.search(r"[0-9.] +[0-9.]", text):
        return None
    found = _NUMBER.fullmatch(re.sub(r"\s+", "", text))
    if found is None or unit is None:
        return None
    part = found.groupdict()
    digits = 0
    if part["plain"] is not None:
        value = _plain(part["plain"])
        power = (
            int(part["e"] or part["p"] or part["q"] or 0)
            if len(part["e"] or part["p"] or part["q"] or "") < 6
            else 10**6
        )
        if abs(power) > MOST_DIGITS:
            return None
        value *= Fraction(10) ** power
        written = part["plain"].replace(",", "")
        digits = len(written.replace(".", "").lstrip("0")) if "." in written or power < 0 else 0
    else:
        above, below = part["a"] or part["a1"] or part["c"], part["b"] or part["b1"] or part["d"]
        if not _plain(below):
            return None
        whole = part["whole"] or part["mixed"]
        if whole is not None and above.startswith(("+", "-")):
            return None
        value = int(whole or 0) + _plain(above) / _plain(below)
    return Number(-value if part["sign"] == "-" else value, digits, unit)


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal: units agree where both have one, and values agree, with percent either way."""
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if _close(gold, answer):
        return True
    if (gold.unit == "%") == (answer.unit == "%"):
        return False
    percent, other = (gold, answer) if gold.unit == "%" else (answer, gold)
    return not other.unit and _close(Number(percent.value / 100, percent.digits), other)


def choice(gold: str) -> str | None:
    r"""The letter, if the reference answer is one letter of a multiple choice: `B`, `(b)`, `B.`, `\text{(B)}`."""
    found = re.fullmatch(r"\(([A-Ja-j])\)|([A-J])\)?", _unwrapped(gold))
    return None if found is None else (found[1] or found[2]).upper()


def letter_of(text: str) -> str | None:
    """The letter that an answer names, with or without other text: `B: text`, `(B) 12`, `option b`."""
    text = re.sub(r"^(?:option|choice|answer)\s*:?\s*", "", _unwrapped(text), flags=re.IGNORECASE)
    found = re.match(r"\(([A-Ja-j])\)\s*|([A-Ja-j])(?:\s*$|[).:]\s*(?![A-Za-z]?\())|([A-J])\s*[-\u2013]\s+", text)
    if found is None:
        return None
    rest = text[found.end() :]
    if re.match(r"[.:]?\s*(?:,|&|;|/|\+|\^|_|=|or\b|and\b|\()", rest, re.IGNORECASE) or re.search(
        r"\([A-Ja-j]\)|\b(?:or|and)\s+[A-J]\b", rest
    ):
        return None
    return (found[1] or found[2] or found[3]).upper()


def stated(text: str) -> str | None:
    """The last answer that a text without a box states, as in "The answer is (B)."; None if it states none."""
    answer = list(re.finditer(r"\banswer\b\**\s*(?:is|:|=)\**\s*:?\s*([^\n]+)", text, re.IGNORECASE))
    found = answer[-1] if answer else None
    if found is None:
        lines = text.strip().splitlines()
        return lines[-1] if lines and len(lines[-1]) <= 60 else None
    # More text may change the statement; then no answer is read from it.
    return (
        re.sub(r"^(?:option|choice)\s+", "", found[1].strip(), flags=re.IGNORECASE)
        if not text[found.end() :].strip()
        else None
    )


def word(text: str) -> str | None:
    """A word or words, case-folded, if a text is words and no expression; None if not."""
    plain = _unwrapped(text)
    wrapped = plain != text.strip()
    if not re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*\.?", plain) or len(plain) < 3:
        return None
    if not wrapped and not re.search(r"[aeiou]", plain, re.IGNORECASE):
        return None
    return " ".join(plain.removesuffix(".").casefold().split())


def hopeless(text: str) -> bool:
    """Whether a text holds what cannot be computed: towers of powers, giant factorials, very deep nesting.

    It depends on the text alone, so the same text gets the same grade on every machine.
    """
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH or re.search(rf"[0-9]{{{MOST_DIGITS + 1},}}", text):
        return True
    if any(_at_least(found[1], MOST_FACTORIAL) for found in re.finditer(r"([0-9]+)[\s})]*!", text)):
        return True
    if re.search(r"!\s*[)}\s]*!\s*[)}\s]*!", text) or re.search(r"\^[^A-Za-z\\]*[)}]\s*!", text):
        return True
    return any(_large_exponent(text[found.end() :]) for found in re.finditer(r"\^|\*\*", text))


def without_letter(answer: str) -> str:
    r"""An answer without the letter of a multiple choice before it: `\textbf{(B)}\ 12` is 12."""
    return re.sub(
        r"^\s*\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\([A-J]\)\s*\}(?=.*\S)(?:\\[ ,;:]|\\q?quad|[~\s])*", "", answer
    )


def _brackets(text: str) -> str:
    """The outer brackets of a tuple or interval, the braces of a set as `{}`; empty for anything else."""
    text = re.sub(r"^[A-Za-z]\s*\\in(?![a-z])", "", tidy(text)).replace(" ", "")
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{}"
    inside = len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text
    if not inside or re.search(r"[)\]][,\\+*/-]", text[:-1]):
        return ""
    return text[0] + text[-1]


def comparable(gold: str, answer: str) -> bool:
    """Whether both are of one kind: to math-verify the interval (1, 2), the set {1, 2} and the list 1, 2 are equal."""
    ours, theirs = _brackets(gold), _brackets(answer)
    if "{}" in (ours, theirs):
        return ours == theirs or not ours + theirs.replace("{}", "") or not theirs + ours.replace("{}", "")
    return _is_list(gold) == _is_list(answer) or not ours + theirs


def _is_list(text: str) -> bool:
    """Whether a text is several values with commas and no brackets around them."""
    return "," in text and not _brackets(text) and number(tidy(text)) is None


def _large_exponent(rest: str) -> bool:
    exponent = _group(rest)
    digits = re.sub(r"[\s{}()+\-,]|\\[,!; ]|\\left|\\right", "", exponent)
    if re.fullmatch(r"[0-9.]+", digits):
        if _at_least(digits.split(".")[0], MOST_EXPONENT):
            return True
        after = re.match(r"[\s}]*(?:\^|\*\*)", rest[len(exponent) :])
        return after is not None and _tower(
            digits + "^" + re.sub(r"[\s{}()]", "", _group(rest[len(exponent) + after.end() :]))
        )
    return re.fullmatch(r"[0-9.^*!]+|[0-9.^*!]*(?:\\cdot|\\times)[0-9.^*!]*", digits) is not None and _tower(digits)


def _tower(text: str) -> bool:
    """Whether a power of numbers, as in an exponent, is too large, or is no plain power."""
    powers = re.split(r"\^|\*\*", text)
    if not all(re.fullmatch(r"[0-9]{1,6}", power) for power in powers):
        return True
    value = 1
    for power in reversed(powers):
        base = int(power)
        if value * math.log(max(base, 1) + 1) > math.log(MOST_EXPONENT) + 1:
            return True
        value = base**value
    return value > MOST_EXPONENT


def _group(text: str) -> str:
    """The argument at the start of a text: a braced or bracketed group, or one run of digits."""
    text_at = len(text) - len(text.lstrip())
    if text[text_at : text_at + 1] in ("{", "("):
        depth = 0
        for place in range(text_at, len(text)):
            depth += (text[place] in "{(") - (text[place] in "})")
            if depth == 0:
                return text[: place + 1]
        return text
    found = re.match(r"\s*-?[0-9.]+", text)
    return found[0] if found else text[: text_at + 1]


def _at_least(digits: str, bound: int) -> bool:
    return len(digits) > 12 or (bool(digits) and int(digits) > bound)


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removesuffix("."))


def _close(gold: Number, answer: Number) -> bool:
    if gold.value == answer.value:
        return True
    for decimal, other in ((gold, answer), (answer, gold)):
        if decimal.digits >= FLOAT and other.digits < FLOAT and other.value:
            return abs(decimal.value / other.value - 1) <= Fraction(4, 10**16) * 2
        endless = not other.digits and not _ends(other.value)
        if endless and decimal.digits >= ROUNDED and decimal.value:
            step = Fraction(10) ** (math.floor(math.log10(abs(decimal.value))) + 1 - decimal.digits)
            return abs(decimal.value - other.value) <= step / 2
    return False


def _ends(value: Fraction) -> bool:
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _unwrapped(text: str) -> str:
    r"""The text within all \text{...} and the like."""
    text = tidy(text)
    for _ in range(4):
        text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    return re.sub(r"^\{(.*)\}$", r"\1", text.strip()).strip()


def _unit(text: str) -> tuple[str, str | None]:
    """A text without its unit, and the unit's short name; None if the text after the number is no unit."""
    money = re.match(r"([+-]?)\s*(\\?\$|€|£|\\euro|\\pounds)\s*(?=[0-9.])", text)
    if money:
        name = {"€": "€", "\\euro": "€", "£": "£", "\\pounds": "£"}.get(money[2], "$")
        rest, unit = _unit(text[money.end() :])
        return money[1] + rest, name if unit in ("", "$", name) else None
    found = re.search(r"(?:\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree|\\circ)\s*$", text)
    if found:
        return text[: found.start()], "deg"
    found = re.search(r"\\?%\s*$", text)
    if found:
        return text[: found.start()], "%"
    found = re.search(rf"(?P<power>{_TEXT}\s*\{{(?P<inside>[^{{}}]*)\}}\s*)(?:\^\s*\{{?\s*(?P<n>[23])\s*\}}?)?$", text)
    if found:
        name = found["inside"].strip().casefold().rstrip(".")
        return text[: found.start()], _known(name, found["n"]) or ""
    found = re.search(
        r"(?<=[0-9.}])(?P<blank>\s*)(?P<name>[A-Za-z][A-Za-z/. ]*?)(?:\s*\^\s*\{?\s*(?P<n>[23])\s*\}?)?$", text
    )
    if found is None:
        return text, ""
    name, unit = found["name"].casefold(), _known(found["name"].casefold(), found["n"])
    if unit is None or (len(name) == 1 and not found["blank"]):
        return text, None
    return text[: found.start()], unit


def _known(name: str, power: str | None) -> str | None:
    square = re.match(r"(square|sq\.?|cubic)\s+", name)
    if square:
        name, power = name[square.end() :], "3" if square[1] == "cubic" else "2"
    unit = _UNITS.get(name)
    return None if unit is None else unit + (power or "")
