"""`graftage keys`: the keys of instances in the system's keyring."""

import getpass
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftage._cli import options, show
from graftage._cli.errors import Misuse, describe
from graftage._cli.names import settings_file
from graftage.exceptions import SettingsError

if TYPE_CHECKING:
    from graftage._engine.instances import Listed

__all__ = ["app"]

app = typer.Typer(
    help="Keep the API keys of instances in the system's keyring.", no_args_is_help=True, rich_markup_mode=None
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The instance.")]


@app.command("set")
def set_key(name: Name) -> None:
    """Store the key of an instance. It is typed in, or piped: `pass show work | graftage keys set work`."""
    from graftage import _keys

    instance = _of_keyring(name)
    _keys.stored(name)  # A keyring that cannot be used is reported before the key is typed.
    _keys.store(name, _read_key(name))
    show.line(f"The key of `{name}` is stored in the keyring.")
    if instance.key != _keys.KEYRING:
        show.note(f"It is not used while the key is set elsewhere: {instance.key}.", kind="warning")


@app.command("list")
def list_keys(as_json: options.AsJson = False) -> None:
    """List the instances, where the key of each comes from, and whether it is there."""
    from graftage._engine.instances import listed

    found = [_state(each) for each in listed()]
    if as_json:
        show.print_json(found)
    elif not found:
        show.line(f"There is no instance in {show.cell(settings_file())}.")
    else:
        rows = [(each["instance"], each["provider"], each["from"] or "none", _word(each)) for each in found]
        show.print_table(("instance", "provider", "key from", "is there"), rows)
        for each in found:
            if each["problem"]:
                show.line(f"\n{show.cell(each['instance'])}: {show.cell(each['problem'])}")


@app.command("remove")
def remove_key(name: Name) -> None:
    """Remove the key of an instance from the keyring."""
    from graftage import _keys

    if not _keys.remove(name):
        raise Misuse(f"The keyring has no key for `{name}`.", hint="`graftage keys list` shows the instances.")
    show.line(f"The key of `{name}` was removed from the keyring.")


def _of_keyring(name: str) -> "Listed":
    """Return an instance whose key is in the keyring."""
    from graftage._engine.instances import listed
    from graftage._keys import KEYRING
    from graftage.settings import nearest

    known = {each.name: each for each in listed()}
    file = settings_file()
    if name not in known:
        hint = f"Add it to {file}: `[instances.{name}]` with its `provider`."
        raise Misuse(f"There is no instance `{name}`.", hint=nearest(name, known) if known else hint)
    if known[name].api_key_from != KEYRING:
        hint = f'Add `api_key_from = "{KEYRING}"` below `[instances.{name}]` in {file}.'
        raise Misuse(f"The instance `{name}` does not take its key from the keyring.", hint=hint)
    return known[name]


def _read_key(name: str) -> str:
    """Read a key from the terminal, without showing it, or from the pipe."""
    from graftage._keys import LARGEST_KEY
    from graftage.settings import HEADER_VALUE

    if show.is_terminal(sys.stdin):
        text = getpass.getpass(f"Key of `{name}`, which is not shown: ")
    else:
        text = sys.stdin.buffer.read(LARGEST_KEY + 1).decode(errors="replace")
    key = text.strip()
    if not key:
        raise Misuse("There is no key.", hint=f"Type it, or pipe it: `graftage keys set {name} < FILE`.")
    if len(text) > LARGEST_KEY or not HEADER_VALUE.fullmatch(key):
        raise Misuse("That is not a key: it must be one line of text.")
    return key


def _state(instance: "Listed") -> dict[str, Any]:
    """Return where the key of an instance comes from, and whether it is there; None if that cannot be found out."""
    from graftage import _keys

    present: bool | None = instance.key is not None
    problem = None
    if instance.key and instance.key == instance.api_key_from:
        try:
            if instance.key == _keys.KEYRING:
                present = _keys.stored(instance.name) is not None
            else:
                _keys.read(instance.name, instance.key, prefix="GRAFTAGE")
        except SettingsError as error:
            present, problem = None, describe(error)
    return {
        "instance": instance.name,
        "provider": instance.provider,
        "from": instance.key,
        "present": present,
        "problem": problem,
    }


def _word(state: dict[str, Any]) -> str:
    return {None: "unknown", True: "yes", False: "no"}[state["present"]] if state["from"] else ""
