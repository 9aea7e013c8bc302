"""`served.Process` runs this: a server of Retort's, between whose answers and the client faults are put."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import torch
import uvicorn
from safetensors.torch import load, save

from retort.models.load import load_model
from retort.serve.app import application
from retort.serve.scorer import Scorer


class Faults:
    """An ASGI application around another one."""

    def __init__(self, app: Any, file: Path) -> None:
        self.app, self.file = app, file

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        fault = self.next() if scope["type"] == "http" and scope["method"] == "POST" else "-"
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "-":
            await self.app(scope, receive, send)
            return
        if fault == "refuse":
            raise ConnectionError  # uvicorn closes the connection, or answers 500
        sent: list[Any] = []

        async def kept(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, kept)
        status, body = sent[0]["status"], b"".join(own.get("body", b"") for own in sent[1:])
        if fault.isdigit():
            status, body = int(fault), b'{"detail": "not now"}'
        elif fault == "garbage":
            body = b"<html>" + body
        elif fault in ("short", "nan", "high"):
            body = save({name: changed(own, fault) for name, own in load(body).items()})
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": length})
        if fault == "cut":
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            raise ConnectionError
        if fault == "drip":
            for byte in body:
                await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
                await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b"" if fault == "drip" else body})

    def next(self) -> str:
        faults = self.file.read_text().split() if self.file.exists() else []
        if faults:
            self.file.write_text(" ".join(faults[1:]))
        return faults[0] if faults else "-"


def changed(tensor: torch.Tensor, fault: str) -> torch.Tensor:
    if fault == "short":
        return tensor[:-1].contiguous()
    return torch.full_like(tensor, float("nan") if fault == "nan" else 1.0) if tensor.is_floating_point() else tensor


class Server(uvicorn.Server):
    """A server that writes its port into a folder."""

    def __init__(self, config: uvicorn.Config, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        (self.folder / "port.new").write_text(str(self.servers[0].sockets[0].getsockname()[1]))
        (self.folder / "port.new").rename(self.folder / "port")


def serve(folder: Path, model: Path, port: int) -> None:
    """Serves a model until the process ends."""
    torch.set_num_threads(1)
    lm = load_model(str(model), role="teacher", precision="fp32", device=torch.device("cpu"))
    app = Faults(application(Scorer(lm, name="tiny", most_tokens=4096)), folder / "faults")
    Server(uvicorn.Config(app, port=port, log_level="critical"), folder).run()
