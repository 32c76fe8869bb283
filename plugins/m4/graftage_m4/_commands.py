"""`graftage m4`: plan what fits on a Mac, watch its readings, and record them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage.exceptions import GraftageError

if TYPE_CHECKING:
    import graftage
    from graftage.footprint import Shape
    from graftage_m4._plan import Mac, Row
    from graftage_m4._policy import Policy
    from graftage_m4._state import Watch

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What fits on a Mac with Apple silicon.")

Machine = Annotated[Path | None, typer.Option("--machine", metavar="FILE", help="Act as the Mac in a machine file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Every = Annotated[float, typer.Option("--every", min=0.5, help="Seconds between two readings.")]

MAX_MODELS = 40
"""Rows of a plan for all models."""
NAME_A_MACHINE = "Name a machine file with `--machine`."


class NoMac(GraftageError):
    """This computer is not a Mac with Apple silicon, or it cannot be read."""


def _policy(machine: Path | None, *, hint: str = NAME_A_MACHINE, **settings: Any) -> Policy:
    import graftage_m4

    given = {name: value for name, value in {"machine": machine, **settings}.items() if value is not None}
    policy = graftage_m4.M4(**given).policy()
    if policy is None:
        raise NoMac("This computer is not a Mac with Apple silicon.", hint=hint)
    return policy


def _read_mac(policy: Policy) -> Mac:
    from graftage_m4._plan import read_mac

    found = read_mac(policy)
    if found is None:
        raise NoMac("The memory of this Mac cannot be read.", hint="`graftage m4 watch` shows which readings fail.")
    return found


# --- plan ------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Default: all models.")] = None,
    *,
    machine: Machine = None,
    profile: Annotated[str | None, typer.Option(help="dedicated, shared, strict or relaxed.")] = None,
    kv_type: Annotated[str | None, typer.Option(help="The server's cache type: f16, q8_0 or q4_0.")] = None,
    provider: Annotated[
        str | None, typer.Option("--provider", "-p", help="Plan for the models of this provider.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address of the server.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw footprint against window.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Succeed even if a named model does not fit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which models fit with which windows, how fast they will be, and how long a full prompt takes to read.

    The exit code is 1 if a named model fits with no window.
    """
    from graftage_m4 import _plan

    policy = _policy(machine, profile=profile, kv_type=kv_type)
    mac = _read_mac(policy)
    shapes = _shapes(models or [], provider, host)
    table = _plan.rows(shapes, mac, policy)
    if plot is not None:
        plot.write_text(_plan.picture(shapes, mac, policy), encoding="utf-8")
    _print_plan(table, mac, as_json=as_json)
    if models and not force and any(row.largest is None for row in table):
        raise typer.Exit(1)


def _shapes(names: list[str], provider: str | None, host: str | None) -> dict[str, Shape]:
    """Read the shapes of a provider's models, by name."""
    import graftage

    settings: dict[str, Any] = {"host": host} if host else {}
    with graftage.connect(provider, **settings) as llm:
        return dict(_each_shape(llm, names))


def _each_shape(llm: graftage.Client, names: list[str]) -> Iterator[tuple[str, Shape]]:
    from graftage.footprint import read_shape
    from graftage_m4._state import listed_size

    models = llm.models()
    for name in names or [info.name for info in models][:MAX_MODELS]:
        info = llm.show(name)
        shape = read_shape(info, listed_size(models, name, info.name))
        if shape is not None:
            yield name, shape
        else:
            typer.echo(f"{name}: the size is not known", err=True)


def _print_plan(table: list[Row], mac: Mac, *, as_json: bool) -> None:
    from graftage_m4 import _plan
    from graftage_m4._machine import gb

    if as_json:
        budget = {"static": mac.budget.static, "cap": mac.budget.cap, "source": mac.budget.source, "live": mac.live}
        content = {"machine": mac.title, "budget": budget, "models": [row.to_dict() for row in table]}
        typer.echo(json.dumps(content, indent=2))
        return
    from rich.table import Table

    live = "unknown" if mac.live is None else gb(mac.live)
    typer.echo(f"{mac.title}\nbudget {mac.budget.description}; free for models now: {live}")
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("model", "weights", "tok/s", *map(_plan.short, _plan.WINDOWS)):
        view.add_column(name)
    for cells in _plan.lines(table):
        view.add_row(*map(_styled, cells))
    _console().print(view)
    for row in table:
        for note in row.notes:
            typer.echo(f"{_plan.printable(row.model)}: {note}")


def _styled(text: str) -> Any:
    from rich.text import Text

    style = {"fits": "green", "tight": "yellow", "no": "red"}.get(text.partition(" ")[0], "")
    return Text(text, style=style)


def _console() -> Any:
    import sys

    from rich.console import Console

    # Do not wrap lines in a file or a pipe.
    return Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False, emoji=False)


# --- watch -----------------------------------------------------------------------------------------------------------


@app.command()
def watch(
    machine: Machine = None,
    every: Every = 2.0,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Stop after so many readings.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the readings of this Mac as they change, and what they allow."""
    from graftage_m4._state import Watch

    policy, rules = _policy(machine), Watch()
    turn = 0
    while count is None or turn < count:
        if turn:
            time.sleep(every)
        turn += 1
        moment = _moment(policy, rules)
        typer.echo(json.dumps(moment) if as_json else _line(moment))


def _moment(policy: Policy, watch: Watch) -> dict[str, Any]:
    """Collect readings, budget and rules; unknown values are `None`, with the reason in `unknown`."""
    from graftage_m4._plan import read_mac

    readings = policy.collector.readings()
    rules = watch.rules(readings)
    mac = read_mac(policy)
    return {
        "at": round(readings.at, 1),
        "pressure": readings.pressure,
        "available_percent": readings.available_percent,
        "swap_used": readings.swap_used,
        "thermal": readings.thermal,
        "low_power": readings.low_power,
        "sleep_minutes": readings.sleep_minutes,
        "budget": mac.budget.static if mac else None,
        "free_for_models": mac.live if mac else None,
        "concurrency": rules.concurrency,
        "loads": "refused" if rules.refuse else f"to {rules.window} tokens" if rules.window else "allowed",
        "why": list(rules.reasons),
        "unknown": dict(readings.unknown),
    }


def _line(moment: dict[str, Any]) -> str:
    from graftage_m4._machine import gb

    def field(name: str, unit: str = "") -> str:
        return "unknown" if moment[name] is None else f"{moment[name]}{unit}"

    def size(name: str) -> str:
        return "unknown" if moment[name] is None else gb(moment[name])

    sleep = " · this Mac may sleep" if moment["sleep_minutes"] else ""
    why = f" ({'; '.join(moment['why'])})" if moment["why"] else ""
    return (
        f"pressure {field('pressure')} · available {field('available_percent', ' %')} · swap {size('swap_used')} · "
        f"thermal {field('thermal')} · low power {field('low_power')} · budget {size('budget')} · "
        f"free for models {size('free_for_models')} · loads {moment['loads']}{why}{sleep}"
    )


# --- record ----------------------------------------------------------------------------------------------------------


@app.command()
def record(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: standard output.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, max=3600, help="How many samples.")] = 1,
    every: Every = 5.0,
    title: Annotated[str, typer.Option("--title", help="The title of the file.")] = "",
) -> None:
    """Write a machine file: the readings of this Mac, without serial numbers or names."""
    from graftage_m4._machine import record as take

    hint = "Record on the Mac itself; use the file elsewhere with `graftage m4 plan --machine FILE`."
    taken = take(_policy(None, hint=hint).collector.runner, samples=samples, every=every)
    content = {"format": taken.format, "title": title, **taken.model_dump(exclude_defaults=True)}
    text = json.dumps(content, indent=1) + "\n"
    if file is None:
        typer.echo(text, nl=False)
    else:
        file.write_text(text, encoding="utf-8")
        typer.echo(f"{len(taken.readings)} readings in {file}", err=True)
