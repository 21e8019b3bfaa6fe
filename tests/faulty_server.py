"""A file server on the loopback interface that can be told what to do wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class FaultyServer:
    """Files of `folder`; `faults` are used up by the requests for shards, one each, then all is well.

    A fault: `500`, `404`, `cut` (breaks off half-way), `flip` (a wrong byte), `stall` (half, then nothing while the
    test lasts), `slow` (in small pieces).
    """

    folder: Path
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = self.folder / handler.path.lstrip("/")
        fault = self.faults.pop(0) if self.faults and path.suffix == ".tar" else ""
        self.requests.append(handler.path)
        if fault.isdigit() or not path.is_file():
            handler.send_error(int(fault or 404))
            return
        content = bytearray(path.read_bytes())
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        half = len(content) // 2
        if fault == "flip":
            content[half] ^= 1
        if fault == "slow":
            for start in range(0, len(content), 1 + len(content) // 20):
                handler.wfile.write(content[start : start + 1 + len(content) // 20])
                time.sleep(0.02)
        elif fault in ("cut", "stall"):
            handler.wfile.write(content[:half])
            handler.wfile.flush()
            if fault == "stall":
                self.over.wait(60)
            handler.close_connection = True
        else:
            handler.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A server of `folder` while inside."""
    files = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    files.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield files
    finally:
        files.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
