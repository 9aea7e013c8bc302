"""What it saves that an image is encoded once for all rollouts of its prompt, against once for each rollout.

    python benchmarks/images_once.py --rounds 3

A tiny random Idefics3 scores and learns from the rollouts of one prompt. Both ways take turns in
one process, so whatever else the machine does hits both alike. Once for each rollout is the model's own forward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from image_models import make_image_model

from retort.core.sequences import TokenSequence
from retort.models.image_trials import with_images
from retort.models.images import made_up
from retort.models.load import load_model


def main() -> None:
    """Prints the seconds of both ways, and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=8, help="of the prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_image_model(Path(folder), "idefics3")
        lm = load_model(str(path), role="student", precision="fp32", device=torch.device("cpu"))
    prompt = with_images(lm, 8, [made_up(64, 64)], 1, 1).prefix
    ids = torch.randint(0, 250, (given.rollouts, given.answer), generator=torch.Generator().manual_seed(0))
    sequences = [prompt.then(own.tolist(), decided=True) for own in ids]
    ways: dict[str, Callable[[Sequence[TokenSequence]], torch.Tensor]] = {
        "once for the prompt": lm.hidden,
        "once for each rollout": lm.alone,
    }
    for learns in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                with torch.set_grad_enabled(learns):
                    hidden_ND = way(sequences)
                if learns:
                    hidden_ND.square().mean().backward()
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
        first = medians["once for the prompt"]
        for name, median in medians.items():
            print(f"{'learn' if learns else 'score':6} {name:36} {median:8.3f} s  {median / first:5.2f} times")


if __name__ == "__main__":
    main()
