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
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftage.gguf import MAX_HEAD
from graftage.settings import nearest
from graftage_lora._files import CheckedFile, Files, Refused, read_head

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

__all__ = [
    "HUB",
    "Broken",
    "Found",
    "Hub",
    "NotKnown",
    "Reference",
    "Source",
    "chain",
    "is_unreadable_registry",
    "name_problem",
    "parse",
]

REGISTRY: Final = "adapters.toml"
SHARED: Final = "blobs"
"""Where `huggingface_hub` since 2.0 keeps blobs of several repositories."""
PROJECT: Final = Path(".graftage") / "adapters"
HUB: Final = "hf://"
MAX_REFERENCE: Final = 4096
MAX_REGISTRY: Final = 1 << 20
NAME: Final = re.compile(r"\w[\w.+@ -]{0,127}")
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
            "a name must consist of letters, digits, `_`, `.`, `+`, `-`, `@` and spaces, "
            "without dots or spaces at its ends"
        )
    if DEVICES.fullmatch(unicodedata.normalize("NFKC", name.partition(".")[0]).strip()):
        return "it is a device on Windows"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An adapter's files, and what its registry states."""

    name: str
    reference: str
    """A reference that finds it again, unless another adapter has its name."""
    source: str
    path: Path
    """Its folder or file."""
    files: Files
    digest: str | None = None
    scale: float | None = None
    base_model: str | None = None
    bound: bool = False
    """Whether a registry names it: its path alone may then find another scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """An adapter without usable files; or, if it has no name, a place that cannot be read."""

    source: str
    path: Path
    error: Refused
    name: str = ""
    reference: str = ""


def is_unreadable_registry(entry: Found | Broken) -> bool:
    """Return whether an entry is a registry that cannot be read, and so refuses every name."""
    return isinstance(entry, Broken) and not entry.name and entry.path.name == REGISTRY


class Source(Protocol):
    """One place to look for adapters."""

    name: str
    settles: bool
    """Whether what it finds is the only meaning of a reference."""

    def find(self, reference: Reference) -> tuple[Found | Broken, ...]:
        """Find the adapters that a reference may mean.

        Raises:
            NotKnown: the source does not have it.
            Refused: the source has it, but it cannot be used; the search ends.
        """
        ...

    def known(self) -> Iterator[Found | Broken]:
        """List the adapters here, also those that cannot be used."""
        ...


def chain(settings: LoraSettings) -> tuple[Source, ...]:
    """Return the sources in the order in which they are asked."""
    hub = Hub(settings.hub)
    folders = [Folder(f"folder {each}", each) for each in settings.folders]
    if settings.project is not None:
        folders.append(Folder("project", settings.project / PROJECT, required=False))
    return (Paths(allowed=settings.paths), Registry(settings.registry, hub, trusted=True), *folders, hub)


def _locate_inside(path: Path, folder: Path) -> Files:
    if is_outside(path, folder):
        raise Refused(f"`{path.name}` leads out of its folder", f"Bind it by its path in the user's {REGISTRY}.")
    return locate(path, within=folder)


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
        if reference.is_hub or not re.search(r"[/\\]", text):
            raise NotKnown("it is not a path; start it with `./` to make it one")
        if not self._allowed:
            raise NotKnown("paths are disabled (`paths`)")
        if text.startswith("\\\\"):
            raise NotKnown("it is on another machine")
        path = Path(os.path.expanduser(text) if text.startswith("~/") else text)  # noqa: PTH111 - it never fails
        if not path.exists():
            pull = f"; `{HUB}{text}` is a repository of Hugging Face" if _is_repository(text) else ""
            raise NotKnown(f"no such file or folder{pull}")
        name = (path.parent if path.name in (CONFIG, *WEIGHTS.values()) else path).resolve().name.removesuffix(".gguf")
        return (Found(name=name or text, reference=text, source=self.name, path=path, files=locate(path)),)

    def known(self) -> Iterator[Found | Broken]:
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
        self._registry = Registry(folder / REGISTRY, None, trusted=False)

    def find(self, reference: Reference) -> tuple[Found | Broken, ...]:
        """Find the adapters of a name: the folder may have one in files and a GGUF file beside it."""
        name = reference.name
        if problem := name_problem(name):
            raise NotKnown(problem)
        names = self._names()
        try:
            if bound := self._registry.get(name):
                return (replace(bound, source=self.name),)
        except Refused as error:
            path = self._folder / REGISTRY
            return (Broken(name=name, reference=name, source=self.name, path=path, error=error),)
        found = tuple(self._entry(name, each) for each in names if composed(each) in (name, f"{name}.gguf"))
        if not found:
            raise NotKnown(_not_listed(name, names))
        return found

    def known(self) -> Iterator[Found | Broken]:
        """List all adapters in the folder."""
        try:
            names = self._names()
        except NotKnown as reason:
            if self._required:
                yield Broken(source=self.name, path=self._folder, error=Refused(str(reason)))
            return
        except OSError as error:
            yield Broken(source=self.name, path=self._folder, error=Refused(_error_text(error)))
            return
        bound = list(self._registry.known())
        yield from (replace(each, source=self.name) for each in bound)
        taken = {each.name for each in bound}
        for entry in names:
            name = composed(entry).removesuffix(".gguf")
            if name not in taken and name_problem(name) is None and self._may_be_adapter(entry):
                yield self._entry(name, entry)

    def _entry(self, name: str, entry: str) -> Found | Broken:
        path = self._folder / entry
        try:
            files = _locate_inside(path, self._folder)
        except Refused as error:
            refused = error
        except OSError as error:
            refused = Refused(_error_text(error))
        else:
            return Found(name=name, reference=name, source=self.name, path=path, files=files)
        return Broken(name=name, reference=name, source=self.name, path=path, error=refused)

    def _may_be_adapter(self, entry: str) -> bool:
        """Return whether an entry is an adapter or a broken one, not something else that lies in the folder."""
        path = self._folder / entry
        try:
            if is_outside(path, self._folder):
                return True
            return has_adapter(path, self._folder) if path.is_dir() else is_gguf_adapter(path, self._folder)
        except OSError:
            return True

    def _names(self) -> list[str]:
        try:
            return list_folder(self._folder)
        except FileNotFoundError:
            raise NotKnown("the folder does not exist") from None


MARK: Final = re.compile(r"adapter_config\.json|adapter_model\..+|adapters\.(safetensors|npz)|checkpoint-\d+")
"""Names that a folder with an adapter has, even if it is not usable."""


def has_adapter(folder: Path, within: Path) -> bool:
    """Return whether a folder contains an adapter, usable or not."""
    names = list_folder(folder)
    return any(MARK.fullmatch(each) for each in names) or any(is_gguf_adapter(folder / each, within) for each in names)


def is_gguf_adapter(path: Path, within: Path) -> bool:
    """Return whether a path is a GGUF adapter, usable or not: a file with that ending, but no model."""
    try:
        with CheckedFile(path, within=within) as file:
            return path.suffix == ".gguf" and read_head(file, MAX_HEAD).is_adapter
    except Refused:
        return path.suffix == ".gguf"


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

    In the user's registry a path may lead anywhere. A folder's registry may come with a stranger's project: its paths
    must stay in the folder. A registry that cannot be read might bind any name, so it refuses all names: otherwise
    another adapter with that name could be found elsewhere.
    """

    name = "registry"
    settles = True

    def __init__(self, path: Path, hub: Hub | None, *, trusted: bool) -> None:
        self._path = path
        self._hub = hub
        self._trusted = trusted

    def find(self, reference: Reference) -> tuple[Found]:
        """Find the files of a name."""
        if problem := name_problem(reference.name):
            raise NotKnown(problem)
        if found := self.get(reference.name):
            return (found,)
        raise NotKnown(f"it is not in {self._path}")

    def get(self, name: str) -> Found | None:
        """Find the files of a name; return `None` if it is not bound.

        Raises:
            Refused: the files of a bound name, or the registry, cannot be read.
        """
        document = self._document()
        return self._found(name, document[name]) if name in document else None

    def known(self) -> Iterator[Found | Broken]:
        """List all names, also those whose files do not exist."""
        try:
            document = self._document()
        except Refused as error:
            yield Broken(source=self.name, path=self._path, error=error)
            return
        for name, entry in document.items():
            try:
                if problem := name_problem(name):
                    raise Refused(problem)
                yield self._found(name, entry)
            except Refused as error:
                yield Broken(name=name, reference=name, source=self.name, path=self._path, error=error)

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
            path, files = self._files(binding.path)
        except (NotKnown, OSError) as error:
            raise Refused(f"{self._path} binds it to `{binding.path[:200]}`: {_error_text(error)}") from None
        return Found(
            name=name,
            reference=name,
            source=self.name,
            path=path,
            files=files,
            bound=True,
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

    def _files(self, path: str) -> tuple[Path, Files]:
        if path.startswith(HUB):
            if self._hub is None:
                raise Refused("only the user's registry may name a repository of Hugging Face")
            (found,) = self._hub.find(Reference(text=path))
            return found.path, found.files
        folder = self._path.parent
        whole = folder / (os.path.expanduser(path) if self._trusted else path)  # noqa: PTH111 - not at its beginning only
        return whole, locate(whole) if self._trusted else _locate_inside(whole, folder)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Hub:
    """The cache of `huggingface_hub`, never the network: `hf://owner/name` or `hf://owner/name@revision`."""

    name = "hub"
    settles = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, reference: Reference) -> tuple[Found]:
        """Find the files of a repository."""
        if not reference.is_hub:
            raise NotKnown(f"it does not start with `{HUB}`")
        owner, name, revision = split_repository(reference.text)
        return (self._found(owner, name, revision),)

    def known(self) -> Iterator[Found | Broken]:
        """List all repositories that are adapters, in each revision that is here."""
        for entry in self._names():
            kind, *parts = entry.split("--", 2)
            if kind == "models" and len(parts) == 2 and all(map(_is_hub_part, parts)):
                yield from self._revisions(parts[0], parts[1], self._folder / entry)

    def _revisions(self, owner: str, name: str, folder: Path) -> Iterator[Found | Broken]:
        shown = set()
        for revision in ("", *_refs(folder), *_list_names(folder / "snapshots")):
            path = folder
            try:
                commit = revision if COMMIT.fullmatch(revision) else _commit(folder, revision or "main")
                path = folder / "snapshots" / commit
                if commit in shown or not path.is_dir() or not has_adapter(path, self._folder):
                    continue  # Most repositories are models.
                shown.add(commit)
                yield self._found(owner, name, revision)
            except NotKnown:
                continue
            except (Refused, OSError) as error:
                refused = error if isinstance(error, Refused) else Refused(_error_text(error))
                text = f"{HUB}{owner}/{name}" + (f"@{revision}" if revision else "")
                yield Broken(name=name, reference=text, source=self.name, path=path, error=refused)

    def _found(self, owner: str, name: str, revision: str) -> Found:
        entry = f"models--{owner}--{name}"
        text = f"{owner}/{name}" + (f"@{revision}" if revision else "")
        pull = f"download it with `graftage adapters pull {text}`"
        if entry not in self._names():
            raise NotKnown(f"{self._folder} does not have it; {pull}")
        folder = self._folder / entry
        commit = revision if COMMIT.fullmatch(revision) else _commit(folder, revision or "main")
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise NotKnown(f"{self._folder} does not have its revision {revision or 'main'}; {pull}")
        files = self._located(snapshot, folder)
        return Found(name=name, reference=f"{HUB}{text}", source=self.name, path=snapshot, files=files)

    def _located(self, snapshot: Path, folder: Path) -> Files:
        """Find the files of a snapshot: links to the repository's blobs, or to those that all repositories share."""
        files = locate(snapshot, within=self._folder)
        for each in (snapshot, files.weights, files.config):
            if each is not None and all(is_outside(each, where) for where in (folder, self._folder / SHARED)):
                raise Refused(f"`{each.name}` leads out of its folder", "Download it again.")
        return files

    def _names(self) -> list[str]:
        return _list_names(self._folder)


def _list_names(folder: Path) -> list[str]:
    try:
        return list_folder(folder)
    except FileNotFoundError:
        return []


def _refs(folder: Path) -> list[str]:
    """List the branches and tags of a repository in the cache, without those that contain `/`."""
    return [each for each in _list_names(folder / "refs") if each != "main" and _is_revision(each)]


def split_repository(text: str) -> tuple[str, str, str]:
    """Split `hf://owner/name@revision` into owner, name and revision, which may be empty.

    Raises:
        NotKnown: it has another form.
    """
    repository, _, revision = text.removeprefix(HUB).partition("@")
    parts = repository.split("/")
    if len(parts) != 2 or not all(map(_is_hub_part, parts)) or not _is_revision(revision or "main"):
        raise NotKnown(f"`{HUB}` must be followed by `owner/name` or `owner/name@revision`")
    return parts[0], parts[1], revision


def _is_repository(text: str) -> bool:
    try:
        return bool(split_repository(text))
    except NotKnown:
        return False


def _is_hub_part(text: str) -> bool:
    return HUB_PART.fullmatch(text) is not None and ".." not in text and "--" not in text


def _is_revision(text: str) -> bool:
    """Return whether a text may be a branch, a tag, a commit, or a reference such as `refs/pr/1`."""
    return len(text) <= MAX_REVISION and all(HUB_PART.fullmatch(part) and ".." not in part for part in text.split("/"))


def _commit(folder: Path, revision: str) -> str:
    path = folder / "refs" / revision
    if not path.exists():
        raise NotKnown(f"its revision {revision} is not in the cache")
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
PART: Final = re.compile(r"(adapter_model|adapters?)[-_]\d{1,5}-of-\d{1,5}\.(safetensors|bin)")
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
    models = [name for name in names if name.endswith(".gguf")]
    adapters = [name for name in models if is_adapter(folder / name, within)]
    if len(adapters) == 1:
        return Files(weights=folder / adapters[0], within=within)
    if adapters:
        raise Refused(f"the folder contains several adapters: {', '.join(adapters)}", "Name one of the files.")
    for name in models:
        CheckedFile(folder / name, within=within).close()  # It may say why it cannot be read.
    raise _nothing_usable(folder, names, weights)


def _nothing_usable(folder: Path, names: list[str], weights: str | None) -> Refused:
    """Return why a folder contains no adapter, and the way out."""
    if weights:
        return Refused(f"`{CONFIG}` with the scale is missing beside `{weights}`", "Put it into the folder.")
    if parts := [name for name in names if PART.fullmatch(name)]:
        joined = WEIGHTS["mlx" if parts[0].startswith("adapters") else "peft"]
        return Refused(
            f"its weights are in parts, the first is `{parts[0]}`",
            f"Join them with the package safetensors: load each with `load_file`, and save all tensors as `{joined}`.",
        )
    if pickles := [name for name in names if name in PICKLES and "config.json" not in names]:
        return Refused(
            f"`{pickles[0]}` is a pickle, which can run code when it is read",
            "Save the adapter as safetensors, the default of every current trainer.",
        )
    if "config.json" in names or any(name.endswith(".gguf") for name in names):
        return Refused("the folder contains a whole model, not an adapter", "Use it as the model instead.")
    if saved := [name for name in names if name.endswith(f"_{WEIGHTS['mlx']}")]:
        return Refused(
            f"the folder contains only saved steps, the last is `{saved[-1]}`",
            f"Copy it to `{WEIGHTS['mlx']}`, beside {CONFIG}.",
        )
    if inner := sorted((name for name in names if (folder / name / CONFIG).is_file()), key=_step):
        what = "its checkpoints do" if inner[-1].startswith("checkpoint-") else "folders in it do"
        return Refused(f"the folder contains no adapter, but {what}", f"Name the last one: `{folder / inner[-1]}`.")
    return Refused(
        "the folder contains no adapter",
        f"It must contain {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )


def _step(name: str) -> tuple[int, str]:
    number = name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and len(number) < 10 else -1, name


def is_adapter(path: Path, within: Path | None) -> bool:
    """Return whether a GGUF file is an adapter, not a model, which some trainers put beside it."""
    try:
        with CheckedFile(path, within=within) as file:
            return read_head(file).is_adapter
    except Refused:
        return False
