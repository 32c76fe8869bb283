"""`graftage models`: the models of a provider, and those in memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from graftage._cli import options, show
from graftage._cli.errors import Misuse
from graftage._cli.progress import Waiting

if TYPE_CHECKING:
    from graftage.types import LoadedModel, ModelInfo

__all__ = ["app"]

app = typer.Typer(help="See, download, load, unload and delete models.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str | None, typer.Argument(metavar="[PROVIDER:]MODEL", help="The model. Default: GRAFTAGE_MODEL.")]


@app.command("list")
def list_models(provider: options.Provider = None, host: options.Host = None, as_json: options.AsJson = False) -> None:
    """List the models that need no download."""
    with options.open_to_manage(None, provider, host=host) as client:
        found = client.models()
    if as_json:
        show.print_json([show.record(each) for each in found])
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
    with options.open_for_one_model(model, provider, host=host) as client:
        info = client.show()
    if as_json:
        show.print_json(show.record(info))
    else:
        show.print_table(("", ""), ((name, value) for name, value in _facts(info) if value not in (None, "")))


@app.command("pull")
def pull_model(model: Name = None, provider: options.Provider = None, host: options.Host = None) -> None:
    """Download a model, or resume a stopped download."""
    with options.open_for_one_model(model, provider, host=host) as client:
        try:
            with Waiting("requesting the model"):
                client.pull()
        except KeyboardInterrupt:
            show.note("Stopped. Run the same command to resume.")
            raise
        show.line(f"{show.cell(client.model)} is here.")


@app.command("loaded")
def loaded_models(
    provider: options.Provider = None, host: options.Host = None, as_json: options.AsJson = False
) -> None:
    """List the models in memory."""
    with options.open_to_manage(None, provider, host=host) as client:
        found = client.loaded()
    if as_json:
        show.print_json([show.record(each) for each in found])
        return
    if not found:
        show.note("Nothing is loaded.")
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
    """Load a model into memory, with the context window of the next calls."""
    with options.open_for_one_model(model, provider, host=host) as client:
        with Waiting("loading"):
            client.load(keep_alive=keep_alive, context_window=context_window)
        show.line(f"{show.cell(client.model)} is loaded.")
        options.note_if_embedded(client)


@app.command("unload")
def unload_model(model: Name = None, provider: options.Provider = None, host: options.Host = None) -> None:
    """Remove a model from memory."""
    with options.open_for_one_model(model, provider, host=host) as client:
        client.unload()
        show.line(f"{show.cell(client.model)} was unloaded.")


@app.command("delete")
def delete_model(
    model: Annotated[str, typer.Argument(metavar="[PROVIDER:]MODEL", help="The model.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it. Without this, only show what would go.")] = False,
    provider: options.Provider = None,
    host: options.Host = None,
) -> None:
    """Delete a model from the disk."""
    if options.split(model)[1] is None:  # Never delete the default model by accident.
        raise Misuse("No model is named.", hint="Name the one to delete.")
    with options.open_for_one_model(model, provider, host=host) as client:
        if yes:
            client.delete(client.model or "")  # Works for a damaged model too, which cannot be shown.
            show.line(f"{show.cell(client.model)} was deleted.")
        else:
            info = client.show()
            size = f" ({show.size(info.size)})" if info.size else ""
            show.line(f"{show.cell(info.name)}{size} would be deleted. Add `--yes` to do so.")


def _facts(info: "ModelInfo") -> Iterator[tuple[str, object]]:
    yield "name", info.name
    yield "digest", info.digest
    yield "size", show.size(info.size)
    yield "changed", show.date(info.modified_at)
    for name in ("family", "architecture", "parameters", "quantization", "context_window"):
        yield name.replace("_", " "), getattr(info, name)
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
