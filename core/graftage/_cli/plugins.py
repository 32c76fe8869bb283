"""`graftage plugins`: the installed plugins and their states, and a check of a provider."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import options, show
from graftage._cli.errors import Misuse, describe
from graftage._values import broken_entry_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftage._engine.plugins import Entry

__all__ = ["app", "plugin_data", "print_plugins"]

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def plugins(context: typer.Context, as_json: options.AsJson = False) -> None:
    """List providers and plugins, and show why one is not used."""
    if context.invoked_subcommand:
        return
    from graftage._engine.plugins import Catalog

    entries = Catalog().inspect_all()
    for broken in broken_entry_points():
        show.note(show.cell(broken))
    if as_json:
        show.print_json([plugin_data(each) for each in entries])
    else:
        print_plugins(entries)


@app.command("check")
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The provider.")],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="The model to ask.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write a report as JSON.")] = None,
) -> None:
    """Test a provider against the contract, as far as that needs no recording."""
    from graftage._engine.plugins import Catalog

    Catalog().provider(name)
    try:
        from graftage.testing.conformance import checked
    except ImportError as error:
        hint = "Install it with `pip install 'graftage[testing]'`."
        raise Misuse(f"The check needs {error.name or 'pytest'}.", hint=hint) from error
    command = [sys.executable, "-m", "pytest", checked.__file__, *checked.OPTIONS]
    command += [f"--graftage-report={report.absolute()}"] if report else []
    # Another process, since the tests replace what this one uses, such as sockets.
    variables = {checked.NAME: name, checked.MODEL: model or "", "PYTHONPATH": os.pathsep.join(sys.path)}
    raise typer.Exit(subprocess.run(command, env={**os.environ, **variables}, check=False).returncode)  # noqa: S603


def print_plugins(entries: "Sequence[Entry]") -> None:
    """Print the table, and the problems below it."""
    if not entries:
        show.line("No provider or plugin is installed. `pip install graftage-ollama` brings one.")
        return
    show.print_table(
        ("name", "kind", "distribution", "version", "contract", "state", "hooks"),
        (
            (each.name, each.kind, each.distribution, each.version, each.contract, each.state, ", ".join(each.hooks))
            for each in entries
        ),
    )
    for entry in entries:
        if why := _reason(entry):
            show.line(f"\n{show.cell(entry.name)}: {show.cell(why)}")


def plugin_data(entry: "Entry") -> dict[str, Any]:
    """Convert an entry to plain data."""
    return {
        "name": entry.name,
        "kind": entry.kind,
        "distribution": entry.distribution,
        "version": entry.version,
        "contract": entry.contract,
        "hooks": list(entry.hooks),
        "state": entry.state,
        "why": _reason(entry),
    }


def _reason(entry: "Entry") -> str | None:
    if entry.error is not None:
        return describe(entry.error)
    return "GRAFTAGE_DISABLED_PLUGINS names it." if entry.state == "disabled" else None
