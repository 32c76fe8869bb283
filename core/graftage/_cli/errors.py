"""Turns each error of a command into one message, a hint and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from graftage._cli import show
from graftage._cli.names import instances, provider_names
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

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "MISUSED",
    "Misuse",
    "ReportingGroup",
    "describe",
    "exit_code",
    "output_complete",
    "report",
    "way_out",
]

FAILED = 1
MISUSED = 2
SIMILARITY = 0.75
"""How similar two names must be, from 0 to 1, for one to be suggested."""
TAG = re.compile(r"latest|i?q\d\w*|b?f(p?16|32)|\W.*|\d.*", re.IGNORECASE)
"""A tag or the rest of a path: what follows a colon and is not the name of a model."""
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended, as in a shell."""
RENAMED_OPTIONS = {"images": "--image", "raw": "--raw-prompt"}
"""Arguments whose option has another name."""
MODEL_COMMANDS = frozenset({"load", "loaded", "pull", "show", "unload"})
"""Methods that are commands of `graftage models`."""
QUOTED_NAME = re.compile(r"`(timeouts\.)?([a-z_]+)`")
_options: ContextVar[frozenset[str]] = ContextVar("options", default=frozenset())
"""The options of the command that runs."""


class Misuse(GraftageError):
    """The command was used in a wrong way."""


class ReportingGroup(TyperGroup):
    """A root group that reports the errors of its commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command to run, and note its options for hints."""
        name, command, rest = super().resolve_command(ctx, args)
        leaf = getattr(command, "commands", {}).get(rest[0] if rest else "", command)
        _options.set(frozenset(each for option in getattr(leaf, "params", ()) for each in option.opts))
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _report_errors(debug=ctx.params.get("debug") or os.environ.get("GRAFTAGE_DEBUG", "") not in ("", "0")):
            return super().invoke(ctx)


@contextlib.contextmanager
def _report_errors(*, debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort, show.OutputFailed):
        raise
    except Exception as error:
        if hasattr(error, "exit_code"):  # Typer's usage errors; their class moved between releases.
            raise
        report(error, debug=debug)
        raise typer.Exit(exit_code(error)) from None


@contextlib.contextmanager
def output_complete() -> Iterator[None]:
    """Write all output at the end of the block, or exit with an error."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except show.OutputFailed as failed:
        show.discard(sys.stdout)
        if not isinstance(failed.__cause__, BrokenPipeError):  # A reader such as `head` stopped on purpose.
            show.note(f"Standard output cannot be written: {failed}.", kind="error")
        sys.exit(FAILED)


def exit_code(error: Exception) -> int:
    """Return the exit code for an error."""
    return MISUSED if isinstance(error, (Misuse, SettingsError)) else FAILED


def report(error: Exception, *, debug: bool = False) -> None:
    """Print an error and its hint."""
    sys.stdout.flush()
    if debug:
        show.note("".join(traceback.format_exception(error)).rstrip(), indent="")
    if isinstance(error, GraftageError):
        show.note("\n".join((error.message.removesuffix(";"), *_further_reasons(error))), kind="error")
        hint = way_out(error)
    else:
        show.note(f"{type(error).__name__}: {error}", kind="error")
        hint = "This is a bug in Graftage or in a plugin: run `graftage --debug ...` and report the traceback."
    if hint:
        show.note(hint, kind="hint")


def describe(error: Exception) -> str:
    """Return an error and its hint on one line."""
    if isinstance(error, GraftageError):
        return " ".join(filter(None, (error.message, way_out(error))))
    return f"{type(error).__name__}: {error}"


def way_out(error: GraftageError) -> str | None:
    """Return what to do about an error, in the words of the command."""
    hint = QUOTED_NAME.sub(lambda found: _in_command_words(found, error), error.hint or "")
    if isinstance(error, ModelNotFound):
        if error.suggestions and not any(name in hint for name in error.suggestions):
            hint = f"{hint} Did you mean {' or '.join(f'`{name}`' for name in error.suggestions)}?"
        if error.model and not error.hint:
            name = f"{error.provider}:{error.model}" if error.provider else error.model
            hint = f"{hint} `graftage models pull {name}` downloads it."
    if provider_hint := _provider_hint(error):
        hint = f"{provider_hint} {hint}"
    if isinstance(error, (AdapterIncompatible, ResourceLimitExceeded)) and "--force" not in hint:
        hint = f"{hint} `--force` overrides this."
    return hint.strip() or None


def _in_command_words(found: re.Match[str], error: GraftageError) -> str:
    """Replace an argument by its option, a method by its command, and a setting by its variable."""
    part, name = found.groups()
    option = RENAMED_OPTIONS.get(name, f"--{name.replace('_', '-')}")
    if not part and option in _options.get():
        return f"`{option}`"
    if name in MODEL_COMMANDS:
        return f"`graftage models {name}`"
    from graftage.settings import Settings

    provider = getattr(error, "provider", None)
    prefix = "GRAFTAGE_"
    if provider in [each.name for each in instances()]:  # The address of another server is not for it.
        prefix += f"{provider}_".upper().replace("-", "_")
    if part:
        return f"{prefix}TIMEOUTS__{name.upper()}"
    if name == "timeout":
        return f"{prefix}TIMEOUTS__TOTAL"
    if name in Settings.model_fields:
        return f"{prefix}{name.upper()}"
    if provider and found.string[: found.start()].endswith("the setting "):
        return f"GRAFTAGE_{provider}_{name}".upper().replace("-", "_")
    return found[0]


def _provider_hint(error: GraftageError) -> str | None:
    """Explain that the name of a missing model is, or starts with, something like a provider's name."""
    model = error.model if isinstance(error, (ModelNotFound, RequestRejected)) else None
    if not model or (isinstance(error, RequestRejected) and f"`{model}`" not in error.message):
        return None
    installed = provider_names()
    name, _, rest = model.removesuffix(":latest").partition(":")
    if not rest and name in installed:
        return f"`{name}` is a provider: write `{name}:`, or `{name}:MODEL`."
    if not rest or name in installed or TAG.fullmatch(rest) or not re.fullmatch(r"[a-z][\w-]*", name, re.IGNORECASE):
        return None
    if close := difflib.get_close_matches(name.lower(), installed, n=1, cutoff=SIMILARITY):
        return f"Did you mean `{close[0]}:{rest}`?"
    if isinstance(error, ModelNotFound) and error.suggestions:
        return None
    return f"`{name}` is not a provider. Installed: {', '.join(f'`{each}`' for each in installed)}."


def _further_reasons(error: GraftageError) -> list[str]:
    """Return the reasons of an adapter error that are not in its message."""
    reasons = error.reasons if isinstance(error, AdapterError) else ()
    return [reason for reason in reasons if reason not in error.message]
