"""A server of chat completions as a process, which misbehaves as it is told; and models that talk, for other tests.

The process answers a conversation by a JSON object with the digest of its last turn, so an answer depends on its own
request alone. The file `faults` holds one word for each POST, from now on: `429`, `500`, ... are answered; `refuse`
closes the connection; `slow` waits for longer than tests do; `page` is no JSON; `shape` is JSON without a choice;
`cut` ends at the limit; `filter` and `refusal` are refusals; `empty` is no text; `french` is another language; `parts`
sends the text in parts, of which one is a thought; `uncounted` counts no tokens; `key` repeats the key, as gateways
may; `kill` ends the process; `-` is an answer as it should be. The file `refuses` holds words of requests that it
answers by 400: options, or `quietly`, which means that it does not say which.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODEL = "judge-1"
LOCK = threading.Lock()


def answer_to(messages: list[dict[str, Any]]) -> str:
    """What the server answers."""
    return json.dumps({"digest": hashlib.sha256(messages[-1]["content"].encode()).hexdigest()[:12]})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        models = [{"id": name} for name in self.words("models") or [MODEL]]
        self.send(200, {"data": models}) if self.path == "/v1/models" else self.send(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            faults = self.words("faults")
            (self.folder / "faults").write_text(" ".join(faults[1:]))
            with (self.folder / "asked").open("a") as log:
                log.write(json.dumps({"path": self.path, **body}) + "\n")
        self.answer(body, faults[0] if faults else "-")

    def words(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().split() if file.exists() else []

    def answer(self, body: dict[str, Any], fault: str) -> None:
        refuses = self.words("refuses")
        refused = [name for name in refuses if name in body]
        if body["model"] not in [*(self.words("models") or [MODEL]), "unlisted"]:
            return self.send(404, {"error": {"message": f"The model `{body['model']}` does not exist"}})
        if refused:
            named = "" if "quietly" in refuses else f": '{refused[0]}' is not supported"
            return self.send(400, {"error": {"message": f"Invalid request{named}"}})
        if fault.isdigit():
            said = self.headers.get("Authorization", "") if int(fault) == 401 else "no \x1b[31mtime"
            return self.send(int(fault), {"error": {"message": said}})
        if fault == "refuse":
            self.close_connection = True
            return None
        if fault == "kill":
            os._exit(9)
        if fault == "slow":
            time.sleep(3)
        if fault == "page":
            return self.send(200, "<html>back soon</html>")
        if fault == "shape":
            return self.send(200, {"choices": [], "error": None})
        return self.send(200, self.completion(body, fault))

    def completion(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        text: Any = answer_to(body["messages"])
        key = self.headers.get("Authorization", "")
        text = {"cut": text[:5], "empty": "", "french": "Voilà ma réponse.", "key": f"{key} {text}"}.get(fault, text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "reasoning_content": "hm"}
        if fault == "parts":
            message["content"] = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
        if fault == "refusal":
            message |= {"content": None, "refusal": "I \x1b[31mcannot"}
        ended = {"cut": "length", "filter": "content_filter"}.get(fault, "stop")
        usage = {"prompt_tokens": 7, "completion_tokens": 3} if fault != "uncounted" else {"prompt_tokens": -1}
        return {"choices": [{"message": message, "finish_reason": ended}], "usage": usage}

    def send(self, status: int, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class ChatServer:
    """The process, and what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self, port: int = 0) -> None:
        """Starts it, again if need be."""
        (self.folder / "port").unlink(missing_ok=True)
        self.process = subprocess.Popen([sys.executable, __file__, str(self.folder), str(port)])
        while not (self.folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.01)
        self.port = int((self.folder / "port").read_text())
        self.url = f"http://127.0.0.1:{self.port}"

    def fails(self, *faults: str, refuses: str = "", models: str = "") -> None:
        """Tells it how to misbehave from now on, and forgets what it was asked."""
        for name, text in (("faults", " ".join(faults)), ("refuses", refuses), ("models", models), ("asked", "")):
            (self.folder / name).write_text(text)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The requests since then."""
        return [json.loads(line) for line in (self.folder / "asked").read_text().splitlines()]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    (Handler.folder / "port.new").write_text(str(server.server_address[1]))
    (Handler.folder / "port.new").rename(Handler.folder / "port")
    server.serve_forever()
