"""`graftage models`: what a provider has, and what is in memory."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import options, show

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from graftage import Client
    from graftage.types import LoadedModel, ModelInfo, PullProgress

__all__ = ["app"]

app = typer.Typer(help="See, download, load and unload models.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str | None, typer.Argument(metavar="[PROVIDER:]MODEL", help="The model. Default: GRAFTAGE_MODEL.")]
DIGEST = 12
"""Characters of a digest that people look at."""
HIDDEN = ("raw", "tensors")
"""Fields of a record that even `--json` leaves out: the server's own form of the same, and thousands of shapes."""


@app.command("list")
def list_models(provider: options.Provider = None, host: options.Host = None, as_json: options.AsJson = False) -> None:
    """List the models that can be asked without a download."""
    with options.managed(None, provider, host=host) as client:
        found = client.models()
    if as_json:
        show.print_json([_data(each) for each in found])
        return
    show.print_table(
        ("name", "size", "parameters", "quantization", "changed"),
        (
            (each.name, show.size(each.size), each.parameters, each.quantization, show.date(each.modified_at))
            for each in found
        ),
    )


@app.command("show")
def show_model(
    model: Name = None,
    provider: options.Provider = None,
    host: options.Host = None,
    as_json: options.AsJson = False,
) -> None:
    """Describe a model."""
    with _client(model, provider, host) as client:
        info = client.show()
    if as_json:
        show.print_json(_data(info))
    else:
        show.print_table(("", ""), ((name, value) for name, value in _facts(info) if value not in (None, "")))


@app.command("pull")
def pull_model(model: Name = None, provider: options.Provider = None, host: options.Host = None) -> None:
    """Download a model, or go on with a download that was stopped."""
    with _client(model, provider, host) as client:
        try:
            with _progress() as bars:
                client.pull(on_progress=bars.step)
        except KeyboardInterrupt:
            show.note("Stopped. The same command goes on where it ended.")
            raise
        show.line(f"{show.cell(client.model)} is here.")


@app.command("loaded")
def loaded_models(
    provider: options.Provider = None, host: options.Host = None, as_json: options.AsJson = False
) -> None:
    """List the models in memory."""
    with options.managed(None, provider, host=host) as client:
        found = client.loaded()
    if as_json:
        show.print_json([_data(each) for each in found])
        return
    show.print_table(
        ("name", "size", "on the accelerator", "window", "until"),
        (
            (each.name, show.size(each.size), _share(each), each.context_window, show.date(each.expires_at))
            for each in found
        ),
    )


@app.command("load")
def load_model(
    model: Name = None,
    provider: options.Provider = None,
    keep_alive: options.KeepAlive = None,
    context_window: options.ContextWindow = None,
    host: options.Host = None,
) -> None:
    """Bring a model into memory, with the window that the next questions will have."""
    with _client(model, provider, host) as client:
        with show.waiting("loading"):
            client.load(keep_alive=keep_alive, context_window=context_window)
        show.line(f"{show.cell(client.model)} is loaded.")


@app.command("unload")
def unload_model(model: Name = None, provider: options.Provider = None, host: options.Host = None) -> None:
    """Put a model out of memory."""
    with _client(model, provider, host) as client:
        client.unload()
        show.line(f"{show.cell(client.model)} is not in memory.")


@contextmanager
def _client(model: str | None, provider: str | None, host: str | None) -> "Iterator[Client]":
    with options.managed(model, provider, host=host) as client:
        options.require_model(client)
        yield client


def _data(record: "ModelInfo | LoadedModel") -> dict[str, Any]:
    return {name: record[name] for name in record.keys() if name not in HIDDEN}  # noqa: SIM118 - a record is no mapping


def _facts(info: "ModelInfo") -> Iterator[tuple[str, object]]:
    yield "name", info.name
    yield "digest", info.digest
    yield "size", show.size(info.size)
    yield "changed", show.date(info.modified_at)
    for name in ("family", "architecture", "parameters", "quantization", "context_window"):
        yield name.replace("_", " "), info[name]
    yield "features", ", ".join(sorted(info.features)) if info.features is not None else None
    yield "parent", info.parent
    yield "adapters", ", ".join(info.adapters)
    yield "system", info.system
    yield "licence", next(iter((info.licence or "").strip().splitlines()), None)
    yield "file", info.path
    yield "tensors", len(info.tensors) if info.tensors else None


def _share(model: "LoadedModel") -> str | None:
    if not model.size or model.accelerator_size is None:
        return None
    return f"{100 * model.accelerator_size / model.size:.0f} %"


# --- The progress of a download --------------------------------------------------------------------------------------


@contextmanager
def _progress() -> "Iterator[_Bars | _Lines]":
    """Bars on a terminal, else a line for each step."""
    if not show.is_terminal(sys.stderr):
        yield _Lines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=show.console(error=True), expand=True) as progress:
        yield _Bars(progress)


class _Lines:
    """Tells each new step of a download on a line."""

    def __init__(self) -> None:
        self._last = ""

    def step(self, step: "PullProgress") -> None:
        """Take a step."""
        if step.status != self._last:
            self._last = step.status
            show.note(show.cell(step.status))


class _Bars(_Lines):
    """Draws a bar for each layer."""

    def __init__(self, progress: "Progress") -> None:
        super().__init__()
        self._progress = progress
        self._layers: dict[str, TaskID] = {}

    def step(self, step: "PullProgress") -> None:
        """Take a step."""
        if step.digest is None or step.total is None:
            super().step(step)
            return
        figures: Mapping[str, Any] = {"total": step.total, "completed": step.completed or 0}
        if step.digest in self._layers:
            self._progress.update(self._layers[step.digest], **figures)
        else:
            name = show.cell(step.digest.removeprefix("sha256:"))[:DIGEST]
            self._layers[step.digest] = self._progress.add_task(name, **figures)
