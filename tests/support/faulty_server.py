"""A file server on the loopback interface that injects faults."""

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
    """A server of the files in `folder`. Each request for a file with `suffix` takes one of `faults`, if any is left.

    `ranges`: support range requests.

    Faults: `500`, `404`, `cut` (connection closed half-way), `flip` (a wrong byte), `stall` (half, then nothing until
    the test ends), `slow` (in small pieces).
    """

    folder: Path
    faults: list[str] = field(default_factory=list)
    ranges: bool = False
    suffix: str = ".tar"
    requests: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        path = self.folder / handler.path.lstrip("/")
        fault = self.faults.pop(0) if self.faults and path.suffix == self.suffix else ""
        self.requests.append(handler.path)
        if fault.isdigit() or not path.is_file():
            handler.send_error(int(fault or 404))
            return
        content = self.send_headers(handler, bytearray(path.read_bytes()))
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
                self.stopped.wait(60)
            handler.close_connection = True
        else:
            handler.wfile.write(content)

    def send_headers(self, handler: BaseHTTPRequestHandler, content: bytearray) -> bytearray:
        """Send the headers; return the requested range of `content`."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")) if self.ranges else None
        handler.send_response(206 if requested else 200)
        if self.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        if requested:
            first, size = int(requested[1]), len(content)
            content = content[first : int(requested[2]) + 1]
            handler.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        return content


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """Serve `folder` inside the block."""
    files = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.respond(self)

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
        files.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
