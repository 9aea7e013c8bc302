"""Shared by all tests: one thread (tiny models only), no network, and models that are made on the spot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support import make_model, tiny_settings

torch.set_num_threads(1)
# Tests end processes and never the machine, so nothing has to reach the disk: a tiny run would wait for that 28 times.
os.fsync = lambda fd: None
# A shell that starts a job in the background tells it to ignore this one; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model folder, once per set of arguments."""
    made: dict[str, Path] = {}

    def make(**arguments: Any) -> Path:
        name = json.dumps(arguments, sort_keys=True)
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp("model"), **arguments)
        return made[name]

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of an image-text model of a family, once; see `image_models`."""
    from image_models import make_image_model

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_image_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data file with answers and given responses."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {
            "prompt": f"{a} + {b} =",
            "answer": str(a + b),
            "response": f"{a + b}",
            "solution": f"{b} + {a} = {a + b}",
            "hint": f"add {b} and {a}",
            "outcome": f"= {a + b}",
            "wrong": f"{a + b + 1}",
            "clean": f"the answer {a} + {b} =",
        }
        for a in range(1, 7)
        for b in range(1, 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models_kept() -> Iterator[None]:
    """The runs of a module read models from the same files once: see `pipeline.models_kept`."""
    import pipeline

    with pipeline.models_kept():
        yield


@pytest.fixture
def images_as_text() -> Iterator[None]:
    """Methods that compare images are tried on models of text: see `imaged.as_text`."""
    import imaged

    with imaged.as_text():
        yield


@pytest.fixture
def tiny_run(model_folder: Callable[..., Path], prompts_file: Path) -> dict[str, Any]:
    """Settings of a run of a second or two: see `support.tiny_settings`."""
    return tiny_settings(model_folder, prompts_file)
