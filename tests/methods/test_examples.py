"""Every method has an example in its docstring, whose numbers are right."""

import doctest
import re

import pytest

import retort.methods
from retort import registry

#: What the example of each method follows, as a reader is told.
BEFORE = doctest.script_from_examples(retort.methods.__doc__ or "")


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(registry.builder(name).__doc__ or "", name)


def complaints(name: str, found: list[doctest.Example]) -> str:
    """What differs between what examples show and what they print."""
    names: dict[str, object] = {}
    exec(BEFORE, names)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(doctest.DocTest(found, names, name, None, 0, None), out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", registry.names())
def test_the_example_of_a_method_is_right(name: str) -> None:
    found = examples(name)
    assert any(name in example.source for example in found), "the docstring has no example that makes the method"
    assert any(re.search(r"\d", example.want) for example in found), "the example shows no number"
    assert complaints(name, found) == ""


def test_no_two_methods_have_the_same_example() -> None:
    plain = {name: "".join(one.source.replace(name, "") for one in examples(name)) for name in registry.names()}
    assert len(set(plain.values())) == len(plain)


def test_a_wrong_number_is_noticed() -> None:
    found = examples("opd")
    found[-1].want = "tensor(-0.4800)\n"
    assert "-0.4700" in complaints("opd", found)
