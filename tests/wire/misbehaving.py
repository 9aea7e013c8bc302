"""A server process that misbehaves on purpose: `start(folder)` gives its address, and a file that says how.

The file `fault` in the folder is read before each answer: `refuse` closes the connection, `429` and other numbers are
answered as they are, `cut` breaks off within the body, `drip` sends one byte a second, `page` is no JSON.
"""

from __future__ import annotations

import http.server
import json
import sys
import time
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        file = self.folder / "faults"
        faults = file.read_text().split() if file.exists() else []
        if faults:
            file.write_text(" ".join(faults[1:]))
        fault = faults[0] if faults else ""
        with (self.folder / "asked").open("a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Authorization', '-')}\n")
        body = json.dumps({"path": self.path, "port": self.server.server_address[1]}).encode()
        if fault == "refuse":
            self.close_connection = True
            return
        status = int(fault) if fault.isdigit() else 200
        if status != 200:
            body = b'{"detail": "no \\u001b[31mtime"}'
        if fault == "page":
            body = b"<html>back soon</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0.1")
        if status == 302:
            self.send_header("Location", "/other")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[:5])
            self.close_connection = True
            return
        if fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(body)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    (Handler.folder / "port.new").write_text(str(server.server_address[1]))
    (Handler.folder / "port.new").rename(Handler.folder / "port")
    server.serve_forever()
