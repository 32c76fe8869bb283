"""Where adapters are found: a chain of sources, each of which finds the files of a reference or says why it passes.

A name is one component: it is looked up in the listing of a folder, exactly as it is written there, and never joined
to a path unseen. So no name leaves its folder, whatever the file system makes of case, dots, colons or device names. A
link is followed only where it stays inside.
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
    """Why a source does not know a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What was asked for."""

    text: str
    """Without the digest."""
    digest: str | None = None
    """The beginning of the digest that it must have, in hex."""

    @property
    def is_hub(self) -> bool:
        """Whether it is a repository of the Hugging Face cache."""
        return self.text.startswith(HUB)

    @property
    def name(self) -> str:
        """It as a name, in one form of those that Unicode has for a letter: some systems write another into folders."""
        return composed(self.text)


def parse(text: str) -> Reference:
    """Read a reference: `name`, `name@digest`, `hf://owner/name`, or a path.

    Raises:
        NotKnown: it is none of these on any system.
    """
    if not text.strip() or len(text) > MAX_REFERENCE or any(unicodedata.category(each)[0] == "C" for each in text):
        raise NotKnown("it is empty, too long, or holds control characters")
    match = PINNED.fullmatch(text)
    # After a repository, bare hex is a commit.
    if match and (match[2] or not text.startswith(HUB)):
        return Reference(text=match[1], digest=match[2] or match[3])
    return Reference(text=text)


def composed(text: str) -> str:
    """A text with each letter and its accents as one character, where there is one."""
    return unicodedata.normalize("NFC", text)


def name_problem(name: str) -> str | None:
    """Why a text is no name; `None` where it is one, on every system."""
    if "/" in name or "\\" in name:
        return "it has separators of a path in it"
    if not NAME.fullmatch(name) or name.endswith((".", " ")):
        return "a name has letters, digits, `_`, `.`, `+`, `-` and spaces, and no dot or space at its ends"
    if DEVICES.fullmatch(unicodedata.normalize("NFKC", name.partition(".")[0]).strip()):
        return "it is a device on Windows"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter's files, and what its registry says of it."""

    name: str
    reference: str
    """What finds it again."""
    source: str
    files: Files
    digest: str | None = None
    scale: float | None = None
    base_model: str | None = None


class Source(Protocol):
    """One place to look."""

    name: str

    def find(self, reference: Reference) -> Found:
        """The files of a reference.

        Raises:
            NotKnown: it is not known here.
            Refused: it is, and the answer is no.
        """
        ...

    def known(self) -> Iterator[Found]:
        """What is known here; what is broken is left out."""
        ...


def chain(settings: LoraSettings) -> tuple[Source, ...]:
    """The sources in the order in which they are asked."""
    hub = Hub(settings.hub)
    folders = [Folder(f"folder {each}", each) for each in settings.folders]
    if settings.project is not None:
        folders.append(Folder("project", settings.project / PROJECT))
    return (Paths(allowed=settings.paths), Registry(settings.registry, hub, trusted=True), *folders, hub)


def _locate_inside(path: Path, folder: Path) -> Files:
    if is_outside(path, folder):
        raise Refused(f"`{path.name}` leads out of its folder", f"Bind it by its path in the user's own {REGISTRY}.")
    return locate(path, within=folder)


# --- An explicit path ------------------------------------------------------------------------------------------------


class Paths:
    """A path, in so many words: it may be anywhere, since the caller chose it."""

    name = "path"

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed

    def find(self, reference: Reference) -> Found:
        """The files at a path."""
        text = reference.text
        if reference.is_hub or not re.search(r"[/\\]", text):
            raise NotKnown("it is no path; `./` before it would make it one")
        if not self._allowed:
            raise NotKnown("paths are switched off (`paths`)")
        if text.startswith("\\\\"):
            raise NotKnown("it is on another machine")
        path = Path(os.path.expanduser(text) if text.startswith("~/") else text)  # noqa: PTH111 - it never fails
        if not path.exists():
            raise NotKnown("there is no such file or folder")
        name = (path.parent if path.name in (CONFIG, *WEIGHTS.values()) else path).resolve().name.removesuffix(".gguf")
        return Found(name=name or text, reference=text, source=self.name, files=locate(path))

    def known(self) -> Iterator[Found]:
        """Nothing: there is no end of paths."""
        yield from ()


# --- A folder of adapters, and its registry --------------------------------------------------------------------------


class Folder:
    """A folder whose entries are adapters: `NAME/`, `NAME.gguf`, or bound by name in its `adapters.toml`."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._registry = Registry(folder / REGISTRY, None, trusted=False)

    def find(self, reference: Reference) -> Found:
        """The files of a name."""
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
        """All adapters in the folder."""
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
            raise NotKnown("the folder is not there") from None


def _by_name(document: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a registry by names in one form."""
    entries = {composed(name): entry for name, entry in document.items()}
    if len(entries) < len(document):
        raise ValueError("two of its names differ only in how their accents are written")
    return entries


def _error_text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _not_listed(name: str, names: Iterable[str]) -> str:
    others = [each for each in names if each.removesuffix(".gguf").casefold() == name.casefold()]
    return f"there is `{others[0]}`, written otherwise" if others else "there is no such entry"


class Binding(BaseModel):
    """What a registry says of a name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="The adapter's files, from the registry's folder; or `hf://owner/name`")
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

    In the user's own file a path may lead anywhere; in that of a folder, which may come with somebody's project, it
    stays in the folder. A file that cannot be read may bind any name, and to a digest: it answers for all of them, and
    the answer is no. Else another adapter of that name would be taken from somewhere else.
    """

    name = "registry"

    def __init__(self, path: Path, hub: Hub | None, *, trusted: bool) -> None:
        self._path = path
        self._hub = hub
        self._trusted = trusted

    def find(self, reference: Reference) -> Found:
        """The files of a name."""
        if problem := name_problem(reference.name):
            raise NotKnown(problem)
        if found := self.get(reference.name):
            return found
        raise NotKnown(f"it is not in {self._path}")

    def get(self, name: str) -> Found | None:
        """The files of a name, or `None`.

        Raises:
            Refused: the name is bound and its files cannot be had, or the file cannot be read.
        """
        document = self._document()
        return self._found(name, document[name]) if name in document else None

    def known(self) -> Iterator[Found]:
        """All names whose files are there."""
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
                "Mend it, or move it away.",
            ) from None

    def _found(self, name: str, entry: Any) -> Found:
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

    def _binding(self, name: str, entry: Any) -> Binding:
        if not isinstance(entry, Mapping):
            raise Refused(f"{self._path} has no table `[{name}]` but a value of that name")
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
            raise Refused(f"{self._path} has a wrong `{where}` in `[{name}]`: {first['msg']}") from None

    def _files(self, path: str) -> Files:
        if path.startswith(HUB):
            if self._hub is None:
                raise Refused("only the user's own registry may name a repository of the Hugging Face cache")
            return self._hub.find(Reference(text=path)).files
        folder = self._path.parent
        whole = folder / (os.path.expanduser(path) if self._trusted else path)  # noqa: PTH111 - not at its beginning only
        return locate(whole) if self._trusted else _locate_inside(whole, folder)


# --- The cache of Hugging Face ---------------------------------------------------------------------------------------


class Hub:
    """What `huggingface_hub` has downloaded: `hf://owner/name`, or `hf://owner/name@revision`. Never the network."""

    name = "hub"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, reference: Reference) -> Found:
        """The files of a repository."""
        if not reference.is_hub:
            raise NotKnown(f"it does not begin with `{HUB}`")
        repository, _, revision = reference.text.removeprefix(HUB).partition("@")
        parts = repository.split("/")
        if len(parts) != 2 or not all(map(_is_hub_part, parts)) or not _is_revision(revision or "main"):
            raise NotKnown(f"`{HUB}` is followed by an owner and a name, and perhaps `@` and a revision")
        return self._found(parts[0], parts[1], revision)

    def known(self) -> Iterator[Found]:
        """All repositories that are adapters."""
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
    """Whether it may be a branch, a tag, a commit, or a reference such as `refs/pr/1`."""
    return len(text) <= MAX_REVISION and all(HUB_PART.fullmatch(part) and ".." not in part for part in text.split("/"))


def _commit(folder: Path, revision: str) -> str:
    path = folder / "refs" / revision
    if not path.exists():
        raise NotKnown(f"its revision {revision} is not in the cache")
    with CheckedFile(path, within=folder, limit=1024) as file:
        text = bytes(file.rest()).strip()
    commit = text.decode("ascii", "replace")
    if not COMMIT.fullmatch(commit):
        raise Refused(f"`{path.name}` in the cache names no commit")
    return commit


# --- The files of an adapter, in the layouts that trainers write -----------------------------------------------------

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapters.npz", "pytorch_model.bin")
MAX_FOLDER: Final = 10_000
"""Entries of a folder that are looked at."""


def is_outside(path: Path, folder: Path) -> bool:
    """Whether a path, all links followed, leads out of a folder; a link that goes round leads nowhere in it."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # Python up to 3.12
        return True


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, sorted; of a very large one, some of them."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in itertools.islice(found, MAX_FOLDER))


def locate(path: Path, within: Path | None = None) -> Files:
    """The files of the adapter at a path: a folder, its weights, or a GGUF file.

    Raises:
        Refused: there is nothing usable there.
    """
    if path.is_dir():
        return _in_folder(path, within)
    if not path.exists():
        raise Refused("there is no such file")
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
        raise Refused(f"the folder holds several adapters: {', '.join(adapters)}", "Name the file you mean.")
    if pickles := [name for name in PICKLES if name in names]:
        raise Refused(
            f"`{pickles[0]}` is a pickle, which can run any program when it is read",
            "Save the adapter as safetensors, the default of every current trainer.",
        )
    raise Refused(
        "the folder holds no adapter",
        f"Expected are {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )


def is_adapter(path: Path, within: Path | None) -> bool:
    """Whether a GGUF file is an adapter and not a model, which some trainers put beside it."""
    try:
        with CheckedFile(path, within=within) as file:
            return read_head(file).is_adapter
    except Refused:
        return False
