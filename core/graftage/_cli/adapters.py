"""`graftage adapters`: find, download, check, load and convert LoRA adapters."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftage._cli import errors, options, show
from graftage._cli.errors import FAILED, Misuse
from graftage._cli.progress import Waiting
from graftage.exceptions import AdapterIncompatible, AdapterInvalid, GraftageError

if TYPE_CHECKING:
    from graftage import Client
    from graftage.types import Adapter, AdapterInfo, Warmed

__all__ = ["app"]

app = typer.Typer(
    help="Find, download, check, load and convert LoRA adapters.", no_args_is_help=True, rich_markup_mode=None
)
FITS = {"compatible": "yes", "incompatible": "no", "unsupported": "unsupported", "unknown": "unknown"}
"""The words for verdicts in a table."""
FACTS_TIMEOUT = 10.0
"""Seconds for the facts of the model, without which the list is shown, too."""
UNDECIDED = 3
"""The exit code of `check` if it is unknown whether the adapter fits."""
SHOWN_DIGEST = 19
"""Characters of a digest in a table: `sha256:` and twelve more."""
DAY = 86400.0
LORA, FOLDERS = "lora", "GRAFTAGE_LORA_FOLDERS"
"""The plugin of `graftage-lora`, and the variable that names its folders."""

Reference = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A name, a path, or any other reference that a plugin knows.")
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


@app.command("list")
def list_adapters(
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """List the known adapters, and whether each fits.

    Plugins say which they know of; `graftage-lora` looks in the folders of GRAFTAGE_LORA_FOLDERS. Without a server the
    list lacks only whether they fit the model in use.
    """
    found, judged = _list(model, provider, host)
    if as_json:
        show.print_json([asdict(each) for each in found])
    else:
        _print_list([each for each in found if each.name], judged=judged)
        for each in found:
            if each.problem:
                show.note(f"{each.name or each.source or each.path}: {each.problem}", kind="problem")


def _list(model: str | None, provider: str | None, host: str | None) -> "tuple[Sequence[AdapterInfo], bool]":
    """Return the adapters, and whether they have verdicts on a model."""
    try:
        with options.open_to_manage(model, provider, host=host) as client:
            if client.model is not None:
                return client.adapters(model=client.model, timeout=FACTS_TIMEOUT), True
            missing = "no model is chosen"
    except GraftageError as error:
        missing = error.message.rstrip(".")
    # Only plugins are asked: no server has to run.
    with options.open_client(None, provider or options.split(model)[0] or options.default_provider()[0]) as client:
        found = client.adapters()
    show.note(f"Whether they fit is left out: {missing}.")
    return found, False


def _print_list(found: "Sequence[AdapterInfo]", *, judged: bool) -> None:
    if not found:
        show.note(_nothing_found())
        return
    names = [each.name for each in found]
    rows = (
        (
            # A name that two adapters have finds neither.
            f"{each.name} (ambiguous)" if names.count(each.name) > 1 and each.reference != each.name else each.name,
            *((FITS[each.verdict.status] if each.verdict else None,) if judged else ()),
            each.rank,
            show.size(each.size),
            (each.digest or "")[:SHOWN_DIGEST],
            each.base_model,
            each.path or f"{each.source} {each.reference}".strip(),
        )
        for each in found
    )
    fits = ("fits",) if judged else ()
    show.print_table(("name", *fits, "rank", "size", "digest", "base model", "where"), rows)
    if any(each.verdict is not None and each.verdict.status != "compatible" for each in found):
        show.note("`graftage adapters check NAME` says why one does not fit.")


def _nothing_found() -> str:
    """Say where adapters were looked for."""
    from graftage._engine.plugins import Catalog
    from graftage.settings import Sources

    looking = [each.name for each in Catalog().entries if each.kind == "plugin" and each.state != "disabled"]
    if LORA not in looking:
        return "No adapter was found. `graftage plugins` lists the plugins; install `graftage-lora` to find adapters."
    named = os.environ.get(FOLDERS) or "not set"
    return (
        f"No adapter was found. `graftage-lora` looked in the folders of {FOLDERS} ({named}), in those of `[{LORA}]` "
        f"in {Sources.of().file}, in your `adapters.toml`, and in the cache of `huggingface_hub`. Name a folder: "
        f"`{FOLDERS}=FOLDER graftage adapters list`."
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `check`."""

    reference: str
    model: str | None
    status: str
    """`compatible`, `incompatible`, `unsupported`, `unknown`; or `invalid` if the adapter is malformed."""
    reasons: tuple[str, ...] = ()
    hint: str | None = None
    """The way out."""
    warnings: tuple[str, ...] = ()
    name: str | None = None
    digest: str | None = None
    scale: float | None = None
    served_as: str | None = None


@app.command("check")
def check_adapter(
    reference: Reference,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Check if an adapter fits a model, and show why not.

    Exit code: 0 if it fits, 1 if not, 3 if unknown.
    """
    with options.open_for_one_model(model, provider, host=host) as client:
        report = _check(client, reference)
    if as_json:
        show.print_json(asdict(report))
    else:
        _print_report(report)
    raise typer.Exit({"compatible": 0, "unknown": UNDECIDED}.get(report.status, FAILED))


def _check(client: "Client", reference: str) -> Report:
    if "show_model" in client.capabilities().features:
        client.show()  # A missing model is an error, not a verdict on the adapter.
    try:
        adapter = client.resolve_adapter(reference)
    except (AdapterInvalid, AdapterIncompatible) as error:
        status = "invalid" if isinstance(error, AdapterInvalid) else "incompatible"
        return Report(
            reference=reference,
            model=client.model,
            status=status,
            reasons=error.reasons or (error.message,),
            hint=error.hint,
        )
    return Report(
        reference=reference,
        model=client.model,
        status=adapter.verdict.status,
        reasons=adapter.verdict.reasons,
        warnings=adapter.verdict.warnings,
        name=adapter.name,
        digest=adapter.digest,
        scale=adapter.scale,
        served_as=adapter.served_as,
    )


def _print_report(report: Report) -> None:
    rows: list[tuple[str, object]] = [
        ("adapter", report.name or report.reference),
        ("model", report.model),
        ("verdict", report.status),
        *(("reason", reason) for reason in report.reasons),
        ("hint", report.hint),
        *(("warning", warning) for warning in report.warnings),
        ("digest", report.digest),
        ("scale", report.scale),
        ("served as", report.served_as),
    ]
    show.print_table(("", ""), (row for row in rows if row[1] is not None))


@app.command("load")
def load_adapter(
    reference: Reference,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    force: options.Force = False,
) -> None:
    """Load an adapter on a server, ahead of the first reply.

    The embedded engine ends with the command: use `warm` for it.
    """
    with options.open_for_one_model(model, provider, host=host) as client:
        with Waiting("loading the adapter"):
            loaded = client.use_adapter(reference, force=force)
        if loaded is None:
            raise Misuse("There is nothing to load.", hint="Name an adapter.")
        how = f" ({loaded.strategy})" if loaded.strategy else ""
        show.line(f"{show.cell(loaded.name)} is loaded as {show.cell(loaded.model)}{show.cell(how)}.")
        options.note_if_embedded(client)
    for warning in loaded.warnings:
        show.note(warning, kind="warning")


@app.command("warm")
def warm_adapters(
    references: Annotated[
        list[str], typer.Argument(metavar="NAME[=WEIGHT]", help="Names, paths or other references of adapters.")
    ],
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    system: options.System = None,
    system_file: Annotated[
        Path | None,
        typer.Option("--system-file", metavar="FILE", exists=True, dir_okay=False, help="File of the system prompt."),
    ] = None,
    context_window: options.ContextWindow = None,
    keep_alive: options.KeepAlive = None,
    host: options.Host = None,
    force: options.Force = False,
) -> None:
    """Load adapters, and read a system prompt ahead.

    The first replies then do not wait for that. Calls must begin with the same system prompt, and have the same window.
    """
    messages = _system_message(system, system_file)
    arguments = options.given({"context_window": context_window, "keep_alive": keep_alive, "force": force or None})
    failures = 0
    with options.open_for_one_model(model, provider, host=host) as client:
        for reference in references:
            try:
                with Waiting(f"warming {reference}"):
                    warmed = client.warm(options.read_adapter(reference), messages, **arguments)
            except GraftageError as error:
                errors.report(error)
                failures += 1
            else:
                show.line(f"{show.cell(reference)} is {_how_warm(warmed) if messages else 'loaded'}.")
                for warning in warmed.warnings:
                    show.note(warning, kind="warning")
        if failures < len(references):
            show.note(_what_stays(client, read=bool(messages)))
    if failures:
        raise typer.Exit(FAILED)


def _system_message(system: str | None, file: Path | None) -> list[dict[str, str]]:
    if system is not None and file is not None:
        raise Misuse("`--system` and `--system-file` exclude each other.", hint="Give one of them.")
    if file is not None:
        try:
            system = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise Misuse(f"`{file}` cannot be read: {error}.", hint="Give a text file in UTF-8.") from error
    return [{"role": "system", "content": system}] if system else []


def _how_warm(warmed: "Warmed") -> str:
    """Say what was read, what did not have to be read again, and what is kept on the disk."""
    count = warmed.tokens
    tokens = "the prompt" if count is None else f"{count} token{'' if count == 1 else 's'}"
    kept = f" ({warmed.cached_tokens} kept from before)" if warmed.cached_tokens else ""
    saved = f"; {show.size(warmed.saved)} saved on the disk" if warmed.saved is not None else ""
    return f"loaded, with {tokens} read ahead{kept}{saved}"


def _what_stays(client: "Client", *, read: bool) -> str:
    """Say what is left of it after the command."""
    if client.address != options.IN_PROCESS:
        return "The server keeps that until it needs the memory for something else."
    prompts = " and the saved prompts" if read else ""
    return (
        f"The engine ends with this command. What stays is on the disk: the converted adapters{prompts}, from which "
        "another process goes on."
    )


@app.command("pull")
def pull_adapter(
    reference: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="A repository of Hugging Face.")],
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to bind it to. Default: the last part of the reference.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Bind the name to it even if it is bound to something else.")
    ] = False,
    provider: options.Provider = None,
) -> None:
    """Download an adapter, and bind it to a name."""
    # Only plugins are asked: no server has to run.
    with options.open_client(None, provider or options.default_provider()[0]) as client, Waiting("downloading"):
        found = client.pull_adapter(reference, name=name, overwrite=overwrite)
    facts = filter(None, (show.size(found.size), found.digest))
    show.line(show.cell(f"{found.name} is here: {', '.join((str(found.path or found.reference), *facts))}"))


@app.command("unload")
def unload_adapter(
    reference: Reference,
    *,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
) -> None:
    """Remove an adapter from memory; nothing is deleted."""
    with options.open_for_one_model(model, provider, host=host) as client:
        if _is_any_adapter_loaded(client):
            client.use_adapter(reference)  # Another process may have loaded it: find out its name there.
        client.unload_adapter(reference)
    show.line(f"{show.cell(reference)} is not in memory.")


def _is_any_adapter_loaded(client: "Client") -> bool:
    """Return whether the server has a model in memory that it made for an adapter."""
    if "prune_adapters" not in client.capabilities().features:
        return False
    from graftage.types import canonical_name

    derived = {canonical_name(model.name) for model in client.prune_adapters(dry_run=True)}
    return any(canonical_name(model.name) in derived for model in client.loaded())


@app.command("prune")
def prune_adapters(
    *,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Only models older than this: 12h, 7d.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="MODEL", help="Keep this model; may be repeated.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only list what would go.")] = False,
    provider: options.Provider = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Delete the models that a server made when it loaded adapters."""
    age = _parse_age(older_than)
    with options.open_to_manage(None, provider, host=host) as client:
        gone = client.prune_adapters(keep=tuple(keep or ()), older_than=age, dry_run=not yes)
    if as_json:
        show.print_json({"deleted": yes, "models": [show.record(each) for each in gone]})
        return
    if gone:
        rows = ((each.name, show.size(each.size), show.date(each.modified_at)) for each in gone)
        show.print_table(("name", "size", "made"), rows)
    show.line(_prune_summary(len(gone), yes=yes))


def _prune_summary(count: int, *, yes: bool) -> str:
    if not count:
        return "There is nothing to delete."
    models = "1 model" if count == 1 else f"{count} models"
    return f"{models} deleted." if yes else f"{models} would be deleted. Add `--yes` to do so."


def _parse_age(age: str | None) -> float | None:
    """Convert an age such as `90`, `5m`, `1h30m` or `7d` to seconds."""
    from graftage._values import keep_alive_seconds

    if age is None:
        return None
    days = re.fullmatch(r"(\d+(?:\.\d+)?)d", age.strip())
    try:
        seconds = DAY * float(days[1]) if days else keep_alive_seconds(age)
    except ValueError:
        seconds = None
    if seconds is None or seconds == float("inf"):
        raise Misuse(f"`--older-than {age}` is not a valid age.", hint="Give a number of seconds, or 30m, 12h, 7d.")
    return seconds


# --- Files -----------------------------------------------------------------------------------------------------------


@app.command("convert")
def convert_adapter(
    reference: Reference,
    *,
    out: Out,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    force: options.Force = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter as GGUF, converted for a model."""
    with (
        options.open_for_one_model(model, provider, host=host) as client,
        _replacing(out, overwrite=overwrite) as fresh,
    ):
        adapter = _resolve_fitting(client, reference, force=force)
        with Waiting("converting"):
            made = adapter.gguf(client.show())
        with _report_write_errors(out):
            shutil.copyfile(made, fresh)
    show.line(f"{show.cell(out)} is written.")


@app.command("merge")
def merge_adapter(
    reference: Reference,
    *,
    out: Out,
    base_file: Annotated[
        Path | None,
        typer.Option(
            "--base-file",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The model in GGUF. Default: the provider's file.",
        ),
    ] = None,
    model: options.Model = None,
    provider: options.Provider = None,
    host: options.Host = None,
    force: options.Force = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model with an adapter merged into it."""
    from graftage.types import PullProgress

    with (
        options.open_for_one_model(model, provider, host=host) as client,
        _replacing(out, overwrite=overwrite) as fresh,
    ):
        adapter = _resolve_fitting(client, reference, force=force)
        base = base_file or _model_file(client)
        with Waiting("merging") as waiting:
            adapter.merge(
                base,
                fresh,
                lambda written, total: waiting.step(PullProgress(status="merging", total=total, completed=written)),
            )
    show.line(f"{show.cell(out)} is written.")


def _resolve_fitting(client: "Client", reference: str, *, force: bool) -> "Adapter":
    adapter = client.resolve_adapter(reference)
    if adapter.verdict.status == "incompatible" and not force:
        raise AdapterIncompatible(
            f"The adapter `{reference}` does not fit `{client.model}`: {'; '.join(adapter.verdict.reasons)}.",
            reference=reference,
            reasons=adapter.verdict.reasons,
            hint="Choose the model it was made for.",
        )
    return adapter


def _model_file(client: "Client") -> Path:
    path = client.show().path
    if path is None:
        raise Misuse(
            f"The file of `{client.model}` is not on this machine, or not readable.", hint="Name it with `--base-file`."
        )
    return path


@contextmanager
def _replacing(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary file that replaces `out` if the block succeeds, and is deleted if not."""
    if out.exists() and not overwrite:
        raise Misuse(f"`{out}` already exists.", hint="Choose another name, or add `--overwrite`.")
    with ExitStack() as stack:
        with _report_write_errors(out):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent))
        yield Path(folder, out.name)
        with _report_write_errors(out):
            Path(folder, out.name).replace(out)


@contextmanager
def _report_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Misuse(f"`{out}` cannot be written: {error.strerror or error}.", hint="Name another file.") from error
