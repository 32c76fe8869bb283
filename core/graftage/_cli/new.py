"""`graftage new`: begin a distribution with a provider."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftage._cli import show
from graftage._cli.errors import Misuse
from graftage._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["app"]

app = typer.Typer(help="Begin a distribution with a provider.", no_args_is_help=True, rich_markup_mode=None)
TEMPLATES = Path(__file__).with_name("templates")
"""The files to write. In them, `NAME` stands for the name, and `graftage_NAME` for the module."""


class Server(StrEnum):
    """What the provider asks for replies."""

    FUNCTION = "function"
    OPENAI = "openai"


@app.command("provider")
def new_provider(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The provider's name, such as `my-server`.")],
    *,
    server: Annotated[
        Server, typer.Option("--server", help="What it asks: a function in Python, or a server with OpenAI's chat API.")
    ] = Server.FUNCTION,
    into: Annotated[
        Path, typer.Option("--into", metavar="FOLDER", exists=True, file_okay=False, help="Where to create its folder.")
    ] = Path(),
) -> None:
    """Write a provider that works, with the tests that it must pass: the folder `graftage-NAME`."""
    _check_name(name)
    folder = into / f"graftage-{name}"
    try:
        folder.mkdir()
        for path, content in _files(name, server):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    except FileExistsError as error:
        raise Misuse(f"`{folder}` already exists.", hint="Choose another name, or another folder `--into`.") from error
    except OSError as error:
        raise Misuse(
            f"`{folder}` cannot be written: {error.strerror or error}.", hint="Name another folder with `--into`."
        ) from error
    show.line(f"{show.cell(folder)} is written. Next:\n")
    show.line(f"  cd {show.cell(shlex.quote(str(folder)))}")
    show.line('  pip install -e ".[test]"')
    show.line("  pytest")
    show.line(f'  graftage chat -m {name}:{"small" if server is Server.FUNCTION else "MODEL"} "Hello"')


def _check_name(name: str) -> None:
    """Refuse a name that cannot be used.

    Raises:
        Misuse: it is invalid or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name.startswith("graftage-"):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).removeprefix("graftage-").strip("-")
        hint = "Write lower-case letters, digits, and hyphens between them"
        near = f", such as `{plain}`" if re.match(r"[a-z]", plain) else ""
        raise Misuse(f"`{name}` is not a valid name for a provider.", hint=f"{hint}{near}.")
    from graftage._engine.choosing import AUTO
    from graftage._engine.plugins import Catalog
    from graftage.settings import RESERVED, Settings

    if name in {AUTO, *Settings.model_fields, *map(str.lower, RESERVED)}:
        raise Misuse(f"`{name}` is a word of Graftage's settings.", hint="Choose another name.")
    if entry := next((each for each in Catalog().entries if each.name == name), None):
        raise Misuse(f"`{name}` is the name of {entry.origin}.", hint="Choose another name, or uninstall that one.")


def _files(name: str, server: Server) -> Iterator[tuple[str, bytes]]:
    """Yield the path and the content of each file."""
    module = f"graftage_{name.replace('-', '_')}"
    major, minor = __version__.split(".")[:2]
    requirement = f"graftage{'[http]' if server is Server.OPENAI else ''}>={major}.{minor},<{int(major) + 1}"
    words = {
        "graftage_NAME": module,
        "test_NAME": f"test_{module.removeprefix('graftage_')}",
        "VARIABLE": name.replace("-", "_").upper(),
        "REQUIREMENT": requirement,
        "NAME": name,
    }
    own = TEMPLATES / server
    for path, template in {
        "pyproject.toml": TEMPLATES / "pyproject.toml",
        "README.md": own / "README.md",
        f"{module}/__init__.py": own / "provider.py",
        f"tests/{words['test_NAME']}.py": own / "suite.py",
    }.items():
        text = template.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(word, value)
        yield path, text.encode()
    yield f"{module}/py.typed", b""
    for cassette in sorted(own.glob("cassettes/*")):
        yield f"tests/cassettes/{cassette.name}", cassette.read_bytes()
