"""The options that commands share, and the clients that they open."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import progress, show
from graftage._cli.errors import Misuse
from graftage._cli.names import provider_names
from graftage._values import SMALLEST_WINDOW
from graftage.exceptions import CapabilityUnsupported, GraftageError

if TYPE_CHECKING:
    from graftage import Client
    from graftage.types import AdapterReference

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="[PROVIDER:]MODEL",
        help="The model, and the provider or instance if not the default one. Default: GRAFTAGE_MODEL, or the settings "
        "file.",
    ),
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        "-p",
        help="The provider or instance. Default: GRAFTAGE_PROVIDER, or the settings file, else the first that answers.",
    ),
]
Host = Annotated[str | None, typer.Option("--host", help="Address of the server.")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Limit on the whole call.")]
System = Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME[=WEIGHT]",
        help="LoRA adapter to use, with a weight such as style=0.6; may be repeated to use several at once.",
    ),
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 for the likeliest words, 1 for variety.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same reply, if all else is equal.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Tokens of the reply.")]
ContextWindow = Annotated[
    int | None,
    typer.Option("--context-window", min=SMALLEST_WINDOW, help="Tokens of prompt and reply together."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Go on, with a warning, if a policy refuses or an adapter does not fit.")
]
KeepAlive = Annotated[
    str | None, typer.Option("--keep-alive", help="How long the model stays loaded: seconds, 5m, -1 for ever.")
]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help="Think before replying, or not.")]
Images = Annotated[
    list[Path] | None, typer.Option("--image", metavar="FILE", help="Picture to send with the prompt; may be repeated.")
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="json|FILE", help="Reply in JSON, or by the JSON schema in a file.")
]
Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tool",
        metavar="MODULE:FUNCTION",
        help="Python function that the model may call: it runs here, with your rights. May be repeated.",
    ),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", min=1, help="How often the model may call tools for a reply. Default: 10.")
]
NoStream = Annotated[bool, typer.Option("--no-stream", help="Print the reply when it is complete.")]
IN_PROCESS = "embedded"
"""The address of a connection whose engine runs in this process."""
DEFAULT = "default"
"""The origin of a value that was not set."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Print control characters of the reply as they are: they can control a terminal.")
]


def open_client(model: str | None, provider: str | None = None, **overrides: Any) -> "Client":
    """Open the client that the options name.

    The part before the first colon is a provider only if it is installed or an instance: `llama3.2:1b` is a model.
    """
    import graftage

    if provider is None:
        provider, model = split(model)
    return graftage.connect(provider, model=model or None, plugins=[progress.watcher()], **given(overrides))


@contextmanager
def open_to_ask(
    model: str | None, provider: str | None, *, host: str | None, announce: bool = True
) -> "Iterator[Client]":
    """Open the client of a command that asks a model; show which provider was taken if none was named."""
    if provider is None:
        provider, model = split(model)
    with open_client(model, provider, host=host) as client:
        require_model(client)
        if announce and host is None and auto_reason(client):
            show.note(f"{client.model} on {client.provider}, because no provider was named.")
        try:
            yield client
        except CapabilityUnsupported as error:
            if not model:
                origin = client.origins.get("model", "not named")
                error.hint = f"{error.hint or ''} `{client.model}` is the default ({origin}): name another with `-m`."
            raise


def open_to_manage(model: str | None, provider: str | None, *, host: str | None = None) -> "Client":
    """Open a client to manage models. Unlike commands that ask a model, these need no model on the provider."""
    if provider is None:
        provider, model = split(model)
    client = open_client(model, provider, host=host)
    if (why := auto_reason(client)) and why != "it answers":
        show.note(f"Using {client.provider}, because no provider was named. {why}")
    return client


def auto_reason(client: "Client") -> str | None:
    """Return why `auto` took the client's provider; None if it was named."""
    from graftage._engine.choosing import AUTO

    _ = client.provider  # This makes the choice.
    how, _, why = client.origins.get("provider", "").partition(": ")
    return why if how == AUTO else None


@contextmanager
def open_for_one_model(model: str | None, provider: str | None, *, host: str | None) -> "Iterator[Client]":
    """Open a client to manage one model."""
    with open_to_manage(model, provider, host=host) as client:
        require_model(client)
        yield client


def require_chat(client: "Client") -> None:
    """Refuse a conversation with a model that cannot chat: each question would fail."""
    features = None
    with suppress(GraftageError):  # The first question will show it.
        features = client.show().features
    if features is not None and "chat" not in features:
        raise CapabilityUnsupported(f"The model `{client.model}` cannot chat.", hint="Try `graftage embed`.")


def note_if_embedded(client: "Client") -> None:
    """Note that a model in this process is unloaded at its end."""
    if client.address == IN_PROCESS:
        show.note("It is unloaded when this command ends. To keep it, keep a client open in a program.")


def default_provider(host: str | None = None) -> tuple[str, str]:
    """Return the provider that is asked first if none is named, and the origin of that choice."""
    from graftage._engine.choosing import AUTO, ConnectOptions, Opening
    from graftage.settings import Sources

    name, origin = Sources.of().choice("provider")
    if name and name != AUTO:
        return name.partition(":")[0], origin
    return Opening(ConnectOptions(provider=AUTO, overrides=given({"host": host}))).ranked()[0], DEFAULT


def split(model: str | None) -> tuple[str | None, str | None]:
    """Split off the provider, if it is installed, or the instance."""
    name, colon, rest = (model or "").partition(":")
    if colon and name in provider_names():
        return name, rest or None
    return None, model


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were set."""
    return {name: value for name, value in options.items() if value is not None}


def require_model(client: "Client") -> None:
    """Check that a model was chosen."""
    if not client.model:
        raise Misuse(
            "No model is chosen.",
            hint="Name one with `-m`, or set GRAFTAGE_MODEL. `graftage models list` shows what there is.",
        )


def read_adapters(given: list[str] | None) -> "AdapterReference | list[AdapterReference] | None":
    """Read the values of `--adapter`."""
    read = [read_adapter(each) for each in given or ()]
    return read[0] if len(read) == 1 else read or None


def read_adapter(text: str) -> "AdapterReference":
    """Read `NAME` or `NAME=WEIGHT`. The path of an existing file or folder is a name, also if it ends like a weight."""
    name, _, weight = text.rpartition("=")
    if name and not Path(text).expanduser().exists():
        try:
            return name, float(weight)
        except ValueError:
            raise Misuse(f"`{weight}` in `--adapter {text}` is not a weight.", hint="Write `NAME=0.5`.") from None
    return text


def read_format(value: str | None) -> Any:
    """Read the value of `--format`: `json`, or the schema in a file."""
    if value in (None, "json"):
        return value
    try:
        schema = json.loads(Path(str(value)).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Misuse(
            f"`--format {value}` cannot be used: {error}.", hint="Give `json`, or a JSON schema's file."
        ) from None
    if not isinstance(schema, dict) or not schema:
        raise Misuse(f"`--format {value}` holds no JSON schema.", hint="A schema must be an object that is not empty.")
    return schema
