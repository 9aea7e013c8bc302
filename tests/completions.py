"""A server of completions as a process of its own: it answers in the shapes of vLLM 0.32, as were seen there.

`serving` serves the model in a folder. What it offers is in the address, so that one process is many servers:
`/max=20,at=128/v1/completions`. The options:

* `max=K`: largest `prompt_logprobs` and `logprobs`; -1: all ids. `at=K`: most `logprob_token_ids`, 0: it ignores them.
* `echo`: it ignores `prompt_logprobs`; `texts`: it ignores `return_tokens_as_token_ids`; `silent`: no `/tokenize`.
* `shifted`, `short`, `nan`, `positive`, `others`: answers that are wrong in these ways; `moved`: another model's.
"""

from __future__ import annotations

import contextlib
import http.server
import json
from collections.abc import Iterator
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import forked


class Server:
    """A server that is starting; its address is waited for when it is first read."""

    def __init__(self, port: Connection) -> None:
        self._port = port

    @cached_property
    def url(self) -> str:
        return f"http://127.0.0.1:{int(self._port.recv())}"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Such a server, for as long as the block lasts."""
    port, its_port = forked.server().Pipe(duplex=False)
    process = forked.started(serve, folder, its_port)
    its_port.close()  # so that a process that ends before it has one is noticed
    with port:
        try:
            yield Server(port)
        finally:
            process.kill()
            process.join()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # head and body in one packet
    model: Any
    tokenizer: Any
    options: dict[str, str]

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        parts = self.path.removeprefix("/").split("/")
        given = [] if parts[0] in ("v1", "tokenize") else parts.pop(0).split(",")
        self.options = dict(option.partition("=")[::2] for option in given)
        try:
            found, status = self.found("/".join(parts), body), 200
        except Refused as error:
            found, status = {"error": {"message": str(error), "type": "BadRequestError"}}, error.status
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def found(self, path: str, body: dict[str, Any]) -> Any:
        if path == "v1/models":
            return {"object": "list", "data": [{"id": "tiny", "max_model_len": self.context}]}
        if path == "tokenize" and "silent" not in self.options:
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path != "v1/completions":
            raise Refused(404, "Not Found")
        if body["model"] != "tiny":
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        choices = [self.choice(ids, body) for ids in body["prompt"]]
        if "short" in self.options:
            choices = choices[1:]
        # As a server may: in the order in which they were ready.
        return {"choices": [{"index": index, **own} for index, own in enumerate(choices)][::-1]}

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def rows(self) -> int:
        return self.model.config.vocab_size

    def choice(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        import torch

        echo = body.get("echo", False)
        if len(ids) + max(body["max_tokens"], 1) > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens.")
        if max(ids) >= self.rows:
            raise Refused(400, f"Token id {max(ids)} is out of vocabulary")
        if not echo and body["max_tokens"] < 1:
            raise Refused(400, "max_tokens must be at least 1, got 0.")
        most, chosen = int(self.options.get("max", 20)), body.get("logprob_token_ids")
        for name in ("prompt_logprobs", "logprobs"):
            k = body.get(name) or 0
            if (self.rows if k < 0 else k) > (self.rows if most < 0 else most):
                raise Refused(400, f"Requested {name} of {k}, which is greater than max allowed: {most}")
        if chosen is not None and 0 < int(self.options.get("at", 128)) < len(chosen):
            raise Refused(400, f"Requested logprob_token_ids of length {len(chosen)}")
        with torch.inference_mode():
            sent = [*ids[1:], ids[0]] if "shifted" in self.options else ids
            logits_LV = self.model(input_ids=torch.tensor([sent])).logits[0].float()
            logp_LV = (-logits_LV if "moved" in self.options else logits_LV).log_softmax(-1)
        own: dict[str, Any] = {"prompt_logprobs": None, "logprobs": None}
        if body.get("prompt_logprobs") is not None and "echo" not in self.options:
            own["prompt_logprobs"] = [None, *self.lists(ids, logp_LV, body["prompt_logprobs"])]
        if echo:
            own["logprobs"] = self.echoed(ids, logp_LV, body)
        elif chosen is not None and int(self.options.get("at", 128)):
            own["logprobs"] = {"top_logprobs": [{f"token_id:{i}": float(logp_LV[-1, i]) for i in chosen}]}
        elif body.get("logprobs") is not None:
            values, best = logp_LV[-1].topk(body["logprobs"])
            named = {f"token_id:{i}": v for i, v in zip(best.tolist(), values.tolist(), strict=True)}
            own["logprobs"] = {"top_logprobs": [named]}
        return own

    def lists(self, ids: list[int], logp_LV: Any, k: int) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for place, token in enumerate(ids[1:]):
            row_V = logp_LV[place]
            listed = [token, *row_V.topk(self.rows if k < 0 else k).indices.tolist()]
            if "others" in self.options:
                listed = [(token + 1) % self.rows]
            own = {str(i): {"logprob": float(row_V[i]), "decoded_token": "?"} for i in listed}
            if "nan" in self.options:
                own[str(listed[0])]["logprob"] = float("nan")
            if "positive" in self.options:
                own[str(listed[0])]["logprob"] = 1.5
            found.append(own)
        return found

    def echoed(self, ids: list[int], logp_LV: Any, body: dict[str, Any]) -> dict[str, Any]:
        named = body.get("return_tokens_as_token_ids") and "texts" not in self.options
        lists = self.lists(ids, logp_LV, body["logprobs"])
        top = [{f"token_id:{i}" if named else f"<{i}>": v["logprob"] for i, v in own.items()} for own in lists]
        return {"token_logprobs": [None, *(next(iter(own.values())) for own in top)], "top_logprobs": [None, *top]}


def serve(folder: Path, port: Connection) -> None:
    """Serves the model of a folder until the process ends, and says at which port."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    Handler.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    Handler.tokenizer = AutoTokenizer.from_pretrained(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()
