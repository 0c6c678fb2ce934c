"""A web server that serves a folder and misbehaves as told."""

from __future__ import annotations

import http.server
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges and misbehaves as told."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.fault_share = 0.0
        self.num_faults = 0
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self.ignore_ranges = False
        self.latency_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self) -> str:
        with self.lock:
            if self.faults and self.random.random() < self.fault_share:
                self.num_faults += 1
                return self.random.choice(self.faults)
        return ""

    def handle_error(self, request, client_address) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # header and body in one packet
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.server.folder / self.path.strip("/").partition("?")[0]
        asked = self.headers.get("Range", "")
        self.server.requests.append((self.path, asked))
        time.sleep(self.server.latency_s)
        fault = self.server.next_fault()
        if fault == "reset":
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: close with a reset
            self.close_connection = True
            self.connection.close()
            return
        if fault == "error":
            self.send_plain(random.choice([500, 502, 503, 429]), b"broken")
            return
        if path.is_dir():
            links = "".join(f'<a href="{item.name}">{item.name}</a>' for item in sorted(path.iterdir()))
            self.send_plain(200, links.encode(), "text/html")
            return
        if not path.is_file():
            self.send_plain(404, b"")
            return
        data = path.read_bytes()
        if asked and not self.server.ignore_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                self.send_plain(416, b"")
                return
            data = data[int(first) : int(last) + 1]
        self.send_response(206 if asked else 200)
        if fault == "short" and asked:  # says so honestly; of a whole file nobody could tell
            data = data[: len(data) // 2]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":  # promises more than it sends
            data = data[: len(data) // 2]
            self.close_connection = True
        if body:
            self.wfile.write(data)

    def send_plain(self, status: int, data: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def serving(folder: Path):
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
