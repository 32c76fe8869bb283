"""`graftage providers`: compares the installed providers."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from graftage._cli import options, show
from graftage._cli.errors import describe
from graftage._cli.names import instances
from graftage._cli.parallel import run_all
from graftage._cli.scan import scan
from graftage.exceptions import PluginError

if TYPE_CHECKING:
    from graftage import Client
    from graftage._engine.plugins import Entry

__all__ = ["providers"]

TIMEOUT = 10.0
"""Seconds for each provider; all are asked at the same time."""
GRACE = 1.0
"""Seconds until a provider that exceeds its limit is left out."""
REPORT = "graftage-report.json"
MAX_REPORT = 1024 * 1024


COLUMN = 20
"""Columns of the terminal for each, and for the words before them."""


@dataclass(kw_only=True)
class Finding:
    """What was found out about a provider or an instance; None is unknown."""

    name: str
    instance_of: str | None = None
    """The provider of an instance."""
    distribution: str | None
    version: str | None
    state: str = "available"
    health: str = "unknown"
    """`well`, `not well` or `unknown`."""
    address: str | None = None
    key: str | None = None
    """Where its key comes from."""
    server: str | None = None
    """The server's software, if the provider serves several."""
    server_version: str | None = None
    models: list[str] | None = None
    features: list[str] | None = None
    tests: str | None = None
    """What became of the tests of the contract, by the report in its package."""
    problems: list[str] = field(default_factory=list)
    """What went wrong, each with a hint."""


def providers(
    *,
    find: Annotated[bool, typer.Option("--scan", help="Find the servers that listen on this machine.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Limit for each. Default: 10, with --scan 5."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare the installed providers and the instances: their health, features and models."""
    if find:
        scan(timeout, as_json=as_json)
    else:
        _compare(timeout or TIMEOUT, as_json=as_json)


def _compare(timeout: float, *, as_json: bool) -> None:
    found = _inspect_all(_findings(), timeout)
    if as_json:
        show.print_json([asdict(each) for each in found])
    elif not found:
        show.line("No provider is installed. `pip install graftage-ollama` brings one.")
    else:
        _print(found)


def _findings() -> list[Finding]:
    """Return what is known of each provider and each instance before anything is asked."""
    from graftage._engine.plugins import Catalog

    entries = sorted((each for each in Catalog().entries if each.kind == "provider"), key=lambda entry: entry.name)
    of = {entry.name: entry for entry in entries}
    return [
        *(_finding(entry, tests=_tests(entry)) for entry in entries),
        *(_finding(of[each.provider], name=each.name, instance_of=each.provider) for each in instances()),
    ]


def _finding(entry: "Entry", **more: str | None) -> Finding:
    known: dict[str, Any] = {"name": entry.name, "distribution": entry.distribution, "version": entry.version}
    return Finding(**{**known, "state": entry.state, **more})


def _inspect_all(found: Sequence[Finding], timeout: float) -> list[Finding]:
    """Inspect all at the same time; a provider that exceeds its limit is left out."""
    ended = run_all([partial(_inspect, each, timeout) for each in found], timeout + GRACE)
    for each, in_time in zip(found, ended, strict=True):
        if not in_time:
            each.problems.append(f"It did not answer within {timeout:g} s.")
    return [replace(each) for each in found]  # A copy, which late results cannot change.


def _tests(entry: "Entry") -> str | None:
    """Return how many tests of the contract had which outcome, from `graftage-report.json` in a distribution."""
    dist = entry.entry_point.dist if entry.entry_point else None
    try:
        files = [each for each in dist.files or () if each.name == REPORT] if dist else []
        providers = json.loads(files[0].locate().read_bytes()[:MAX_REPORT])["providers"] if files else []
        report = next((each for each in providers if each["provider"] == entry.name), None)
        return ", ".join(f"{count} {outcome}" for outcome, count in _outcomes(report)) if report else None
    except Exception as error:  # noqa: BLE001 - a broken file of one distribution must not affect the others
        return f"unknown: its report cannot be read ({type(error).__name__})"


def _outcomes(report: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    return Counter(str(each["outcome"]) for each in report["tests"].values()).most_common()


def _inspect(finding: Finding, timeout: float) -> None:
    """Fill in a finding; an error of the provider becomes a problem in it."""
    if finding.state == "disabled":
        finding.problems.append(f"GRAFTAGE_DISABLED_PLUGINS names {finding.instance_of or 'it'}.")
        return
    try:
        with options.open_client(None, finding.name) as client:
            finding.state = "loaded"
            _ask(client, finding, timeout)
    except Exception as error:  # noqa: BLE001 - one provider must not affect the others
        if isinstance(error, PluginError):
            finding.state = "quarantined"
        finding.problems.append(describe(error))


def _ask(client: "Client", finding: Finding, timeout: float) -> None:
    from graftage.settings import without_user

    capabilities = client.capabilities()
    finding.features = sorted(capabilities.features)
    finding.address = without_user(client.address) or None
    finding.key = client.origins.get("api_key")
    health = client.health("api", max_age=0, timeout=timeout)
    finding.health = "well" if health.ok else "not well"
    finding.server, finding.server_version = health.server, health.version
    if health.error is not None:
        finding.problems.append(describe(health.error))
    elif "list_models" in capabilities.features:
        finding.models = [model.name for model in client.models(timeout=timeout)]


def _print(found: Sequence[Finding]) -> None:
    """Print a column for each, in several tables on a narrow terminal, and the problems below."""
    columns = max(1, show.console().width // COLUMN - 1)
    for start in range(0, len(found), columns):
        if start:
            show.line("")
        _print_columns(found[start : start + columns])
    for each in found:
        for problem in each.problems:
            show.line(f"\n{show.cell(each.name)}: {show.cell(problem)}")


def _print_columns(found: Sequence[Finding]) -> None:
    rows = [
        ("instance of", *(each.instance_of for each in found)),
        ("distribution", *(" ".join(filter(None, (each.distribution, each.version))) for each in found)),
        ("state", *(each.state for each in found)),
        ("tests", *(each.tests for each in found)),
        ("health", *(each.health for each in found)),
        ("address", *((each.address or "").removeprefix("http://") for each in found)),
        ("key", *(each.key for each in found)),
        ("server", *(each.server for each in found)),
        ("version", *(each.server_version for each in found)),
        ("models", *(show.some(each.models) for each in found)),
    ]
    known = [row for row in rows if any(row[1:])]
    support = [(feature, *(_support(each, feature) for each in found)) for feature in _features(found)]
    show.print_table(("", *(each.name for each in found)), [*known, *support])


def _features(found: Iterable[Finding]) -> list[str]:
    """Return the features of all providers in the order of the contract, unknown ones last."""
    from graftage.types import Feature

    able = {feature for each in found for feature in each.features or ()}
    known = [feature for feature in get_args(Feature) if feature in able]
    return [*known, *sorted(able.difference(known))]


def _support(finding: Finding, feature: str) -> str | None:
    if finding.features is None:
        return None
    return "yes" if feature in finding.features else "no"
