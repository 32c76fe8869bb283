"""Every error of a command becomes one message with the way out, and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from graftage._cli import show
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    GraftageError,
    ModelNotFound,
    RequestRejected,
    ResourceLimitExceeded,
    SettingsError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FAILED", "INTERRUPTED", "MISUSED", "Misuse", "Reporting", "exit_code", "tell", "way_out"]

FAILED = 1
MISUSED = 2
NEAR = 0.75
"""How alike two names must be, from 0 to 1, for one to be meant by the other."""
TAG = re.compile(r"latest|i?q\d\w*|b?f(p?16|32)|\W.*|\d.*", re.IGNORECASE)
"""What follows the colon in the name of a model, or of a path, and is no model of a provider."""
INTERRUPTED = 130
"""What a shell gives a program that Ctrl-C ended."""


class Misuse(GraftageError):
    """The command was called in a way that makes no sense."""


class Reporting(TyperGroup):
    """The root of the commands: what escapes from one of them is told here."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _reported(debug=ctx.params.get("debug") or os.environ.get("GRAFTAGE_DEBUG", "") not in ("", "0")):
            return super().invoke(ctx)


@contextlib.contextmanager
def _reported(*, debug: bool) -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        _discard_output()
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):  # Typer's own, about the usage; its class moved between releases.
            raise
        with contextlib.suppress(BrokenPipeError):
            tell(error, debug=debug)
        raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """The exit code that an error means."""
    return MISUSED if isinstance(error, (Misuse, SettingsError)) else FAILED


def tell(error: Exception, *, debug: bool = False) -> None:
    """Print an error and the way out."""
    sys.stdout.flush()
    if debug:
        show.note("".join(traceback.format_exception(error)).rstrip(), indent="")
    if isinstance(error, GraftageError):
        show.note("\n".join((error.message.removesuffix(";"), *_reasons(error))), kind="error")
        hint = way_out(error)
    else:
        show.note(f"{type(error).__name__}: {error}", kind="error")
        hint = "That is a fault of Graftage or of a plugin: run `graftage --debug ...` and report the traceback."
    if hint:
        show.note(hint, kind="hint")


def way_out(error: GraftageError) -> str | None:
    """What to do about an error, with the command or the option that does it."""
    hint = error.hint or ""
    if isinstance(error, ModelNotFound):
        if error.suggestions and not any(name in hint for name in error.suggestions):
            hint = f"{hint} Did you mean {' or '.join(f'`{name}`' for name in error.suggestions)}?"
        if error.model and not error.hint:
            name = f"{error.provider}:{error.model}" if error.provider else error.model
            hint = f"{hint} `graftage models pull {name}` downloads it."
    if meant := _provider_meant(error):
        hint = f"{meant} {hint}"
    if isinstance(error, (AdapterIncompatible, ResourceLimitExceeded)) and "--force" not in hint:
        hint = f"{hint} `--force` goes on all the same."
    return hint.strip() or None


def _provider_meant(error: GraftageError) -> str | None:
    """What to say of a model that is not there and whose name has, or is, something like a provider's."""
    model = error.model if isinstance(error, (ModelNotFound, RequestRejected)) else None
    if not model or (isinstance(error, RequestRejected) and f"`{model}`" not in error.message):
        return None
    from graftage._engine.plugins import Catalog  # noqa: PLC0415 - `graftage --help` must be quick

    installed = Catalog().names("provider")
    name, _, rest = model.removesuffix(":latest").partition(":")
    if not rest and name in installed:
        return f"`{name}` is a provider: write `{name}:`, or `{name}:MODEL`."
    if not rest or name in installed or TAG.fullmatch(rest) or not re.fullmatch(r"[a-z][\w-]*", name, re.IGNORECASE):
        return None
    if close := difflib.get_close_matches(name.lower(), installed, n=1, cutoff=NEAR):
        return f"Did you mean `{close[0]}:{rest}`?"
    if isinstance(error, ModelNotFound) and error.suggestions:
        return None
    return f"`{name}` is no provider; installed: {', '.join(f'`{each}`' for each in installed)}."


def _reasons(error: GraftageError) -> list[str]:
    """What an error about an adapter knows beyond its message."""
    reasons = error.reasons if isinstance(error, AdapterError) else ()
    return [reason for reason in reasons if reason not in error.message]


def _discard_output() -> None:
    """Let nobody write to the pipe that is gone, or Python complains when it flushes at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
