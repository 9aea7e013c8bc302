"""How the code is kept: short modules, short functions of few arguments, and no hand in another file's pockets.

Which module may import which, and that none do so in a circle, is in pyproject.toml (`make layers`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Lines of a module, and of a function without its docstring.
MODULE, FUNCTION = 400, 70
#: Arguments of a function that a caller may give by their place; whatever is beyond them is given by name.
PLACES = 8
#: Functions that are longer. One that was cut leaves this list; none joins it.
LONG = set[str]()
#: Underscored names of other libraries, for which these have no public one. One that is used no more leaves this list.
THEIRS = {
    # argparse, os, named tuples
    "_actions",
    "_exit",
    "_replace",
    # transformers
    "_attn_implementation",
    "_can_set_attn_implementation",
    "_hf_peft_config_loaded",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_supports_default_dynamic_cache",
    # trl, which a benchmark measures
    "_chunked_divergence_loss",
    # diffusers
    "_optional_components",
    "_pack_latents",
    "_unpack_latents",
    # torch
    "_is_amx_tile_supported",
    "_is_avx512_bf16_supported",
    "_linear_pointwise",
    "_parameters",
    "_to_copy",
    "_version",
}


@lru_cache
def modules() -> dict[str, ast.Module]:
    """What Retort and all that ships with it consists of, by path."""
    files = [file for room in ("retort", "benchmarks", "examples") for file in sorted((ROOT / room).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def underscored(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """What a module defines: functions, classes, variables, fields, attributes of its objects."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_itself(node.value):
            found.add(node.attr)
    return found


def of_itself(node: ast.expr) -> bool:
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def reached_for(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Underscored names of others that a module uses, with their lines: attributes, `getattr` of them, imports."""
    own = own_names(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not of_itself(node.value):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            names = [
                one.value for one in node.args[1:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        yield from ((node.lineno, name) for name in names if underscored(name) and name not in own)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` on, without its docstring."""
    first = function.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if text else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def places_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments of a function that can be given by their place, besides the object that a method belongs to."""
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def compiled(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is one of Triton's, which takes no argument by name alone."""
    return any(ast.unparse(one) == "triton.jit" for one in function.decorator_list)


def test_a_module_is_short() -> None:
    lines = {
        path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules() if "retort/" in path
    }
    assert lines
    assert {path: count for path, count in lines.items() if count > MODULE} == {}


def test_a_function_is_a_screen_long() -> None:
    long = {
        f"{path} {node.name}": lines_of(node)
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > FUNCTION
    }
    assert long.keys() - LONG == set()
    assert long.keys() == LONG, "shorter now: take it from the list"


def test_few_arguments_are_given_by_their_place() -> None:
    many = {
        f"{path} {node.name}": places_of(node)
        for path, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and places_of(node) > PLACES and not compiled(node)
    }
    assert many == {}, "put a * before those that are given by name, or group them"


def test_few_arguments_are_given_by_their_place_in_a_call() -> None:
    """Also to the constructor of a dataclass, which no `def` shows."""
    many = [
        f"{path}:{node.lineno} {ast.unparse(node.func)}"
        for path, tree in modules().items()
        if not any(isinstance(node, ast.FunctionDef) and compiled(node) for node in ast.walk(tree))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) > PLACES
    ]
    assert many == [], "give them by name"


def test_no_file_reaches_into_anothers_objects() -> None:
    found = {path: list(reached_for(tree)) for path, tree in modules().items()}
    others = [f"{path}:{line} {name}" for path, uses in found.items() for line, name in uses if name not in THEIRS]
    assert not others, "\n".join(others)
    unused = THEIRS - {name for uses in found.values() for _, name in uses}
    assert unused == set(), "used no more: take it from the list"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("run._setup.student", ["_setup"]),
        ("run.prepared._student.x = 1", ["_student"]),
        ("from retort.config import _keys, keys", ["_keys"]),
        ("from retort import config\nconfig._keys()", ["_keys"]),
        ("getattr(run, '_setup', None)", ["_setup"]),
        ("import retort.x as _x\n_x._y", ["_y"]),
        # One's own, as another object of the same kind has it, too.
        ("class A:\n def f(self, other):\n  self._x = other._x", []),
        ("class A:\n _x: int\ndef f(a: A): return a._x", []),
        ("class A(B):\n def f(self): return super()._x + self._y", []),
        ("def _f(): ...\n_f().__dict__", []),
    ],
)
def test_what_counts_as_reaching(code: str, found: list[str]) -> None:
    assert [name for _, name in reached_for(ast.parse(code))] == found


def test_how_long_a_function_is() -> None:
    code = 'def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n\n    def g():\n        return x\n    return g'
    f, g = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef))
    assert (lines_of(f), lines_of(g)) == (7, 2)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("def f(a, b, /, c, *rest, d, **more): ...", 3),
        ("def f(self, a, b=1): ...", 2),
        ("async def f(cls, a, *, b): ...", 1),
        ("def f(): ...", 0),
    ],
)
def test_how_many_arguments_have_a_place(code: str, count: int) -> None:
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    assert places_of(function) == count
