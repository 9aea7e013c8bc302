"""The help of the command: every command and every argument says what it is."""

from __future__ import annotations

import re

import pytest

from retort.cli import main


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The help of the command, or of one of its subcommands, in a wide terminal."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_argument_of_every_command_has_a_help_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    commands = re.findall(r"^    (\w+) +(.*)$", help_of([], capsys), re.MULTILINE)
    assert {"train", "doctor", "eval", "report"} <= {name for name, _ in commands}
    assert all(text for _, text in commands)
    for name, _ in commands:
        arguments = re.split(r"^  (?=\S)", help_of([name], capsys), flags=re.MULTILINE)[1:]
        assert arguments
        for argument in arguments:
            text = argument.split("\n\n")[0].strip()
            assert re.match(r"\S.*?\s{2,}\S", text, re.DOTALL), f"{name}: {text}: no help"
