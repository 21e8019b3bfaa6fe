"""A file server on the loopback interface that can be told what to do wrong."""

from __future__ import annotations

import re
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

    With `ranges` the server gives parts of files, too. `suffix`: what `faults` are for, if not shards.

    A fault: `500`, `404`, `cut` (breaks off half-way), `flip` (a wrong byte), `stall` (half, then nothing while the
    test lasts), `slow` (in small pieces).
    """

    folder: Path
    faults: list[str] = field(default_factory=list)
    ranges: bool = False
    suffix: str = ".tar"
    requests: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = self.folder / handler.path.lstrip("/")
        fault = self.faults.pop(0) if self.faults and path.suffix == self.suffix else ""
        self.requests.append(handler.path)
        if fault.isdigit() or not path.is_file():
            handler.send_error(int(fault or 404))
            return
        content = self.begin(handler, bytearray(path.read_bytes()))
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

    def begin(self, handler: BaseHTTPRequestHandler, content: bytearray) -> bytearray:
        """Send the headers; what of the content is wanted."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")) if self.ranges else None
        handler.send_response(206 if wanted else 200)
        if self.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        if wanted:
            first, size = int(wanted[1]), len(content)
            content = content[first : int(wanted[2]) + 1]
            handler.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        return content


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
