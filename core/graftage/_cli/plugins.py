"""`graftage plugins`: the installed plugins and their states."""

from typing import TYPE_CHECKING, Any

from graftage._cli import options, show
from graftage._cli.errors import describe
from graftage._values import broken_entry_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftage._engine.plugins import Entry

__all__ = ["plugin_data", "plugins", "print_plugins"]


def plugins(as_json: options.AsJson = False) -> None:
    """List providers and plugins, and show why one is not used."""
    from graftage._engine.plugins import Catalog

    entries = Catalog().inspect_all()
    for broken in broken_entry_points():
        show.note(show.cell(broken))
    if as_json:
        show.print_json([plugin_data(each) for each in entries])
    else:
        print_plugins(entries)


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
