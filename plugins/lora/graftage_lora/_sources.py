"""Where adapters are found: a chain of sources, each of which finds the files of a reference or says why it cannot.

A path, a repository, or a name in the user's registry means one adapter. Any other name is looked up in all folders:
it may be in several, and the first is no better than the others.

A name is one path component. It must stand in the listing of its folder exactly as written, and is never joined to a
path before that. So no name leaves its folder, however the file system treats case, dots, colons or device names. A
link is followed only if it stays inside.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftage import gguf
from graftage.settings import nearest
from graftage_lora._files import CONFIG, WEIGHTS, CheckedFile, Files, Refused

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

__all__ = [
    "COMMIT",
    "HUB",
    "USERS",
    "Found",
    "Hub",
    "NotKnown",
    "Reference",
    "Source",
    "chain",
    "is_outside",
    "may_be_adapter",
    "name_problem",
    "parse",
    "refusal",
    "split_repository",
]

REGISTRY: Final = "adapters.toml"
USERS: Final = "registry"
"""The source that settles names."""
SHARED: Final = "blobs"
"""Where `huggingface_hub` since 2.0 keeps blobs of several repositories."""
PROJECT: Final = Path(".graftage") / "adapters"
HUB: Final = "hf://"
MAX_REFERENCE: Final = 4096
MAX_REGISTRY: Final = 1 << 20
NAME: Final = re.compile(r"\w[\w.+@ -]{0,127}")
DEVICES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)", re.IGNORECASE)
PINNED: Final = re.compile(r"(.+)@(?:sha256:([0-9a-f]{8,64})|([0-9a-f]{12,64}))")
WORD: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REVISION: Final = re.compile(rf"(?!.*\.\.)(?!.{{257}}){WORD}(?:/{WORD})*")
"""A branch, a tag, a commit, or a reference such as `refs/pr/1`."""
REPOSITORY: Final = re.compile(rf"(?![^@]*(?:\.\.|--))({WORD})/({WORD})(?:@({REVISION.pattern}))?")
COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class NotKnown(Exception):
    """Why a source does not have a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A parsed reference."""

    text: str
    """The reference without the digest."""
    digest: str | None = None
    """The start of the required digest, in hex."""

    @property
    def name(self) -> str:
        """The reference as a name in composed Unicode: some systems store names in another form."""
        return composed(self.text)


def parse(text: str) -> Reference:
    """Parse a reference: `name`, `name@digest`, `hf://owner/name`, or a path.

    Raises:
        NotKnown: it cannot be any of these.
    """
    if not text.strip() or len(text) > MAX_REFERENCE or any(unicodedata.category(each)[0] == "C" for each in text):
        raise NotKnown("it is empty, too long, or contains control characters")
    match = PINNED.fullmatch(text)
    # Bare hex after a repository is a commit.
    if match and (match[2] or not text.startswith(HUB)):
        return Reference(text=match[1], digest=match[2] or match[3])
    return Reference(text=text)


def composed(text: str) -> str:
    """Return a text in composed Unicode (NFC)."""
    return unicodedata.normalize("NFC", text)


def name_problem(name: str) -> str | None:
    """Return why a text is not a valid name on every system; `None` if it is."""
    if "/" in name or "\\" in name:
        return "a name cannot contain path separators"
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        return (
            "a name must consist of letters, digits, `_`, `.`, `+`, `-`, `@` and spaces, "
            "without dots or spaces at its ends"
        )
    if DEVICES.fullmatch(unicodedata.normalize("NFKC", name.partition(".")[0]).strip()):
        return "it is a device on Windows"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter, or a place that cannot be read, and what its registry states."""

    source: str
    path: Path
    """Its folder or file."""
    files: Files | Refused
    """Its files, or why they cannot be used."""
    name: str = ""
    """Empty for a place."""
    reference: str = ""
    """A reference that finds it again, unless another adapter has its name."""
    bound: bool = False
    """Whether it is in a registry, or one: the path alone may then find another scale."""
    digest: str | None = None
    scale: float | None = None
    base_model: str | None = None

    def usable(self) -> Files:
        """Return the files, or raise why they cannot be used."""
        if isinstance(self.files, Refused):
            raise self.files
        return self.files


Source: TypeAlias = "Paths | Registry | Folder | Hub"
"""One place to look for adapters. If it settles a reference, what it finds is the only meaning.

`find` returns the adapters that a reference may mean. It raises `NotKnown`, or `Refused`, which ends the search.
`known` lists the adapters here, also those that cannot be used.
"""


def chain(settings: LoraSettings) -> tuple[Source, ...]:
    """Return the sources in the order in which they are asked."""
    hub = Hub(settings.hub)
    folders = [Folder(f"folder {each}", each) for each in settings.folders]
    if settings.project is not None:
        folders.append(Folder("project", settings.project / PROJECT, required=False))
    return (Paths(allowed=settings.paths), Registry(settings.registry, hub), *folders, hub)


# --- Paths -----------------------------------------------------------------------------------------------------------


class Paths:
    """Explicit paths, which may lead anywhere."""

    name = "path"
    settles = True

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed

    def find(self, reference: Reference) -> tuple[Found]:
        """Find the files at a path."""
        text = reference.text
        if text.startswith(HUB) or not re.search(r"[/\\]", text):
            raise NotKnown("it is not a path; start it with `./` to make it one")
        if not self._allowed:
            raise NotKnown("paths are disabled (`paths`)")
        if text.startswith("\\\\"):
            raise NotKnown("it is on another machine")
        path = Path(os.path.expanduser(text) if text.startswith("~/") else text)  # noqa: PTH111 - it never fails
        if not path.exists():
            pull = f"; `{HUB}{text}` is a repository of Hugging Face" if REPOSITORY.fullmatch(text) else ""
            raise NotKnown(f"no such file or folder{pull}")
        name = (path.parent if path.name in (CONFIG, *WEIGHTS.values()) else path).resolve().name.removesuffix(".gguf")
        return (Found(name=name or text, reference=text, source=self.name, path=path, files=locate(path)),)

    def known(self) -> Iterator[Found]:
        """List nothing: paths are unlimited."""
        yield from ()


# --- Folders and registries ------------------------------------------------------------------------------------------


class Folder:
    """A folder of adapters: `NAME/`, `NAME.gguf`, or names bound in its `adapters.toml`."""

    settles = False

    def __init__(self, name: str, folder: Path, *, required: bool = True) -> None:
        self.name = name
        self._folder = folder
        self._required = required
        self._registry = Registry(folder / REGISTRY, None, name)

    def find(self, reference: Reference) -> list[Found]:
        """Find the adapters of a name: the folder may have one in files and a GGUF file beside it."""
        name = reference.name
        if problem := name_problem(name):
            raise NotKnown(problem)
        names = self._names()
        found = list(self._registry.known(name))
        found = found or [self._entry(name, each) for each in names if composed(each) in (name, f"{name}.gguf")]
        if not found:
            others = [each for each in names if each.removesuffix(".gguf").casefold() == name.casefold()]
            raise NotKnown(f"there is `{others[0]}`, in a different case" if others else "no such entry")
        return found

    def known(self) -> Iterator[Found]:
        """List all adapters in the folder."""
        try:
            names = self._names()
        except (NotKnown, OSError) as error:
            if self._required or isinstance(error, OSError):
                yield Found(source=self.name, path=self._folder, files=refusal(error))
            return
        bound = list(self._registry.known())
        yield from bound
        taken = {each.name for each in bound}
        for each in names:
            name = composed(each).removesuffix(".gguf")
            if name not in taken and name_problem(name) is None and may_be_adapter(self._folder / each, self._folder):
                yield self._entry(name, each)

    def _entry(self, name: str, entry: str) -> Found:
        path = self._folder / entry
        try:
            files: Files | Refused = locate(path, within=self._folder)
        except (Refused, OSError) as error:
            files = refusal(error)
        return Found(name=name, reference=name, source=self.name, path=path, files=files)

    def _names(self) -> list[str]:
        try:
            return list_folder(self._folder)
        except FileNotFoundError:
            raise NotKnown("the folder does not exist") from None


def refusal(error: Exception) -> Refused:
    """Return why something cannot be read."""
    return error if isinstance(error, Refused) else Refused(getattr(error, "strerror", None) or str(error))


class Binding(BaseModel):
    """What a registry binds a name to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="The adapter's files, relative to the registry; or `hf://owner/name@revision`")
    revision: str | None = Field(default=None, description="The branch or tag that was pulled; only a note")
    base_model: str | None = None
    digest: str | None = Field(default=None, pattern=r"^(sha256:)?[0-9a-f]{8,64}$")
    scale: float | None = Field(default=None, allow_inf_nan=False)


class Registry:
    """A TOML file with a table for each name.

        [my-project]
        path = "my-project"
        base_model = "smollm2:135m"
        digest = "sha256:4b1f…"
        scale = 2.0

    In the user's registry a path may lead anywhere. A folder's registry, which has no hub, may come with a stranger's
    project: its paths must stay in the folder. A registry that cannot be read might bind any name, so it refuses all
    names: otherwise another adapter with that name could be found elsewhere.
    """

    settles = True

    def __init__(self, path: Path, hub: Hub | None, name: str = USERS) -> None:
        self.name = name
        self._path = path
        self._hub = hub
        self._within = None if hub else path.parent

    def find(self, reference: Reference) -> list[Found]:
        """Find the files of a name."""
        if problem := name_problem(reference.name):
            raise NotKnown(problem)
        if found := list(self.known(reference.name)):
            return found
        raise NotKnown(f"it is not in {self._path}")

    def known(self, wanted: str | None = None) -> Iterator[Found]:
        """List all names or one, also if its files do not exist; or the registry itself if it cannot be read."""
        try:
            document = self._document()
        except Refused as error:
            yield Found(source=self.name, path=self._path, bound=True, files=error)
            return
        for name, entry in document.items():
            if wanted in (None, name):
                yield self._entry(name, entry)

    def _document(self) -> dict[str, Any]:
        try:
            self._path.lstat()
            with CheckedFile(self._path, within=self._within, limit=MAX_REGISTRY, empty=True) as file:
                document = tomllib.loads(bytes(file.rest()).decode("utf-8-sig"))
            entries = {composed(name): entry for name, entry in document.items()}
            if len(entries) < len(document):
                raise Refused("two of its names differ only in their Unicode form")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (Refused, OSError, ValueError, RecursionError) as error:
            raise Refused(
                f"{self._path}, which may bind that name, cannot be read: {refusal(error)}", "Fix it or move it away."
            ) from None
        return entries

    def _entry(self, name: str, entry: object) -> Found:
        path, stated = self._path, dict[str, Any]()
        files: Files | Refused
        try:
            if problem := name_problem(name):
                raise Refused(problem)
            binding = self._binding(name, entry)
            path, files = self._files(binding.path)
            digest = binding.digest.removeprefix("sha256:") if binding.digest else None
            stated = {"digest": digest, "scale": binding.scale, "base_model": binding.base_model}
        except Refused as error:
            files = error
        return Found(name=name, reference=name, source=self.name, path=path, files=files, bound=True, **stated)

    def _binding(self, name: str, entry: object) -> Binding:
        if not isinstance(entry, Mapping):
            raise Refused(f"`{name}` in {self._path} must be a table")
        for key in entry:
            if key not in Binding.model_fields:
                raise Refused(
                    f"{self._path} has the unknown key `{key}` in `[{name}]`", nearest(key, Binding.model_fields)
                )
        try:
            return Binding.model_validate(entry, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(each) for each in first["loc"])
            raise Refused(f"{self._path} has an invalid `{where}` in `[{name}]`: {first['msg']}") from None

    def _files(self, path: str) -> tuple[Path, Files]:
        try:
            if path.startswith(HUB):
                if self._hub is None:
                    raise Refused("only the user's registry may name a repository of Hugging Face")
                (found,) = self._hub.find(Reference(text=path))
                return found.path, found.usable()
            # Not at its beginning only.
            whole = self._path.parent / (os.path.expanduser(path) if self._hub else path)  # noqa: PTH111
            return whole, locate(whole, within=self._within)
        except (NotKnown, OSError) as error:
            raise Refused(f"{self._path} binds it to `{path[:200]}`: {refusal(error)}") from None


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Hub:
    """The cache of `huggingface_hub`, never the network: `hf://owner/name` or `hf://owner/name@revision`."""

    name = "hub"
    settles = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, reference: Reference) -> tuple[Found]:
        """Find the files of a repository."""
        if not reference.text.startswith(HUB):
            raise NotKnown(f"it does not start with `{HUB}`")
        return (self._found(*split_repository(reference.text)),)

    def known(self) -> Iterator[Found]:
        """List all repositories that are adapters, in each revision that is here."""
        for entry in _list_names(self._folder):
            match = REPOSITORY.fullmatch(entry.removeprefix("models--").replace("--", "/", 1))
            if match is None or not entry.startswith("models--"):
                continue
            folder, shown = self._folder / entry, set()
            refs = [each for each in _list_names(folder / "refs") if each != "main" and REVISION.fullmatch(each)]
            for revision in ("", *refs, *_list_names(folder / "snapshots")):
                with suppress(NotKnown, Refused):  # What a reference means is not here.
                    found = self._found(match[1], match[2], revision)
                    if found.path not in shown and may_be_adapter(found.path, self._folder):
                        shown.add(found.path)
                        yield found

    def _found(self, owner: str, name: str, revision: str) -> Found:
        entry = f"models--{owner}--{name}"
        text = f"{owner}/{name}" + (f"@{revision}" if revision else "")
        pull = f"download it with `graftage adapters pull {text}`"
        if entry not in _list_names(self._folder):
            raise NotKnown(f"{self._folder} does not have it; {pull}")
        folder = self._folder / entry
        commit = revision if COMMIT.fullmatch(revision) else _commit(folder, revision or "main")
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise NotKnown(f"{self._folder} does not have its revision {revision or 'main'}; {pull}")
        try:
            files: Files | Refused = self._located(snapshot, folder)
        except (Refused, OSError) as error:
            files = refusal(error)
        return Found(name=name, reference=f"{HUB}{text}", source=self.name, path=snapshot, files=files)

    def _located(self, snapshot: Path, folder: Path) -> Files:
        """Find the files of a snapshot: links to the repository's blobs, or to those that all repositories share."""
        files = locate(snapshot, within=self._folder)
        for each in (snapshot, files.weights, files.config):
            if each is not None and all(is_outside(each, where) for where in (folder, self._folder / SHARED)):
                raise Refused(f"`{each.name}` leads out of its folder", "Download it again.")
        return files


def _list_names(folder: Path) -> list[str]:
    try:
        return list_folder(folder)
    except FileNotFoundError:
        return []


def split_repository(text: str) -> tuple[str, str, str]:
    """Split `hf://owner/name@revision` into owner, name and revision, which may be empty; `NotKnown` if it cannot."""
    match = REPOSITORY.fullmatch(text.removeprefix(HUB))
    if match is None:
        raise NotKnown(f"`{HUB}` must be followed by `owner/name` or `owner/name@revision`")
    return match[1], match[2], match[3] or ""


def _commit(folder: Path, revision: str) -> str:
    path = folder / "refs" / revision
    if not path.exists():
        raise NotKnown(f"its revision {revision} is not in the cache")
    with CheckedFile(path, within=folder, limit=1024) as file:
        commit = bytes(file.rest()).strip().decode("ascii", "replace")
    if not COMMIT.fullmatch(commit):
        raise Refused(f"`{path.name}` in the cache does not name a commit")
    return commit


# --- Files -----------------------------------------------------------------------------------------------------------

PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapters.npz", "pytorch_model.bin")
PART: Final = re.compile(r"(adapter_model|adapters?)[-_]\d{1,5}-of-\d{1,5}\.(safetensors|bin)")
MARK: Final = re.compile(r"adapter_config\.json|adapter_model\..+|adapters\.(safetensors|npz)|checkpoint-\d+")
"""Names that a folder with an adapter has, even if it is not usable."""
IS_ADAPTER: Final = b"general.type" + struct.pack("<IQ", gguf.STRING, 7) + b"adapter"
MAX_FOLDER: Final = 10_000
"""The most entries of a folder that are read."""


def is_outside(path: Path, folder: Path) -> bool:
    """Return whether a path, with its links resolved, leads out of a folder; a circular link does."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # Up to Python 3.12, for a circular link.
        return True


def list_folder(folder: Path) -> list[str]:
    """List the names in a folder, sorted, without hidden ones; at most `MAX_FOLDER`."""
    with os.scandir(folder) as found:
        return sorted(each.name for each in itertools.islice(found, MAX_FOLDER) if not each.name.startswith("."))


def may_be_adapter(path: Path, within: Path) -> bool:
    """Return whether a path is an adapter or a broken one, not something else that lies in a folder."""
    try:
        if is_outside(path, within):
            return True
        if not path.is_dir():
            return is_gguf_adapter(path, within)
        return any(MARK.fullmatch(each) or is_gguf_adapter(path / each, within) for each in list_folder(path))
    except OSError:
        return True


def is_gguf_adapter(path: Path, within: Path | None) -> bool:
    """Return whether a path is a GGUF adapter, usable or not: a file with that ending, but no model.

    Converters write the type among the first keys; reading a model's whole head would take a tenth of a second.
    """
    if path.suffix != ".gguf":
        return False
    try:
        with CheckedFile(path, within=within) as file:
            start = file.peek(4096)
    except Refused:
        return True
    return IS_ADAPTER in start or b"general.architecture" not in start


def locate(path: Path, within: Path | None = None) -> Files:
    """Find the files of the adapter at a path: a folder, its weights, or a GGUF file.

    Raises:
        Refused: there is no usable adapter, or it leads out of the folder `within`.
    """
    if within is not None and is_outside(path, within):
        raise Refused(f"`{path.name}` leads out of its folder", f"Bind it by its path in the user's {REGISTRY}.")
    if path.name == CONFIG and path.is_file():
        path = path.parent
    if path.is_dir():
        return _in_folder(path, within)
    if not path.exists():
        raise Refused("no such file")
    config = path.with_name(CONFIG) if path.suffix == ".safetensors" else None
    return Files(weights=path, config=config, within=within)


def _in_folder(folder: Path, within: Path | None) -> Files:
    names = list_folder(folder)
    weights = next((name for name in WEIGHTS.values() if name in names), None)
    if CONFIG in names and weights:
        return Files(weights=folder / weights, config=folder / CONFIG, within=within)
    adapters = [name for name in names if is_gguf_adapter(folder / name, within)]
    if len(adapters) == 1:
        return Files(weights=folder / adapters[0], within=within)
    if adapters:
        raise Refused(f"the folder contains several adapters: {', '.join(adapters)}", "Name one of the files.")
    if weights:
        raise Refused(f"`{CONFIG}` with the scale is missing beside `{weights}`", "Put it into the folder.")
    raise Refused(*_nothing_usable(folder, names))


def _nothing_usable(folder: Path, names: list[str]) -> tuple[str, str]:
    """Return why a folder contains no adapter, and the way out."""
    if parts := [name for name in names if PART.fullmatch(name)]:
        joined = WEIGHTS["mlx" if parts[0].startswith("adapters") else "peft"]
        return (
            f"its weights are in parts, the first is `{parts[0]}`",
            f"Join them with the package safetensors: load each with `load_file`, and save all tensors as `{joined}`.",
        )
    if pickles := [name for name in names if name in PICKLES and "config.json" not in names]:
        return (
            f"`{pickles[0]}` is a pickle, which can run code when it is read",
            "Save the adapter as safetensors, the default of every current trainer.",
        )
    if "config.json" in names or any(name.endswith(".gguf") for name in names):
        return "the folder contains a whole model, not an adapter", "Use it as the model instead."
    if saved := [name for name in names if name.endswith(f"_{WEIGHTS['mlx']}")]:
        return (
            f"the folder contains only saved steps, the last is `{saved[-1]}`",
            f"Copy it to `{WEIGHTS['mlx']}`, beside {CONFIG}.",
        )
    inner = [name for name in names if (folder / name / CONFIG).is_file()]
    if inner:
        last = max(inner, key=lambda name: (int(re.sub(r"\D", "", name) or -1), name))
        what = "its checkpoints do" if last.startswith("checkpoint-") else "folders in it do"
        return f"the folder contains no adapter, but {what}", f"Name the last one: `{folder / last}`."
    return (
        "the folder contains no adapter",
        f"It must contain {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )
