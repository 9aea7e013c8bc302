"""`retort serve` as anyone may speak to it: keys, limits, and requests that are none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save
from served import in_thread

from retort.cli import main
from retort.core.sequences import TokenSequence
from retort.models.load import load_model
from retort.wire.protocol import HEAD, HIDDEN, SCORE, TENSORS, packed

KEY = "sesame-4711"


@pytest.fixture(scope="module")
def lm(model_folder: Callable[..., Path]) -> Any:
    return load_model(str(model_folder(seed=5)), role="teacher", precision="fp32", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def http(lm: Any) -> Iterator[httpx2.Client]:
    bearer = {"Authorization": f"Bearer {KEY}"}
    with in_thread(lm, key=KEY, most_tokens=32) as url, httpx2.Client(base_url=url, headers=bearer) as client:
        yield client


def body(lm: Any, sequences: list[TokenSequence] | None = None, **changed: Any) -> bytes:
    sequences = [TokenSequence.of([5, 6]).then([7, 2], decided=True)] if sequences is None else sequences
    settings = {"weights": lm.digest(), "vocab": 50, "temperature": 1.0, "entropy": True, "top_k": 2, "budget": 99}
    return save(packed(sequences), {"settings": json.dumps(settings | changed)})


def post(http: httpx2.Client, content: bytes, path: str = SCORE, kind: str = TENSORS) -> httpx2.Response:
    return http.post(path, content=content, headers={"Content-Type": kind})


def test_nobody_without_the_key_learns_anything_but_that_it_is_up(http: httpx2.Client, lm: Any) -> None:
    for header in ("", "Bearer", f"Bearer {KEY}x", KEY, "Bearer \u00fc".encode().decode("latin-1")):
        changed = {"Authorization": header.encode("latin-1")}
        assert http.get(HEAD, headers=changed).status_code == 401
        refused = http.post(SCORE, content=body(lm), headers={**changed, "Content-Type": TENSORS})
        assert refused.status_code == 401
        assert http.get("/health", headers=changed).json()["status"] == "ok"
    assert post(http, body(lm)).status_code == 200


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vocab": 10**6}, "vocab|ids below"),
        ({"vocab": 5}, "ids below 5"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": 10**9}, "top_k"),
        ({"code": "os"}, "code"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "words",
)
def test_settings_that_are_none_are_refused_in_one_line(
    http: httpx2.Client, lm: Any, changed: dict[str, Any], words: str
) -> None:
    found = post(http, body(lm, **changed))
    assert found.status_code == 400
    assert re.search(words, found.json()["detail"])


def test_bodies_that_are_none_are_refused(http: httpx2.Client, lm: Any) -> None:
    whole = body(lm)
    for content in (b"", b"x" * 7, whole[:-3], b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}"):
        assert post(http, content).status_code == 400
    assert post(http, whole, kind="text/plain").status_code == 415
    lengths = packed([TokenSequence.of([5, 6]).then([7], decided=True)]) | {"lengths_S": torch.tensor([9])}
    assert post(http, save(lengths, {"settings": json.dumps({"weights": lm.digest()})})).status_code == 400
    unknown = [TokenSequence.of([5]).then([10**6], decided=True)]
    assert post(http, body(lm, unknown)).status_code == 400


def test_requests_are_bounded(http: httpx2.Client, lm: Any) -> None:
    long = TokenSequence.of([5] * 300).then([7], decided=True)
    assert post(http, body(lm, [long])).status_code == 400
    several = [TokenSequence.of([5 + n] * 20).then([7], decided=True) for n in range(4)]
    hidden = save(packed(several), {"settings": json.dumps({"weights": lm.digest(), "narrow": False})})
    assert post(http, hidden, HIDDEN).status_code == 413
    assert post(http, b"x" * 2**21).status_code == 413


def test_other_weights_than_it_has_are_refused(http: httpx2.Client, lm: Any) -> None:
    found = post(http, body(lm, weights="0" * 64))
    assert found.status_code == 409
    assert "other weights" in found.json()["detail"]


def test_other_machines_need_a_key(
    model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETORT_TEACHER_KEY", raising=False)
    assert main(["serve", str(model_folder(seed=5)), "--host", "0.0.0.0"]) == 2
    assert "RETORT_TEACHER_KEY" in capsys.readouterr().err
    assert main(["serve", str(model_folder(seed=5)), "seed=1"]) == 2
    assert "does not read 'seed'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_says_where_it_listens(model_folder: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "retort", "serve", str(model_folder(seed=5)), "--port", "0", "device=cpu"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ.copy()) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            found = re.fullmatch(
                r"serving \w+ \(fp32 on cpu\) at (http://127\.0\.0\.1:\d+); stop it with Ctrl-C\n", line
            )
            assert found is not None, line
            assert httpx2.get(f"{found[1]}/v1/retort").json()["protocol"] == 2
        finally:
            process.terminate()
