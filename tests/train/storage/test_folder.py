"""The folder of a run: read without a trace, written by one process, and never somebody else's."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from forked import command, killed
from train.storage.test_survival import assert_same, changed, go

from retort import config as configuration
from retort.cli import main
from retort.errors import RunError, UserError
from retort.files import new_folder, write_text
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.output import export
from retort.train.storage.folder import FILES, LOCK, Claim, refuse_taken
from retort.train.storage.metrics import JsonLines

pytestmark = pytest.mark.usefixtures("models_kept")

SMALL = ["task=exact", "checks=warn", "precision=fp32", "steps=4", "rollout.prompts=4", "rollout.max_new_tokens=6"]
SMALL += ["eval.problems=4", "eval.samples=2", "eval.max_new_tokens=6", "rollout.max_prompt_tokens=32"]
SMALL += ["checkpoint.every=2", "optimizer.updates=2", "optimizer.learning_rate=0.01"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, prompts_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *words(model_folder, prompts_file, folder)]) == 0
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def words(model_folder: Any, data: Path, out: Path) -> list[str]:
    models = ["--student", str(model_folder(seed=1)), "--teacher", str(model_folder(seed=2, hidden_size=24))]
    return [*models, "--data", str(data), "--out", str(out), *SMALL]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: names, times, content."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


# --- what reads, reads ---


@pytest.mark.parametrize(
    "arguments",
    [
        ["trust", "RUN", "--view", "nobody"],
        ["trust", "RUN", "--problems", "0"],
        ["trust", "RUN", "--candidates", "-1"],
        ["trust", "RUN/checkpoints/step-2", "--view", "nobody"],
        ["train", "--resume", "RUN", "--steps", "1"],
        ["train", "--resume", "RUN", "--steps", "0"],
        ["train", "--resume", "RUN", "--seed", "3"],
        ["train", "--resume", "RUN/checkpoints/step-3"],
        ["train", "--out", "RUN"],
        ["eval", "RUN/model", "--data", "nowhere.jsonl"],
        ["report", "RUN", "--out", "RUN/config.json"],
        ["report", "RUN", "--out", "RUN/checkpoints"],
    ],
    ids=" ".join,
)
def test_a_refused_command_leaves_a_run_as_it_was(
    run_copy: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run_copy)
    assert main([word.replace("RUN", str(run_copy)) for word in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(run_copy) == before


def test_trust_writes_its_own_files_and_nothing_else(run_copy: Path) -> None:
    (run_copy / "metrics.jsonl").write_bytes((run_copy / "metrics.jsonl").read_bytes() + b'{"step": 5, "loss"')
    before = snapshot(run_copy)
    claim = Claim(run_copy).take()  # another process is at work
    try:
        main(["trust", str(run_copy / "checkpoints" / "step-2"), "--problems", "2", "--places", "1"])
    finally:
        claim.release()
    after = snapshot(run_copy)
    own = {"trust.json", "report.html", LOCK}
    assert {name for name in after if after[name] != before.get(name)} <= own
    assert before.keys() <= after.keys()


def test_loading_a_run_to_resume_it_writes_nothing_until_it_goes(run_copy: Path) -> None:
    before = snapshot(run_copy)
    run = runner.resume(run_copy / "checkpoints" / "step-2", steps=6)
    assert snapshot(run_copy) == before
    run.go()
    assert [row["step"] for row in JsonLines(run_copy / "metrics.jsonl").rows()] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run_copy / "config.json").read_text())["steps"] == 6


@pytest.mark.parametrize("goes", ["on", "back"])
def test_a_run_that_was_loaded_too_early_is_refused(run_copy: Path, goes: str) -> None:
    """Between loading and going on, another process was at work: its steps are not to be thrown away."""
    late = runner.resume(run_copy, steps=6)
    if goes == "on":
        runner.resume(run_copy, steps=5).go()
    else:
        runner.resume(run_copy / "checkpoints" / "step-2", steps=3).go()
    before = snapshot(run_copy)
    with pytest.raises(UserError, match="another process went on with this run"):
        late.go()
    assert snapshot(run_copy) == before


# --- what is not ours ---


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_folder_with_files_of_others_is_refused_before_anything_is_written(
    tiny_run: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("precious")
    if kind == "file":
        (folder / name).write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    elif kind == "folder":
        (folder / name).mkdir()
        (folder / name / "precious").write_text("x")
    else:
        (folder / name).symlink_to(elsewhere)
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"holds {name}, which no run wrote"):
        runner.start(configuration.resolve(tiny_run), folder)
    assert snapshot(folder) == before
    assert elsewhere.read_text() == "precious"


def test_the_students_own_folder_is_no_place_for_a_run(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny_run["student"], tmp_path / "student"))
    before = snapshot(student)
    with pytest.raises(UserError, match="holds config.json"):
        runner.start(configuration.resolve(changed(tiny_run, student=str(student))), student)
    assert snapshot(student) == before


def test_other_files_in_the_folder_are_left_alone(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.md").write_text("mine")
    go(changed(tiny_run, steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"


def test_a_refused_start_leaves_no_folder(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        runner.start(configuration.resolve(changed(tiny_run, rollout={"max_prompt_tokens": 1})), tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with\0nul", "x" * 300, "file/inside"])
def test_a_folder_that_cannot_be_is_said(tiny_run: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --out"):
        refuse_taken(tmp_path / name)


def test_a_report_does_not_replace_a_page_of_others(run_copy: Path, tmp_path: Path) -> None:
    page = tmp_path / "thesis.html"
    page.write_text("<!DOCTYPE html><html><body>my thesis</body></html>")
    assert main(["report", str(run_copy), "--out", str(page)]) == 2
    assert "my thesis" in page.read_text()
    assert main(["report", str(run_copy), "--out", str(tmp_path / "new.html")]) == 0
    assert main(["report", str(run_copy), "--out", str(tmp_path / "new.html")]) == 0


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_temporary_names_are_not_followed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "precious"
    if kind == "folder":
        target.mkdir()
        (target / "inside").write_text("x")
    elif kind == "file":
        target.write_text("x")
    for name in (".writing-a.json", ".writing-model", ".before-model"):
        (tmp_path / name).symlink_to(target)
    write_text(tmp_path / "a.json", "new")
    for text in ("one", "two"):  # the second replaces the first
        with new_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text(text)
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "model" / "weights").read_text() == "two"
    assert kind == "dangling" or target.exists()
    assert kind != "folder" or (target / "inside").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_new_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


# --- one process at a time ---


@pytest.fixture
def at_work(model_folder: Any, prompts_file: Path, tmp_path: Path) -> Iterator[tuple[BaseProcess, Path]]:
    """A run of thousands of steps in a process of its own, at work."""
    out = tmp_path / "live"
    asked = ["train", *words(model_folder, prompts_file, out), "steps=100000", "eval.problems=0"]
    process = command(asked, tmp_path / "errors")
    wait_for(lambda: (out / "metrics.jsonl").exists() or process.exitcode is not None)
    yield process, out
    process.kill()
    process.join()


def wait_for(happened: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_the_second_process_is_told_who_is_at_work(
    at_work: tuple[BaseProcess, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model_folder: Any,
    prompts_file: Path,
) -> None:
    process, out = at_work
    for arguments in (["train", "--resume", str(out)], ["train", *words(model_folder, prompts_file, out)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"another run is at work there (process {process.pid} on " in error
    assert process.pid is not None
    os.kill(process.pid, signal.SIGHUP)  # a terminal that closes
    process.join()
    assert process.exitcode == 1
    assert "everything is saved" in (tmp_path / "errors").read_text()
    assert (out / "checkpoints").is_dir()
    run = runner.resume(out)  # the lock ended with the process
    assert run.step >= 1


def test_a_killed_process_leaves_no_lock(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "live"
    assert killed(tiny_run, out, 1) == -signal.SIGKILL
    assert (out / LOCK).exists()
    Claim(out).take().release()


@pytest.mark.parametrize("harm", ["remove", "rename"])
def test_a_folder_that_vanishes_is_not_made_again(tiny_run: dict[str, Any], tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "run"

    class Vandal(Silent):
        def step(self, step: int, steps: int, metrics: object) -> None:
            if step == 3:
                shutil.rmtree(folder) if harm == "remove" else folder.rename(tmp_path / "moved")

    run = runner.start(configuration.resolve(tiny_run), folder, Vandal())
    with pytest.raises(RunError, match="folder was removed or renamed"):
        run.go()
    assert not folder.exists()
    if harm == "rename":
        runner.resume(tmp_path / "moved").go()
        go(tiny_run, tmp_path / "whole")
        assert_same(tmp_path / "whole", tmp_path / "moved")


# --- full disks ---


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size: as on a full disk, a write takes a part and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"prompt": f"{a} + {b} = 你好世界，问题 👩‍🔬", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 6)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, chinese: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *words(model_folder, chinese, folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "less"),
    [
        *(("rollouts.jsonl", less) for less in (2, 3, 4)),
        ("rollouts.jsonl", 3000),
        ("metrics.jsonl", 10),
        ("eval.json", 10),
        ("answers.jsonl", 40),
        ("checkpoints/step-2/optimizer.safetensors", 10),
        ("checkpoints/step-2/weights.safetensors", 10),
        ("model/model.safetensors", 10),
    ],
)
def test_a_run_goes_on_from_a_full_disk_bit_for_bit(
    model_folder: Any,
    chinese: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    less: int,
) -> None:
    """A file that cannot grow beyond a size, as on a full disk: a part of a line, even of a character, is written."""
    limit, out = (whole / name).stat().st_size - less, tmp_path / "run"
    with no_file_beyond(limit):
        code = main(["train", *words(model_folder, chinese, out)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1, error
    assert error.startswith("retort: cannot write ")
    assert "the disk is full" in error
    assert not (out / ".writing-model").exists()
    assert main(["train", "--resume", str(out)]) == 0
    assert_same(whole, out)
    assert (out / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_line_cut_in_the_middle_of_a_character(tmp_path: Path, cut: int) -> None:
    file = JsonLines(tmp_path / "rollouts.jsonl")
    for step in (1, 2):
        file.append({"step": step, "text": "世界👩‍🔬"})
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    file.cut(2)
    assert [row["step"] for row in file.rows()] == [1, 2][: 1 if cut > 1 else 2]


def test_a_full_disk_takes_no_half_line(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "rows.jsonl")
    file.append({"step": 1, "text": "one"})
    size = file.path.stat().st_size
    with no_file_beyond(size + 7), pytest.raises(RunError, match="rows.jsonl: the disk is full"):
        file.append({"step": 2, "text": "two"})
    assert file.path.stat().st_size == size


@pytest.mark.parametrize("junk", [b"{", b"\xff\xfe\x00", b"[1, 2]", b'{"no": "step"}', b'{"step": "3"}', b"\0" * 9])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, junk: bytes) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.path.write_bytes(b'{"step": 1}\n' + junk + b'\n{"step": 3}\n')
    before = file.path.read_bytes()
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        file.cut(3)
    assert file.path.read_bytes() == before


# --- display ends nothing ---


def test_a_table_that_cannot_be_shown_is_shown_after_the_model_is_written(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = export.write_model
    monkeypatch.setattr(export, "write_model", lambda *given: (order.append("model"), real(*given))[1])

    class Watcher(Silent):
        def table(self, results: object) -> None:
            order.append("table")

    runner.start(configuration.resolve(changed(tiny_run, steps=1)), tmp_path / "run", Watcher()).go()
    assert order == ["model", "table"]


ASCII = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}


# Each is a process of its own, whose output the shell redirects as it starts: it cannot be forked.
@pytest.mark.parametrize(
    ("shell", "env"),
    [
        ("RETORT | head -n 1", {}),
        pytest.param("RETORT > /dev/full", {}, marks=pytest.mark.slow),
        pytest.param("RETORT >&-", {}, marks=pytest.mark.slow),
        pytest.param("nohup RETORT > OUT.log 2>/dev/full", ASCII, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_when_nobody_can_read_it(
    model_folder: Any, prompts_file: Path, tmp_path: Path, shell: str, env: dict[str, str]
) -> None:
    out = tmp_path / "run"
    line = " ".join(f"'{word}'" for word in [sys.executable, "-m", "retort", "train"])
    line += " " + " ".join(f"'{word}'" for word in [*words(model_folder, prompts_file, out), "steps=2"])
    script = "set -o pipefail; " + shell.replace("RETORT", line).replace("OUT", str(tmp_path / "out"))
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert (out / "model" / "model.safetensors").exists()
    assert (out / "report.html").exists()
