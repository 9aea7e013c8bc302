"""The script for whoever has a GPU: its plumbing. What it measures is measured there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_fails_or_hangs_stops_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "fails": "raise SystemExit('no room')",
        "hangs": "import time; print('so far', flush=True); time.sleep(60)",
        "left out": "raise SystemExit(5)",
        "works": "print('| 1 |')",
    }
    made = [gpu.Part(name, ["-c", code], 2 if name == "hangs" else 60, (0, 5)) for name, code in commands.items()]
    monkeypatch.setattr(gpu, "parts", lambda device, small: made)
    out = tmp_path / "deep" / "table.md"
    assert gpu.main(["--device", "cpu", "--small", "--out", str(out)]) == 1
    sections = out.read_text().split("\n## ")
    assert sections[0].startswith("# ")
    assert "threads" in sections[0]
    said = dict(zip(commands, sections[1:], strict=True))
    assert [name for name, text in said.items() if "FAILED" in text] == ["fails", "hangs"]
    assert "no room" in said["fails"]
    assert "so far" in said["hangs"]
    assert "stopped after 2 s" in said["hangs"]
    assert "| 1 |" in said["works"]
    assert "2 of 4 parts failed" in capsys.readouterr().err


def test_its_parts_exist_and_fit_into_eight_minutes(gpu: ModuleType) -> None:
    for device, small in (("cuda", False), ("cpu", True)):
        found = gpu.parts(device, small=small)
        assert sum(part.limit for part in found) <= 8 * 60
        for part in found:
            assert all(Path(word).exists() for word in part.words if word.startswith("/"))
            if "--part" in part.words:
                name, *arguments = part.words[part.words.index("--part") + 1 :]
                assert name in gpu.OWN
                assert all(argument in gpu.SYSTEMS for argument in arguments)


@pytest.mark.slow
def test_the_demo_part_tells_a_resumed_run_from_another(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.demo("cpu", small=True)
    assert "every number of every step, and the table, are equal" in capsys.readouterr().out
