"""What can be said of vLLM as an engine without it: settings, weights for it, and a child that ends with its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_settings
from transformers import AutoModelForCausalLM

from retort import config as configuration
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.models.load import load_model
from retort.models.lora import add_adapter
from retort.rollout.engines import guard
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.engines.processes import end, lives, reason, started
from retort.rollout.engines.saved import save_weights, weights_of
from retort.rollout.engines.vllm import VLLMEngine, VLLMSettings
from retort.rollout.engines.vllm_server import vllm_of
from retort.train import runner
from retort.train.models import other_engine as run_engine
from retort.train.models.other_engine import check_other_engine, other_engine

CPU = torch.device("cpu")


def student(folder: Path) -> Any:
    return load_model(str(folder), role="student", precision="fp32", device=CPU)


def resolved(model_folder: Any, prompts_file: Path, **rollout: Any) -> Any:
    settings = tiny_settings(model_folder, prompts_file)
    return configuration.resolve(settings | {"rollout": {**settings.get("rollout", {}), **rollout}}, {})


def wrapper(folder: Path, vllm: str) -> str:
    """An interpreter that also sees the record of an installed vLLM of this version."""
    record = folder / f"vllm-{vllm}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm}\n")
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nPYTHONPATH='{folder}' exec '{sys.executable}' \"$@\"\n")
    path.chmod(0o700)
    return str(path)


def test_an_interpreter_says_which_vllm_it_has(tmp_path: Path) -> None:
    assert vllm_of(wrapper(tmp_path / "new", "0.32.1")) == "0.32.1"
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o700)
    refusals = {
        str(tmp_path / "none"): "there is no such file",
        str(tmp_path): "is a folder; name the interpreter in it",
        str(tmp_path / "text"): "is no Python that starts",
        "/bin/true": "is no Python that starts",
        sys.executable: "has no vLLM",
        wrapper(tmp_path / "old", "0.9.2"): r"has vLLM 0\.9\.2; install 0\.32 or a newer one",
    }
    for python, said in refusals.items():
        with pytest.raises(UserError, match=said):
            vllm_of(python)


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"engine": "vllm"}, "needs rollout.vllm_python"),
        ({"vllm_python": "python"}, "rollout.vllm_python belongs to rollout.engine=vllm"),
        ({"vllm_options": ["--seed=1"]}, "rollout.vllm_options belongs to rollout.engine=vllm"),
        ({"engine": "vllm", "vllm_python": "x", "vllm_options": ["--port=1"]}, "--port is set by the run"),
        ({"engine": "vllm", "vllm_python": sys.executable}, "has no vLLM"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_before_anything_is_loaded(
    model_folder: Any, prompts_file: Path, tmp_path: Path, rollout: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as found:
        runner.start(resolved(model_folder, prompts_file, **rollout), tmp_path / "run").go()
    assert "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_without_a_name_it_is_this_interpreter_where_that_has_vllm(
    model_folder: Any, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolved(model_folder, prompts_file, engine="vllm", vllm_options=["--seed=1"])
    assert asked.rollout.vllm == (sys.executable, "--seed=1")
    asked_of: list[str] = []
    monkeypatch.setattr(run_engine, "has_vllm", lambda: True)
    monkeypatch.setattr(run_engine, "vllm_of", asked_of.append)
    check_other_engine(asked)
    assert asked_of == [sys.executable]
    assert resolved(model_folder, prompts_file).rollout.vllm == ()


def test_no_writer_is_made_for_the_own_loop_and_none_for_a_student_that_sees(
    model_folder: Any, image_folder: Callable[[str], Path], prompts_file: Path
) -> None:
    own = resolved(model_folder, prompts_file)
    check_other_engine(own)
    rendered: Any = None  # no prompt is rendered here
    assert other_engine(own, student(model_folder(seed=1)), 58, [], rendered, int) is None
    other = resolved(model_folder, prompts_file, engine="vllm", vllm_python="python")
    with pytest.raises(UserError, match=r"writes text alone, and .* reads images; use rollout.engine=own"):
        other_engine(other, student(image_folder("qwen3_vl")), 58, [], rendered, int)


def test_requests_that_vllm_cannot_do_are_refused_before_it_is_asked(model_folder: Any) -> None:
    engine = VLLMEngine(student(model_folder(seed=1)), 30, VLLMSettings("none", longest=20))
    uniforms = torch.full((8,), 0.5).double()
    wrong = {
        r"which not all models of the run have": ([5, 40], Sampling(8)),
        r"temperature 0\.001 is one that vLLM does not sample at": ([5], Sampling(8, 0.001)),
        r"a prompt of 15 tokens and a completion of 8 are more than the 20": ([5] * 15, Sampling(8)),
        r"a prompt is empty": ([], Sampling(8)),
    }
    for said, (ids, sampling) in wrong.items():
        with pytest.raises(UserError, match=said):
            engine.generate([Request(TokenSequence.of(ids), uniforms)], sampling)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_written_are_the_model_s_over_the_ids_that_are_tokens(
    model_folder: Any, tmp_path: Path, tied: bool
) -> None:
    """Another program that reads them computes the same; a head that was the embedding is one of its own."""
    lm = student(model_folder(seed=3, tie_word_embeddings=tied))
    config = lm.model.config.to_dict()
    save_weights(lm, weights_of(lm), tmp_path / "weights-0", 50, untied=True)
    assert lm.model.config.to_dict() == config
    assert json.loads((tmp_path / "weights-0" / "config.json").read_text())["vocab_size"] == 50
    names = {path.name for path in (tmp_path / "weights-0").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    stored = load_file(tmp_path / "weights-0" / "model.safetensors")
    assert len(stored["lm_head.weight"]) == len(stored["model.embed_tokens.weight"]) == 50
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "weights-0", dtype=torch.float32)
    ids_1L = torch.tensor([[5, 9, 12, 30]])
    torch.testing.assert_close(read(ids_1L).logits, lm.model(ids_1L).logits[..., :50])


def test_an_adapter_is_merged_into_the_weights_written(model_folder: Any, tmp_path: Path) -> None:
    lm = student(model_folder(seed=3))
    add_adapter(lm, rank=2, alpha=4.0, targets=["q_proj", "down_proj"], rslora=False, seed=0)
    with torch.no_grad():
        for parameter in lm.trainable().values():
            parameter.normal_(0.0, 0.3)
    save_weights(lm, weights_of(lm), tmp_path / "weights-0", 58, untied=False)
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "weights-0", dtype=torch.float32)
    ids_1L = torch.tensor([[5, 9, 12, 30]])
    with torch.no_grad():
        with lm.without_adapter():
            bare = lm.model(ids_1L).logits[..., :58]
        ours = lm.model(ids_1L).logits[..., :58]
        assert float((ours - bare).abs().max()) > 0.1
        torch.testing.assert_close(read(ids_1L).logits, ours, rtol=1e-4, atol=1e-4)


def test_the_reason_in_a_log_is_its_last_own_error() -> None:
    log = (
        "(APIServer pid=1) INFO 11-30 18:17:20 [vllm.py:725] starting\n"
        "(EngineCore pid=2) ERROR 11-30 18:17:21 [core.py:9] Traceback (most recent call last):\n"
        "(EngineCore pid=2) ERROR 11-30 18:17:21 [core.py:9] ValueError: head size 8 is not supported\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert reason(log) == "ValueError: head size 8 is not supported"
    assert reason("api_server.py: error: unrecognized arguments: --nonsense\n").endswith("--nonsense")
    assert reason("the last line\n") == "the last line"
    assert reason("") == ""


PARENT = """
import subprocess, sys, time
source = open(sys.argv[1]).read()
child = subprocess.Popen(
    [sys.executable, "-c", source, str(__import__("os").getpid()), "sh", "-c", "sleep 1000 & echo $! $$; wait"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(1000)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked about yet counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
@pytest.mark.parametrize("killed", ["the parent", "the guard"])
def test_a_child_and_all_that_it_started_end_with_whoever_is_killed(killed: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, guard.__file__], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in f"{parent.stdout.readline()} {parent.stdout.readline()}".split()]
    between, sleeper, shell = pids
    try:
        assert not any(map(gone, pids))
        os.kill(parent.pid if killed == "the parent" else between, signal.SIGKILL)
        # The system ends the command of a guard that is killed, and no more than that.
        expected = pids if killed == "the parent" else [between, shell]
        ends = time.monotonic() + 60
        while not all(map(gone, expected)) and time.monotonic() < ends:
            time.sleep(0.02)
        assert all(map(gone, expected))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pid in [sleeper, shell, between]:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_guard_that_is_killed_takes_along_what_its_command_started(tmp_path: Path) -> None:
    """As Ray does, which kills an actor's children with it; the system ends the command itself, and no more."""
    child = "import time; print(1, flush=True); time.sleep(300)"
    leader = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log"
    process = started([sys.executable, "-c", leader], log, cwd=tmp_path, env=os.environ)
    ends = time.monotonic() + 60
    while log.read_text() != "1\n" and time.monotonic() < ends:
        time.sleep(0.01)
    assert log.read_text() == "1\n"
    process.kill()
    process.communicate()
    while lives(process.pid) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not lives(process.pid)


def test_a_server_that_was_ended_has_no_process_any_more() -> None:
    """The leader of a group is gone at once, and a process with much memory only a while after it."""
    child = "import time; held = bytearray(b'1') * 2**29; print(len(held), flush=True); time.sleep(300)"
    leader = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) == 2**29
    end(process)
    left: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # another process that has ended meanwhile
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            left += [path.parent.name] if int(group) == process.pid and state not in "ZX" else []
    process.stdout.close()
    assert not left
