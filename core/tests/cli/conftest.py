"""The `graftage` command, run as its users run it: as a program of its own, in pipes and in a real terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    """What became of a command."""

    code: int
    out: str
    err: str


@dataclass
class Shell:
    """Runs the command where nothing but the given provider, `fake`, is meant to be used."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = COMMAND
    children: list[Any] = field(default_factory=list)

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
        """Put a distribution onto the path, with an entry point of that name for the module's `it`."""
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
        """Run the command with `text` piped in, or with no input at all."""
        done = subprocess.run(
            [*self.command, *arguments],
            input=text.encode() if isinstance(text, str) else text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env={**self.environment, **environment},
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
        """The exit code of a program in a terminal, once it is over."""
        import pexpect

        child.expect(pexpect.EOF)
        child.close()
        return int(child.exitstatus)


@pytest.fixture
def shell(tmp_path: Path, heed_signals: None) -> Iterator[Shell]:
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
    made = Shell(tmp_path, environment)
    yield made
    for child in made.children:
        child.close(force=True)
