"""Uploads: whole, refused early, slow, growing and shrinking files."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from giving import Giving
from network_servers import OBJECT, SHORT, Server, Uploading, hang, needs_proc
from patience import soon
from test_colours import MODEL

from graftage.exceptions import (
    ProviderError,
    ProviderTimeout,
    RequestRejected,
)
from graftage.types import Timeouts

pytestmark = pytest.mark.slow


def uploading(server: Server, file: Path) -> Giving:
    return Giving(lambda request: Uploading(request, server.url, file))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of several MB without two equal blocks."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(b"%08d" % number for number in range(1 << 20)) + b"end")
    return path


def test_large_file_arrives_unchanged(both: Any, file: Path) -> None:
    with Server() as server:
        llm = both.connect(uploading(server, file), model=MODEL)
        llm.models()
        llm.models()
        assert [each.partition(b"\r\n\r\n")[2] == file.read_bytes() for each in server.requests] == [True] * 2
        assert server.accepted == 1


@pytest.mark.parametrize("stays", [False, True], ids=["closes", "stays"])
def test_early_refusal_is_reported(both: Any, file: Path, stays: bool) -> None:
    def early(server: Server, connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        if stays:
            server.stopping.wait(20)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    with Server(early) as server:
        llm = both.connect(
            uploading(server, file),
            model=MODEL,
            attempts=1,
            timeouts=Timeouts(connect=5, first_token=3, idle=3, total=10),
        )
        with pytest.raises(ProviderError) as caught:
            llm.models()
        assert not isinstance(caught.value, ProviderTimeout)
        assert caught.value.status == 413


def test_steady_upload_may_take_long(both: Any, tmp_path: Path) -> None:
    def slow(server: Server, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        got = 0
        while got < 8 << 20 and (data := connection.recv(1 << 20)):
            got += len(data)
            time.sleep(0.01)
        connection.sendall(OBJECT)

    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 << 20))
    with Server(slow) as server:
        timeouts = Timeouts(connect=5, first_token=0.7, idle=0.7, total=60)
        begun = time.monotonic()
        both.connect(uploading(server, path), model=MODEL, attempts=1, timeouts=timeouts).models()
        assert time.monotonic() - begun < 60


@needs_proc
def test_interrupted_upload_closes_its_file(both: Any, file: Path) -> None:
    def held() -> list[str]:
        found = []
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(each.readlink()))
        return [each for each in found if each == str(file)]

    with Server(hang) as server:
        llm = both.connect(uploading(server, file), model=MODEL, attempts=1, timeouts=SHORT)
        with pytest.raises(ProviderTimeout) as caught:
            llm.models()
        assert held() == []
        assert caught.value.phase == "first_token"


def test_growth_of_a_file_is_not_sent(both: Any, file: Path) -> None:
    size = file.stat().st_size

    def growing(server: Server, connection: socket.socket) -> None:
        first = connection.recv(1000)
        with file.open("ab") as more:
            more.write(b"GET /evil HTTP/1.1\r\n\r\n" * 10)
        server.requests.append(first)
        got = len(first) - first.index(b"\r\n\r\n") - 4
        while got < size:
            got += len(connection.recv(65536))
        connection.sendall(OBJECT)
        server.requests.append(b"%d" % (got - size))
        server.keep(connection)

    with Server(growing) as server:
        llm = both.connect(uploading(server, file), model=MODEL, attempts=1)
        llm.models()
        assert llm.chat("x").text == "Hello world"
        assert server.requests[1] == b"0"
        assert b"evil" not in b"".join(server.requests)


def test_shrunk_file_is_rejected(both: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (16 << 20))

    def shrinking(server: Server, connection: socket.socket) -> None:
        connection.recv(1000)
        os.truncate(path, 100)
        while connection.recv(1 << 20):
            pass

    with Server(shrinking) as server:
        llm = both.connect(uploading(server, path), model=MODEL, attempts=1)
        with pytest.raises(RequestRejected, match="shorter"):
            llm.models()
        assert soon(lambda: server.open == 0)
