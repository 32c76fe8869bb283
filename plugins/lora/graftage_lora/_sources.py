"""Where adapters are found: a chain of sources, each of which finds the files of a reference or says why it cannot.

A name is one path component. It must stand in the listing of its folder exactly as written, and is never joined to a
path before that. So no name leaves its folder, however the file system treats case, dots, colons or device names. A
link is followed only if it stays inside.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftage.settings import nearest
from graftage_lora._files import CheckedFile, Files, Refused, read_head

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

__all__ = ["Found", "NotKnown", "Reference", "Source", "chain", "parse"]

REGISTRY: Final = "adapters.toml"
PROJECT: Final = Path(".graftage") / "adapters"
HUB: Final = "hf://"
MAX_REFERENCE: Final = 4096
MAX_REGISTRY: Final = 1 << 20
NAME: Final = re.compile(r"\w[\w.+ -]{0,127}")
DEVICES: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)", re.IGNORECASE)
PINNED: Final = re.compile(r"(.+)@(?:sha256:([0-9a-f]{8,64})|([0-9a-f]{12,64}))")
HUB_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MAX_REVISION: Final = 256
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
    def is_hub(self) -> bool:
        """Whether it is a repository in the cache of Hugging Face."""
        return self.text.startswith(HUB)

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
            "a name must consist of letters, digits, `_`, `.`, `+`, `-` and spaces, without dots or spaces at its ends"
        )
    if DEVICES.fullmatch(unicodedata.normalize("NFKC", name.partition(".")[0]).strip()):
        return "it is a device on Windows"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter's files, and what its registry states."""

    name: str
    reference: str
    """A reference that finds it again."""
    source: str
    files: Files
    digest: str | None = None
    scale: float | None = None
    base_model: str | None = None


class Source(Protocol):
    """One place to look for adapters."""

    name: str

    def find(self, reference: Reference) -> Found:
        """Find the files of a reference.

        Raises:
            NotKnown: the source does not have it; the next one is asked.
            Refused: the source has it, but it cannot be used; the search ends.
        """
        ...

    def known(self) -> Iterator[Found]:
        """List the adapters here, without broken ones."""
        ...


def chain(settings: LoraSettings) -> tuple[Source, ...]:
    """Return the sources in the order in which they are asked."""
    hub = Hub(settings.hub)
    folders = [Folder(f"folder {each}", each) for each in settings.folders]
    if settings.project is not None:
        folders.append(Folder("project", settings.project / PROJECT))
    return (Paths(allowed=settings.paths), Registry(settings.registry, hub, trusted=True), *folders, hub)


def _locate_inside(path: Path, folder: Path) -> Files:
    if is_outside(path, folder):
        raise Refused(f"`{path.name}` leads out of its folder", f"Bind it by its path in the user's {REGISTRY}.")
    return locate(path, within=folder)


# --- Paths -----------------------------------------------------------------------------------------------------------


class Paths:
    """Explicit paths, which may lead anywhere."""

    name = "path"

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed

    def find(self, reference: Reference) -> Found:
        """Find the files at a path."""
        text = reference.text
        if reference.is_hub or not re.search(r"[/\\]", text):
            raise NotKnown("it is not a path; start it with `./` to make it one")
        if not self._allowed:
            raise NotKnown("paths are disabled (`paths`)")
        if text.startswith("\\\\"):
            raise NotKnown("it is on another machine")
        path = Path(os.path.expanduser(text) if text.startswith("~/") else text)  # noqa: PTH111 - it never fails
        if not path.exists():
            raise NotKnown("no such file or folder")
        name = (path.parent if path.name in (CONFIG, *WEIGHTS.values()) else path).resolve().name.removesuffix(".gguf")
        return Found(name=name or text, reference=text, source=self.name, files=locate(path))

    def known(self) -> Iterator[Found]:
        """List nothing: paths are unlimited."""
        yield from ()


# --- Folders and registries ------------------------------------------------------------------------------------------


class Folder:
    """A folder of adapters: `NAME/`, `NAME.gguf`, or names bound in its `adapters.toml`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._registry = Registry(folder / REGISTRY, None, trusted=False)

    def find(self, reference: Reference) -> Found:
        """Find the files of a name."""
        name = reference.name
        if problem := name_problem(name):
            raise NotKnown(problem)
        names = {composed(entry): entry for entry in self._names()}
        if bound := self._registry.get(name):
            return replace(bound, source=self.name)
        for entry in (name, f"{name}.gguf"):
            if entry in names:
                return self._found(name, names[entry])
        raise NotKnown(_not_listed(name, names))

    def known(self) -> Iterator[Found]:
        """List all adapters in the folder."""
        names = self._names()
        bound = list(self._registry.known())
        yield from (replace(each, source=self.name) for each in bound)
        taken = {each.name for each in bound}
        for entry in names:
            name = composed(entry).removesuffix(".gguf")
            if name not in taken and name_problem(name) is None and self._is_adapter(entry):
                taken.add(name)
                yield self._found(name, entry)

    def _is_adapter(self, entry: str) -> bool:
        try:
            files = _locate_inside(self._folder / entry, self._folder)
        except (Refused, OSError):
            return False
        return files.config is not None or is_adapter(files.weights, self._folder)

    def _found(self, name: str, entry: str) -> Found:
        files = _locate_inside(self._folder / entry, self._folder)
        return Found(name=name, reference=name, source=self.name, files=files)

    def _names(self) -> list[str]:
        try:
            return list_folder(self._folder)
        except FileNotFoundError:
            raise NotKnown("the folder does not exist") from None


def _by_name(document: Mapping[str, object]) -> dict[str, Any]:
    """Return the entries of a registry by composed names."""
    entries = {composed(name): entry for name, entry in document.items()}
    if len(entries) < len(document):
        raise ValueError("two of its names differ only in their Unicode form")
    return entries


def _error_text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _not_listed(name: str, names: Iterable[str]) -> str:
    others = [each for each in names if each.removesuffix(".gguf").casefold() == name.casefold()]
    return f"there is `{others[0]}`, in a different case" if others else "no such entry"


class Binding(BaseModel):
    """What a registry binds a name to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="The adapter's files, relative to the registry; or `hf://owner/name`")
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

    In the user's registry a path may lead anywhere. A folder's registry may come with a stranger's project: its paths
    must stay in the folder. A registry that cannot be read might bind any name, so it refuses all names: otherwise
    another adapter with that name could be found elsewhere.
    """

    name = "registry"

    def __init__(self, path: Path, hub: Hub | None, *, trusted: bool) -> None:
        self._path = path
        self._hub = hub
        self._trusted = trusted

    def find(self, reference: Reference) -> Found:
        """Find the files of a name."""
        if problem := name_problem(reference.name):
            raise NotKnown(problem)
        if found := self.get(reference.name):
            return found
        raise NotKnown(f"it is not in {self._path}")

    def get(self, name: str) -> Found | None:
        """Find the files of a name; return `None` if it is not bound.

        Raises:
            Refused: the files of a bound name, or the registry, cannot be read.
        """
        document = self._document()
        return self._found(name, document[name]) if name in document else None

    def known(self) -> Iterator[Found]:
        """List all names whose files exist."""
        for name, entry in self._document().items():
            if name_problem(name) is None:
                with contextlib.suppress(Refused):
                    yield self._found(name, entry)

    def _document(self) -> dict[str, Any]:
        within = None if self._trusted else self._path.parent
        try:
            self._path.lstat()
            with CheckedFile(self._path, within=within, limit=MAX_REGISTRY, empty=True) as file:
                return _by_name(tomllib.loads(bytes(file.rest()).decode("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (Refused, OSError, ValueError, RecursionError) as error:
            raise Refused(
                f"{self._path}, which may bind that name, cannot be read: {_error_text(error)}",
                "Fix it or move it away.",
            ) from None

    def _found(self, name: str, entry: object) -> Found:
        binding = self._binding(name, entry)
        try:
            files = self._files(binding.path)
        except (NotKnown, OSError) as error:
            raise Refused(f"{self._path} binds it to `{binding.path[:200]}`: {_error_text(error)}") from None
        return Found(
            name=name,
            reference=name,
            source=self.name,
            files=files,
            digest=binding.digest.removeprefix("sha256:") if binding.digest else None,
            scale=binding.scale,
            base_model=binding.base_model,
        )

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

    def _files(self, path: str) -> Files:
        if path.startswith(HUB):
            if self._hub is None:
                raise Refused("only the user's registry may name a repository of Hugging Face")
            return self._hub.find(Reference(text=path)).files
        folder = self._path.parent
        whole = folder / (os.path.expanduser(path) if self._trusted else path)  # noqa: PTH111 - not at its beginning only
        return locate(whole) if self._trusted else _locate_inside(whole, folder)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Hub:
    """The cache of `huggingface_hub`, never the network: `hf://owner/name` or `hf://owner/name@revision`."""

    name = "hub"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, reference: Reference) -> Found:
        """Find the files of a repository."""
        if not reference.is_hub:
            raise NotKnown(f"it does not start with `{HUB}`")
        repository, _, revision = reference.text.removeprefix(HUB).partition("@")
        parts = repository.split("/")
        if len(parts) != 2 or not all(map(_is_hub_part, parts)) or not _is_revision(revision or "main"):
            raise NotKnown(f"`{HUB}` must be followed by `owner/name` or `owner/name@revision`")
        return self._found(parts[0], parts[1], revision)

    def known(self) -> Iterator[Found]:
        """List all repositories that are adapters."""
        for entry in self._names():
            kind, owner, *name = entry.split("--", 2)
            if kind == "models" and name and _is_hub_part(owner) and _is_hub_part(name[0]):
                try:
                    yield self._found(owner, name[0], "")
                except (Refused, NotKnown, OSError):
                    continue

    def _found(self, owner: str, name: str, revision: str) -> Found:
        entry = f"models--{owner}--{name}"
        names = self._names()
        if entry not in names:
            raise NotKnown(f"{self._folder} does not have it; download it with `hf download {owner}/{name}`")
        folder = self._folder / entry
        commit = revision if COMMIT.fullmatch(revision) else _commit(folder, revision or "main")
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise NotKnown(f"{self._folder} does not have its revision {revision or 'main'}")
        text = f"{HUB}{owner}/{name}" + (f"@{revision}" if revision else "")
        return Found(name=name, reference=text, source=self.name, files=_locate_inside(snapshot, folder))

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in self._folder.iterdir()]
        except FileNotFoundError:
            return []


def _is_hub_part(text: str) -> bool:
    return HUB_PART.fullmatch(text) is not None and ".." not in text and "--" not in text


def _is_revision(text: str) -> bool:
    """Return whether a text may be a branch, a tag, a commit, or a reference such as `refs/pr/1`."""
    return len(text) <= MAX_REVISION and all(HUB_PART.fullmatch(part) and ".." not in part for part in text.split("/"))


def _commit(folder: Path, revision: str) -> str:
    path = folder / "refs" / revision
    if not path.exists():
        raise NotKnown(f"the revision {revision} is not in the cache")
    with CheckedFile(path, within=folder, limit=1024) as file:
        text = bytes(file.rest()).strip()
    commit = text.decode("ascii", "replace")
    if not COMMIT.fullmatch(commit):
        raise Refused(f"`{path.name}` in the cache does not name a commit")
    return commit


# --- Files -----------------------------------------------------------------------------------------------------------

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapters.npz", "pytorch_model.bin")
MAX_FOLDER: Final = 10_000
"""The most entries of a folder that are read."""


def is_outside(path: Path, folder: Path) -> bool:
    """Return whether a path, with its links resolved, leads out of a folder; a circular link does."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # Up to Python 3.12, for a circular link.
        return True


def list_folder(folder: Path) -> list[str]:
    """List the names in a folder, sorted; at most `MAX_FOLDER`."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in itertools.islice(found, MAX_FOLDER))


def locate(path: Path, within: Path | None = None) -> Files:
    """Find the files of the adapter at a path: a folder, its weights, or a GGUF file.

    Raises:
        Refused: there is no usable adapter.
    """
    if path.is_dir():
        return _in_folder(path, within)
    if not path.exists():
        raise Refused("no such file")
    config = path.with_name(CONFIG) if path.suffix == ".safetensors" else None
    return Files(weights=path, config=config, within=within)


def _in_folder(folder: Path, within: Path | None) -> Files:
    names = list_folder(folder)
    if CONFIG in names:
        for name in WEIGHTS.values():
            if name in names:
                return Files(weights=folder / name, config=folder / CONFIG, within=within)
    adapters = [name for name in names if name.endswith(".gguf") and is_adapter(folder / name, within)]
    if len(adapters) == 1:
        return Files(weights=folder / adapters[0], within=within)
    if adapters:
        raise Refused(f"the folder contains several adapters: {', '.join(adapters)}", "Name one of the files.")
    if pickles := [name for name in PICKLES if name in names]:
        raise Refused(
            f"`{pickles[0]}` is a pickle, which can run code when it is read",
            "Save the adapter as safetensors, the default of every current trainer.",
        )
    raise Refused(
        "the folder contains no adapter",
        f"It must contain {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )


def is_adapter(path: Path, within: Path | None) -> bool:
    """Return whether a GGUF file is an adapter, not a model, which some trainers put beside it."""
    try:
        with CheckedFile(path, within=within) as file:
            return read_head(file).is_adapter
    except Refused:
        return False
