"""A worker as an actor: a process with a copy of the student, its own or a vLLM's, which generates for the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from retort.cluster.teacher import Server, Serving
from retort.wire.workers import KEY


class Worker(Server):
    """The server of a copy of the student, whose weights the ranks send."""

    def serve(
        self,
        host: str,
        port: int,
        key: str,
        device: str,
        threads: int,
        trust_remote_code: bool,
        vllm: Sequence[str],
    ) -> Serving:
        """Generates for whoever asks from now on, unless it does so already.

        Args:
            host: Address to listen at.
            port: Port to listen at; 0: any that is free.
            key: Bearer token of its clients.
            device: See `retort.serve.worker.work`, as what follows.
            threads: Of torch, or of vLLM.
            trust_remote_code: Whether code of the student's folder is run.
            vllm: The interpreter of a vLLM, and further arguments of its server; none: the own loop generates.
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
                vllm=vllm,
                listening=listening,
            )

        return self.begin(serves, f"{host}:{port}")
