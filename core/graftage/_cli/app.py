"""The `graftage` command. Each command imports what it needs when it runs: `graftage --help` must be quick."""

from typing import Annotated

import typer

import graftage
from graftage._cli import (
    adapters,
    cassettes,
    chat,
    doctor,
    embed,
    errors,
    generate,
    keys,
    models,
    new,
    plugins,
    providers,
    show,
)
from graftage._cli.commands import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    name="graftage",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("embed")(embed.embed)
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.add_typer(cassettes.app, name="cassettes")
app.command("providers")(providers.providers)
app.add_typer(plugins.app, name="plugins")
app.add_typer(keys.app, name="keys")
app.command("doctor")(doctor.doctor)
app.add_typer(new.app, name="new")


def _version(wanted: bool) -> None:
    if wanted:
        show.line(f"graftage {graftage.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set GRAFTAGE_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Talk to language models through the installed providers."""
    # `Commands` reads `debug`; the callback of `version` prints it.


def main() -> None:
    """Run the command."""
    show.prepare_streams()
    with errors.output_complete():
        app(prog_name="graftage")
