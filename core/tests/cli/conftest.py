"""The `graftage` command, run as users run it: as a program, in pipes and in a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COMMAND = (sys.executable, "-W", "error", "-m", "graftage._cli")
HEAD = """
import threading
from graftage.exceptions import *
from graftage.hookspecs import hookimpl
from graftage.testing.echo import Echo, Pause
from graftage.types import *

def history(request):
    return " | ".join(f"{each.role}: {each.content}" for each in request.messages)
"""


class Result(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str


class Forks:
    """Commands that are forks of one process: see `forking.py`. They begin in a tenth of the time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX)
        program = Path(__file__).with_name("forking.py")
        descriptor = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(program), str(descriptor)],
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        theirs.close()
        self._socket.settimeout(60)

    def run(
        self, arguments: tuple[str, ...], text: bytes | None, folder: Path, environment: Mapping[str, str]
    ) -> Result:
        """Run a command to its end."""
        request = {"arguments": arguments, "folder": str(folder), "environment": dict(environment)}
        given, piped = os.pipe() if text is not None else (os.open(os.devnull, os.O_RDONLY), None)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        socket.send_fds(self._socket, [f"{json.dumps(request)}\n".encode()], [given, out_end, err_end])
        for each in (given, out_end, err_end):
            os.close(each)
        read: dict[int, bytes] = {}
        readers = [threading.Thread(target=_read, args=(each, read)) for each in (out, err)]
        for reader in readers:
            reader.start()
        if piped is not None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(piped, "wb") as pipe:
                pipe.write(text or b"")
        code = int(self._socket.recv(100))
        for reader in readers:
            reader.join()
        return Result(code, read[out].decode(), read[err].decode())

    def end(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait(60)


def _read(descriptor: int, found: dict[int, bytes]) -> None:
    with os.fdopen(descriptor, "rb") as pipe:
        found[descriptor] = pipe.read()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks | None]:
    if not hasattr(os, "fork"):
        yield None
        return
    made = Forks()
    yield made
    made.end()


@dataclass
class Shell:
    """Runs the command with only one provider, `fake`, in use."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = COMMAND
    children: list[Any] = field(default_factory=list)
    forks: Forks | None = None

    def install(
        self,
        source: str,
        *,
        name: str = "fake",
        group: str = "graftage.providers",
        distribution: str = "",
        requires: str = "graftage",
        summary: str = "",
    ) -> None:
        """Install a distribution with an entry point for the module's `it`."""
        module = (distribution or f"graftage-{name}").replace("-", "_")
        (self.folder / f"{module}.py").write_text(HEAD + textwrap.dedent(source), encoding="utf-8")
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        title = module.replace("_", "-")
        metadata = ["Metadata-Version: 2.1", f"Name: {title}", "Version: 1.0", f"Requires-Dist: {requires}"]
        if summary:
            metadata.append(f"Summary: {summary}")
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:it\n")

    def run(self, *arguments: str, text: str | bytes | None = None, **environment: str) -> Result:
        """Run the command with `text` piped in, or without input."""
        data = text.encode() if isinstance(text, str) else text
        # What Python reads when it starts, a fork does not read again.
        needs_start = (
            any(each.startswith("PYTHON") for each in environment) or (self.folder / "sitecustomize.py").exists()
        )
        environment = {**self.environment, **environment}
        if self.forks and self.command == COMMAND and not needs_start:
            return self.forks.run(arguments, data, self.folder, environment)
        done = subprocess.run(
            [*self.command, *arguments],
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env=environment,
            timeout=60,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def terminal(self, *arguments: str, columns: int = 80) -> Any:
        """Start the command in a terminal."""
        if sys.platform == "win32":
            pytest.skip("pexpect needs a pseudo-terminal")
        import pexpect

        child = pexpect.spawn(
            self.command[0],
            [*self.command[1:], *arguments],
            cwd=str(self.folder),
            env=self.environment,
            dimensions=(30, columns),
            encoding="utf-8",
            timeout=30,
        )
        self.children.append(child)
        return child

    def ends(self, child: Any) -> int:
        """Wait for a program in a terminal, and return its exit code."""
        import pexpect

        child.expect(pexpect.EOF)
        child.close()
        return int(child.exitstatus)


@pytest.fixture
def shell(tmp_path: Path, default_signals: None, forks: Forks | None) -> Iterator[Shell]:
    ours = (
        "GRAFTAGE_",
        "OLLAMA_",
        "HTTP_",
        "HTTPS_",
        "ALL_",
        "NO_",
        "PYTHON",
        "COLUMNS",
        "LINES",
        "FORCE_",
        "CLICOLOR",
    )
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    environment |= {
        "GRAFTAGE_CONFIG": str(tmp_path / "config.toml"),
        "GRAFTAGE_PROVIDER": "fake",
        "GRAFTAGE_MODEL": "small:1b",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))),
        "PYTHONUTF8": "1",
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "TERM": "xterm",
    }
    made = Shell(tmp_path, environment, forks=forks)
    yield made
    for child in made.children:
        child.close(force=True)
