"""What `torchrun` starts for a rank that is killed: the command `retort train`, in which one rank kills itself with -9.

    torchrun --nproc-per-node 2 tests/ranks/dying.py RANK STEP MOMENT WORD...

MOMENT is a share of what a step does, from the first call of a function in it to its checkpoint: calls are counted in
the step before, so the same words kill at the same call. Or it is `checkpoint`: with half of the step's files written.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from retort.cli import main
from retort.train.run import Run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_checkpoint(step: int) -> None:
    """Dies where the first file of a step's checkpoint is opened that Python opens."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and f".writing-step-{step}" in str(arguments[0]):
            die()

    sys.addaudithook(watch)


def die_in_step(step: int, share: float) -> None:
    """Dies after a share of the calls that the step before made, or where the step is over by then."""
    one_step, calls, last = Run._one_step, 0, 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if last and calls >= share * last:
                die()

    def counted(run: Run, *arguments: Any) -> dict[str, Any]:
        nonlocal calls, last
        if run.step + 1 == step - 1:
            sys.setprofile(count)
        elif run.step + 1 == step:
            calls, last = 0, calls
        elif run.step + 1 > step:
            die()
        return one_step(run, *arguments)

    Run._one_step = counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, step, moment, *words = sys.argv[1:]
    if os.environ["RANK"] == rank and moment == "checkpoint":
        die_in_checkpoint(int(step))
    elif os.environ["RANK"] == rank:
        die_in_step(int(step), float(moment))
    sys.exit(main(["train", *words]))
