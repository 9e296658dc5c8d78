"""A set behind a URL gives the samples of the set itself; a server that dies is named."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline import remote
from data_pipeline.cursor import Cursor
from data_pipeline.errors import DataError
from data_pipeline.loader import Loader, LoaderConfig, check


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; of tars only half, as long as the server is told to die."""

    def do_GET(self) -> None:  # noqa: N802
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        if self.server.dies and self.path.endswith(".tar"):
            content = (self.server.folder / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        self.folder, self.dies = folder, False
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(digits: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "TRIES", 1)
    server = Server(digits)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def first(cfg: LoaderConfig) -> tuple[torch.Tensor, list[int]]:
    with Loader(cfg, 0, 1, seed=0) as loader:
        batch, _ = next(loader.start(Cursor()))
    return batch.x, batch.samples.tolist()


def test_samples_are_those_of_the_directory_and_fetched_once(
    server: Server, digits: Path, tmp_path: Path
) -> None:
    local = LoaderConfig(path=str(digits), global_batch=16)
    far = LoaderConfig(path=server.url, cache=str(tmp_path), global_batch=16)
    assert check(far, num_classes=10, channels=16, input_size=8) == check(
        local, num_classes=10, channels=16, input_size=8
    )
    for _ in range(2):
        x, samples = first(far)
        assert torch.equal(x, first(local)[0])
        assert samples == first(local)[1]
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) > 0


def test_a_stream_that_ends_early_is_named_and_leaves_nothing(
    server: Server, tmp_path: Path
) -> None:
    far = LoaderConfig(path=server.url, cache=str(tmp_path), global_batch=16)
    server.dies = True
    with pytest.raises(DataError, match=rf"{server.url}/train-000000.tar.*could not be fetched"):
        first(far)
    assert not list(tmp_path.rglob("train-*.tar"))
    server.dies = False
    first(far)


def test_an_address_without_a_set_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be the address"):
        remote.here(f"{server.url}/nothing", str(tmp_path))
    with pytest.raises(DataError, match="must be the address"):
        remote.here("gopher://nowhere/set", str(tmp_path))
