"""Runs commands in forks of one process, since a short command spends most of its time on imports.

    python -W error forking.py DESCRIPTOR

Each request from the socket is a line of JSON with three descriptors. A fork runs the command; its exit code is sent
back.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
from typing import Any

import graftage
from graftage._cli.app import main

TESTS = ("graftage.testing.plugin", "graftage.testing.conformance", "graftage.testing.both")
"""What only tests import."""
PIECE = 1 << 20
"""Bytes to read at once."""


def preload() -> None:
    """Import what commands import when they run."""
    for each in pkgutil.walk_packages(graftage.__path__, "graftage."):
        if not each.name.endswith("__main__") and not each.name.startswith(TESTS):
            importlib.import_module(each.name)
    for name in ("importlib.metadata", "rich.console", "rich.table", "rich.text"):
        importlib.import_module(name)
    gc.freeze()


def serve(server: socket.socket) -> bool:
    """Fork for each request. Return True in a fork, which then runs the command, and False at the end."""
    while True:
        data, files, _, _ = socket.recv_fds(server, PIECE, 3)
        if not data:
            return False
        while not data.endswith(b"\n"):
            data += server.recv(PIECE)
        pid = os.fork()
        if not pid:
            become(json.loads(data), files)
            return True
        for each in files:
            os.close(each)
        _, status = os.waitpid(pid, 0)
        server.send(b"%d" % os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any], files: list[int]) -> None:
    """Set up the streams, folder, environment and arguments of a new program."""
    for number, each in enumerate(files):
        os.dup2(each, number)
        os.close(each)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:1] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["graftage", *request["arguments"]]


if __name__ == "__main__":
    preload()
    with socket.socket(fileno=int(sys.argv[1]), family=socket.AF_UNIX, type=socket.SOCK_STREAM) as asked:
        is_command = serve(asked)
    if is_command:
        main()
