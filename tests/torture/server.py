"""A web server that dies in the middle of a shard, and can be brought back."""

import http.server
import threading
from pathlib import Path
from typing import Self


class DyingServer(http.server.ThreadingHTTPServer):
    """Serves a folder. left: bytes of shards that it still sends before it dies; None: no end."""

    def __init__(self, folder: Path, left: int | None) -> None:
        self.left = left
        self.cut: list[str] = []  # shards of which it sent a part or nothing
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), lambda *a: _Handler(*a, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def grant(self, name: str, wanted: int) -> int:
        """How many bytes of a shard are sent."""
        with self._lock:
            if self.left is None:
                return wanted
            sent = min(self.left, wanted)
            self.left -= sent
            if sent < wanted:
                self.cut.append(name)
            return sent


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802
        assert isinstance(self.server, DyingServer)
        file = Path(self.translate_path(self.path))
        if file.suffix != ".tar":
            super().do_GET()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.grant(file.name, len(content))])

    def log_message(self, *_: object) -> None:
        pass
