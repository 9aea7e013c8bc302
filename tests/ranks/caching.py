"""A job of `worker.py` for the test of the cache: the same run without it, with an empty one, and with a full one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import SHARDED, SMALL

from retort import api, ranks
from retort import config as configuration
from retort.errors import UserError
from retort.train import runner

#: Completions of the data and of the student.
MIXED: dict[str, Any] = {"method": {"name": "gkd"}, "data": "countdown", "steps": 3}
#: The base model is the student without its adapter, whose weights the ranks share.
ADAPTED: dict[str, Any] = {"method": {"name": "exopd"}, "lora": {"rank": 4}, "steps": 2}


def main(folder: Path) -> None:
    """Makes the runs in a folder.

    Args:
        folder: Of them all, and of the cache.
    """
    cache = {"cache": {"dir": str(folder / "cache")}}
    jobs = {"plain": MIXED, "empty": {**MIXED, **cache}, "full": {**MIXED, **cache}, "adapted": {**ADAPTED, **cache}}
    for name, settings in jobs.items():
        runner.start(api.assemble(configuration.merge(SMALL, settings)), folder / name).go()
    try:
        runner.start(api.assemble(configuration.merge(SMALL, {**MIXED, **cache, **SHARDED})), folder / "sharded")
    except UserError as error:
        (folder / f"refused-{ranks.here().rank}.txt").write_text(str(error))
