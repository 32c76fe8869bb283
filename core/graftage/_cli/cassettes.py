"""`graftage cassettes`: check, compare and read recorded exchanges."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftage._cli import options, show
from graftage._cli.errors import FAILED, Misuse

if TYPE_CHECKING:
    from graftage.testing.drift import Difference
    from graftage.testing.interactions import Interaction, RecordedRequest

__all__ = ["app"]

app = typer.Typer(help="Check, compare and read cassettes.", no_args_is_help=True, rich_markup_mode=None)
FOLDER = "cassettes"
INDENT = 12
"""Columns for the name of who speaks."""
SHOWN = 400
"""Characters of a body that is not a conversation."""

Paths = Annotated[
    list[Path] | None, typer.Argument(metavar="[PATH]...", help="Cassettes, or folders of them. Default: `cassettes`.")
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A cassette.")]


@app.callback()
def _root() -> None:
    """Check that the packages for cassettes are here."""
    try:
        import graftage.testing.checks  # noqa: F401
    except ModuleNotFoundError as error:
        raise Misuse(
            f"Cassettes need the package `{error.name}`.", hint="Install it: `pip install 'graftage[testing]'`."
        ) from None


# --- Checks ----------------------------------------------------------------------------------------------------------


@app.command("lint")
def lint(paths: Paths = None, as_json: options.AsJson = False) -> None:
    """Find secrets, names of machines, cut streams, unknown keys and what cannot be read.

    Exit code: 0 if there is no error, 1 if there is one.
    """
    from graftage.testing import checks

    files = _files(paths)
    found = list(checks.lint(files))
    if as_json:
        show.print_json([asdict(each) for each in found])
    else:
        for each in found:
            place = f"{each.path}:{each.line}" if each.line else str(each.path)
            where = f"interaction {each.interaction}: " if each.interaction else ""
            show.line(show.cell(f"{place}: {each.level}: {where}{each.message} {each.hint}"))
        errors = sum(each.level == "error" for each in found)
        _sum_up(
            f"{_count(len(files), 'cassette')}: {_count(errors, 'error')}, {_count(len(found) - errors, 'warning')}."
        )
    _exit(failed=any(each.level == "error" for each in found))


@app.command("stale")
def stale(
    paths: Paths = None,
    *,
    server: Annotated[
        str | None, typer.Option("--server", metavar="NAME VERSION", help="The current server, such as `Ollama 0.9.4`.")
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="DAYS", help="How old they may be, such as 90d.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option("--provider", "-p", help="Ask the server of this provider for its version.")
    ] = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Find cassettes of another server or client, old ones, and those of unknown origin.

    Exit code: 0 if all are fresh, 1 if one is stale.
    """
    from graftage.testing import checks

    found = list(checks.stale(_files(paths), server=server or _live(provider, host), days=_days(after)))
    if as_json:
        show.print_json([asdict(each) for each in found])
    else:
        for each in found:
            show.line(show.cell(f"{each.path}: {'; '.join(each.reasons)}"))
        _sum_up(f"{_count(len(found), 'cassette')} must be recorded again." if found else "All are fresh.")
    _exit(failed=bool(found))


def _live(provider: str | None, host: str | None) -> str | None:
    """Return the version of a provider's server."""
    if provider is None and host is None:
        return None
    with options.open_to_manage(None, provider, host=host) as client:
        health = client.health(max_age=0)
        if health.error is not None:
            raise health.error
        if health.version is None:
            raise Misuse(f"The server of `{client.provider}` does not tell its version.", hint="Give it as `--server`.")
        return health.version


def _days(after: str | None) -> int | None:
    if after is None:
        return None
    if not (found := re.fullmatch(r"(\d{1,6}) ?d?", after)):
        raise Misuse(f"`--after {after}` is invalid.", hint="Give a number of days, such as `90d`.")
    return int(found[1])


@app.command("verify")
def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Cassettes, or folders of them.")],
    *,
    host: Annotated[str, typer.Option("--host", help="Address of the server to ask. No other is.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Also send what may change the server, such as a pull or a deletion.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Send recorded requests to a live server, and show what changed in its API.

    Exit code: 0 if nothing changed but texts, 1 if something did.
    """
    from graftage.testing import drift

    found = [(path, each) for path in _files(paths) for each in drift.verify(path, host, unsafe=everything)]
    drifted = [(path, each) for path, each in found if each.is_drift]
    if as_json:
        show.print_json([{"path": path, **asdict(each), "is_drift": each.is_drift} for path, each in found])
    else:
        for path, each in drifted:
            show.line(show.cell(f"{path}: interaction {each.interaction}: {each.request}: {_in_words(each)}"))
        kinds = Counter(each.kind for _, each in found)
        _sum_up(
            f"{_count(len(drifted), 'change')} of the API; other texts in {_count(kinds['text'], 'response')}; "
            f"{_count(kinds['skipped'], 'request')} not sent."
        )
    _exit(failed=bool(drifted))


def _in_words(found: "Difference") -> str:
    if found.kind == "new":
        return f"the field `{found.field}` ({found.now}) is new"
    if found.kind == "lost":
        return f"the field `{found.field}` ({found.recorded}) is missing"
    what = {"status": "the status", "type": "the content type"}.get(
        found.kind, f"the type of the field `{found.field}`"
    )
    return f"{what} was {found.recorded}, now {found.now}"


# --- Reading ---------------------------------------------------------------------------------------------------------


@app.command("show")
def show_cassette(file: File) -> None:
    """Show a cassette as a conversation."""
    from graftage.testing.cassettes import Cassette

    for number, each in enumerate(Cassette(file).interactions, 1):
        if number > 1:
            show.line("")
        show.line(show.cell(_headline(number, each)))
        for who, text in (*_asked(each.request), *_answered(each)):
            _say(who, text)


def _headline(number: int, interaction: "Interaction") -> str:
    request, facts = interaction.request, interaction.recorded
    status = f"{interaction.status} {interaction.reason}".strip() if interaction.status else "no response"
    known = [each for each in (facts.server, facts.model, facts.date) if each]
    return f"{number}. {request.method} {request.uri} → {status}{''.join(f' · {each}' for each in known)}"


def _asked(request: "RecordedRequest") -> Iterator[tuple[str, str]]:
    from graftage.testing.chats import to_chat

    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        if request.body:
            yield "sent", _shorten(request.body.decode("utf-8", "replace"))
        return
    chat = to_chat(body)
    for message in chat["messages"] if chat else ():
        images = f" [{_count(len(message['images']), 'image')}]" if message["images"] else ""
        calls = "".join(f"\n{_call(*each)}" for each in message["tool_calls"] if isinstance(each, list))
        yield str(message["role"]), f"{message['content']}{images}{calls}".strip("\n")
    if chat and chat["tools"]:
        yield "tools", ", ".join(str(each[0]) if isinstance(each, list) else str(each) for each in chat["tools"])
    for name in () if chat else ("system", "prompt"):
        if isinstance(body.get(name), str):
            yield name, body[name]
    rest = {
        name: each
        for name, each in body.items()
        if name not in ("messages", "tools", *(() if chat else ("system", "prompt")))
    }
    if rest:
        yield "options", _shorten(json.dumps(rest, ensure_ascii=False))


def _answered(interaction: "Interaction") -> Iterator[tuple[str, str]]:
    from graftage.testing._bodies import reply_of

    reply = reply_of(interaction.body)
    if reply.thinking:
        yield "thinking", reply.thinking
    if reply.text:
        yield "assistant", reply.text
    for name, arguments in reply.calls.values():
        yield "calls", _call(name, arguments)
    if reply.error:
        yield "error", reply.error
    elif not (reply.text or reply.thinking or reply.calls) and interaction.body:
        yield "received", _shorten(interaction.body.decode("utf-8", "replace"))
    if interaction.fault:
        yield "fault", f"{interaction.fault.kind}: {interaction.fault.message}"
    if interaction.stopped:
        yield "stopped", "The reader stopped before the end."
    usage = [
        f"{count} tokens {way}" for count, way in ((reply.input_tokens, "in"), (reply.output_tokens, "out")) if count
    ]
    ended = [f"ended by {reply.finish_reason}"] if reply.finish_reason else []
    chunks = [_count(len(interaction.chunks), "chunk")] if interaction.chunks else []
    times = interaction.times
    timed = [f"the first after {times[0]:.2f} s, the last after {times[-1]:.2f} s"] if times else []
    if facts := [*usage, *ended, *chunks, *timed]:
        yield "", ", ".join(facts)


def _call(name: object, arguments: object) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{name}({text})"


def _say(who: str, text: str) -> None:
    """Print what somebody says, indented, so that no text can pose as another speaker."""
    lines = show.escape(text).split("\n")
    for place, line in enumerate(lines):
        show.line(f"  {show.cell(who) if not place else '':<{INDENT}}{line}".rstrip())


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


@app.command("diff")
def diff(first: File, second: File) -> None:
    """Show how the requests of two cassettes differ.

    Exit code: 0 if they are equal, 1 if they differ.
    """
    from graftage.testing.cassettes import Cassette
    from graftage.testing.matching import Matching

    matching = Matching()
    left, right = ([each.request for each in Cassette(file).interactions] for file in (first, second))
    for request in list(left):
        equal = next((each for each in right if matching.key(each) == matching.key(request)), None)
        if equal is not None:
            left.remove(request)
            right.remove(equal)
    for request in left:
        nearest = min(right, key=lambda each: len(list(matching.differences(request, each))), default=None)
        if nearest is None or nearest.method != request.method or nearest.path != request.path:
            show.line(show.cell(f"only in {first}: {request.method} {request.target}"))
            continue
        right.remove(nearest)
        show.line(show.cell(f"{request.method} {request.target}: {'; '.join(matching.differences(request, nearest))}"))
    for request in right:
        show.line(show.cell(f"only in {second}: {request.method} {request.target}"))
    _exit(failed=bool(left or right))


@app.command("rerun")
def rerun(
    file: File,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    adapter: options.Adapters = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask what a `Replay` recorded again, of any model, and show what changed.

    Exit code: 0 if nothing changed, 1 if something did.
    """
    from graftage.testing.reruns import rerun

    found = []
    with options.open_to_manage(model, provider, host=host) as client:
        if adapter:
            client.use_adapter(options.read_adapters(adapter))
        for each in rerun(file, client):
            found.append(each)
            for line in () if as_json else str(each).splitlines():
                show.line(show.cell(line))
    if as_json:
        show.print_json([{"operation": e.operation, "prompt": e.prompt, "changes": e.changes} for e in found])
    _exit(failed=any(each.changes for each in found))


# --- Shared ----------------------------------------------------------------------------------------------------------


def _files(paths: list[Path] | None) -> list[Path]:
    """Return the cassettes that the arguments name."""
    from graftage.testing import checks

    paths = paths or [Path(FOLDER)]
    for each in paths:
        if not each.exists():
            raise Misuse(f"{each} does not exist.", hint="Name cassettes, or folders of them.")
    return list(checks.paths_of(paths))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _exit(*, failed: bool) -> None:
    if failed:
        raise typer.Exit(FAILED)


def _sum_up(text: str) -> None:
    """Print a note below the results."""
    sys.stdout.flush()
    show.note(text)
