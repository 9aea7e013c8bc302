"""A worker as an actor: a process with a copy of the student, which generates for the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable

from retort.cluster.teacher import Server, Serving
from retort.wire.workers import KEY


class Worker(Server):
    """The server of a copy of the student, whose weights the ranks send."""

    def serve(self, host: str, port: int, key: str, device: str, threads: int, trust_remote_code: bool) -> Serving:
        """Generates for whoever asks from now on, unless it does so already.

        Args:
            host: Address to listen at.
            port: Port to listen at; 0: any that is free.
            key: Bearer token of its clients.
            device: See `retort.serve.worker.Worker`, as `trust_remote_code`.
            threads: Of torch.
            trust_remote_code: Whether code of the student's folder is run.
        """
        os.environ[KEY] = key

        def serves(listening: Callable[[int], None]) -> None:
            from retort.serve.worker import work

            work(
                host=host,
                port=port,
                device=device,
                threads=threads,
                trust_remote_code=trust_remote_code,
                listening=listening,
            )

        return self.begin(serves, f"{host}:{port}")
