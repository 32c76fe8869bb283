"""Subcommands of plugins: listed from metadata, imported only when they are run."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import typer
from typer.core import TyperCommand

from graftage._cli import show
from graftage._cli.errors import ReportingGroup
from graftage._engine.faults import is_fault
from graftage._values import EntryPoint, entry_points, identity
from graftage.exceptions import PluginConflict, PluginError, PluginLoadError

__all__ = ["Commands"]

GROUP = "graftage.commands"
"""The entry-point group: names of subcommands, each with a `typer.Typer`."""


class Commands(ReportingGroup):
    """The root group: built-in commands, and those of plugins, which cannot replace a built-in one."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, built-in ones first."""
        plugged = {point.name for point in entry_points(GROUP)} - self.commands.keys() - _disabled()
        return [*super().list_commands(ctx), *sorted(plugged)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, or None, without importing a plugin."""
        builtin = super().get_command(ctx, cmd_name)
        points = [] if builtin else [point for point in entry_points(GROUP) if point.name == cmd_name]
        return _PluginCommand(points) if points else builtin


class _PluginCommand(TyperCommand):
    """Stands for a plugin's command in the list, and loads it when it is run."""

    def __init__(self, points: list[EntryPoint]) -> None:
        self._points = points
        super().__init__(points[0].name, help=_summary(points))

    def make_context(self, info_name: str | None, args: list[str], parent: object = None, **extra: Any) -> Any:
        """Load the command, and make its context."""
        self._refuse()
        return _load(self._points[0]).make_context(info_name, args, parent, **extra)

    def _refuse(self) -> None:
        """Check that the command is enabled and that one distribution alone claims it."""
        if self.name in _disabled():
            raise PluginError(
                f"The command `{self.name}` is disabled.",
                plugin=self.name,
                hint="Remove it from GRAFTAGE_DISABLED_PLUGINS.",
            )
        if len(self._points) > 1:
            origins = [_origin(point) for point in self._points]
            raise PluginConflict(
                f"The command `{self.name}` is claimed by {' and '.join(origins)}.",
                plugin=self.name,
                distributions=origins,
                hint="Uninstall one of them.",
            )


def _summary(points: list[EntryPoint]) -> str:
    """Return the summary of the distribution, or else its name."""
    summary = None
    if len(points) == 1:
        with contextlib.suppress(Exception):  # The file is missing or malformed.
            summary = points[0].dist and points[0].dist.metadata.get("Summary")
    return show.cell(summary or f"From {' and '.join(map(_origin, points))}.")


def _load(point: EntryPoint) -> Any:
    """Import the command.

    Raises:
        PluginLoadError: it cannot be imported, is not a `typer.Typer`, or needs another Graftage.
    """
    _check_core(point)
    try:
        app = point.load()
        if not isinstance(app, typer.Typer):
            raise TypeError(f"`{point.value}` must be a `typer.Typer`, not a `{type(app).__name__}`")
        return _mount(app, point.name)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise PluginLoadError(
            f"The command `{point.name}` ({_origin(point)}) could not be loaded: {type(error).__name__}: {error}.",
            plugin=point.name,
            distributions=[_origin(point)],
            hint="Fix or uninstall it.",
        ) from error


def _mount(app: typer.Typer, name: str) -> Any:
    """Convert an app to a group, without the options of a program's root."""
    root = typer.Typer(add_completion=False, rich_markup_mode=None)
    root.add_typer(app, name=name)
    group: Any = typer.main.get_command(root)
    return group.commands[name]


def _check_core(point: EntryPoint) -> None:
    from graftage._engine import plugins  # Only when a plugin's command is run

    name, version = identity(point.dist)
    plugins.check_core(
        plugins.Entry(
            name=point.name,
            kind="plugin",
            distribution=name,
            version=version,
            entry_point=point,
        )
    )


def _origin(point: EntryPoint) -> str:
    name, version = identity(point.dist)
    return f"{name} {version or ''}".rstrip() if name else "an unknown distribution"


def _disabled() -> set[str]:
    return {name.strip() for name in os.environ.get("GRAFTAGE_DISABLED_PLUGINS", "").split(",")}
