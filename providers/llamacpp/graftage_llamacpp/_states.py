"""Prompts that have been read, saved to disk, so that a later process continues from them.

KEY-TEXT.state        what the engine computed for the beginning of prompts, with the tokens of that text
KEY-TEXT.state.json   the note beside it
*.part                unfinished, or left behind by a process that was killed

The key stands for all that the numbers depend on: the files of the model and of each adapter, with its weight, the
window and the engine. A state with another key is never used. The note has hashes of the text, not the text.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from graftage.exceptions import ConnectionFailed, StreamInterrupted
from graftage_llamacpp._process import file_state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from graftage_llamacpp._process import FileState, Process, Scales, SlotUse

__all__ = ["Place", "State", "States", "key_of"]

Post: TypeAlias = "Callable[[str, Mapping[str, object]], Awaitable[Mapping[str, Any]]]"
"""Sends JSON to a path of the engine; returns its answer, which is empty if the engine refused."""
Run: TypeAlias = "Callable[..., Awaitable[Any]]"
"""Runs code that blocks."""
SUFFIX: Final = ".state"
STEP: Final = 512
"""Characters between two hashes of a text."""
STALE: Final = 3600.0
"""Seconds after which nobody still writes an unfinished file."""


# --- What the numbers depend on --------------------------------------------------------------------------------------


def key_of(process: Process, digest: str | None, scales: Scales) -> str | None:
    """Return the key of what a child computes with a scale for each of its adapters.

    None if that is unknown, since a file has changed after the child loaded it. `digest` is that of the model's file,
    if known.
    """
    adapters = []
    for file, scale in zip(process.adapters.values(), scales, strict=True):
        if scale:
            # The digest of an adapter is that of its source, which another version may convert to another file.
            content = _digest(file.path, file.state)
            if content is None:
                return None
            adapters.append((content, scale))
    model = process.state or ()
    facts = {
        "format": 1,
        "engine": process.version,
        # Size and time belong to the file that was loaded, also if the digest was read before a change.
        "model": (digest, model[2:4]) if digest else model,
        "window": process.window,
        "slots": process.launch.slots,
        "gpu_layers": process.launch.gpu_layers,
        "adapters": sorted(adapters),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _digest(path: Path, state: FileState | None) -> str | None:
    """Return the digest of a file that is still in a state; None if it has changed or cannot be read."""
    try:
        found = _hash(path, state)
    except OSError:
        return None
    return found if file_state(path) == state else None


@functools.lru_cache(maxsize=256)
def _hash(path: Path, _state: FileState | None) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The folder ------------------------------------------------------------------------------------------------------


class State(BaseModel):
    """The note of a saved state. It comes from a file, which may be damaged."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    key: str
    tokens: int = Field(gt=0)
    size: int = Field(gt=0)
    digest: str
    length: int = Field(gt=0)
    """Characters of the text."""
    marks: tuple[str, ...] = Field(strict=False, min_length=1)
    """Hashes of the text's first 512 characters, first 1024, and so on; the last one is of the whole text."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.key}-{self.marks[-1]}{SUFFIX}"

    def matching(self, text: str) -> int:
        """Count the characters that a text has in common with the saved one, in steps."""
        pairs = zip(self.marks, _marks(text[: self.length]), strict=False)
        return min(self.length, STEP * sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _marks(text: str) -> Iterator[str]:
    sha = hashlib.sha256()
    for begin in range(0, len(text), STEP):
        sha.update(text[begin : begin + STEP].encode(errors="surrogatepass"))
        yield sha.hexdigest()[:32]


class States:
    """The saved states in one folder, which may not exist yet."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        """Bytes of all states; the least recently used goes first."""

    def exist(self) -> bool:
        """Whether there may be any."""
        return os.path.isdir(self.folder)  # noqa: PTH112 - false also for a folder that must not be looked at

    def has(self, key: str) -> bool:
        """Whether there is any state with a key."""
        return any(self.folder.glob(f"{key}-*{SUFFIX}.json"))

    def find(self, key: str, text: str) -> tuple[State, int] | None:
        """Return the state that has the most in common with a text, and how many characters."""
        found = [(state, state.matching(text)) for state in self._with_key(key)]
        best = max(found, key=lambda each: (each[1], -each[0].length), default=None)
        return best if best and best[1] else None

    def _with_key(self, key: str) -> Iterator[State]:
        for path in self.folder.glob(f"{key}-*{SUFFIX}.json"):
            try:
                if _is_ours(path) and _is_ours(path.with_suffix("")):
                    state = State.model_validate_json(path.read_bytes())
                    if state.name == path.stem:
                        yield state
            except (FileNotFoundError, ValueError):
                self.delete(path.stem)
            except OSError:
                continue  # Perhaps too many files are open now.

    def is_whole(self, state: State) -> bool:
        """Whether a state is as it was saved. If not, it is deleted: the engine may crash on it."""
        path = self.folder / state.name
        found = _digest(path, file_state(path))
        if found == state.digest:
            with contextlib.suppress(OSError):
                os.utime(path.with_name(f"{path.name}.json"))  # It is used.
        elif found:
            self.delete(state.name)
        return found == state.digest

    def delete(self, name: str) -> None:
        """Delete a state, if it exists."""
        for path in (self.folder / f"{name}.json", self.folder / name):
            with contextlib.suppress(OSError):
                path.unlink()

    def new_part(self) -> str:
        """Make the folder, which only this user can read, and return a name for an unfinished file.

        Raises:
            OSError: the folder cannot be made.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return f"{secrets.token_hex(8)}.part"

    def install(self, part: str, key: str, text: str, tokens: int) -> None:
        """Give a finished file its name, write its note, and make room for it.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self.folder / part
        digest, size, marks = _hash(path, file_state(path)), path.stat().st_size, tuple(_marks(text))
        state = State(key=key, tokens=tokens, size=size, digest=digest, length=len(text), marks=marks)
        note = self.folder / f"{part}.json"
        note.touch(0o600)
        note.write_text(state.model_dump_json(), encoding="utf-8")
        path.replace(self.folder / state.name)
        note.replace(self.folder / f"{state.name}.json")
        self.prune(state)

    def prune(self, kept: State) -> None:
        """Delete what is beyond the limit, except one, and what was left behind."""
        used: list[tuple[float, int, str]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == SUFFIX and path.name != kept.name:
                    note = path.with_name(f"{path.name}.json")
                    used.append((note.stat().st_mtime if note.exists() else 0.0, status.st_size, path.name))
                elif ".part" in path.suffixes and time.time() - status.st_mtime > STALE:
                    path.unlink()
        room = self.limit - kept.size
        for _, size, name in sorted(used, reverse=True):
            room -= size
            if room < 0:
                self.delete(name)


def _is_ours(path: Path) -> bool:
    """Whether only this user can have written a file."""
    status = path.stat()
    return os.name != "posix" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


# --- One request -----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Place:
    """The slot of one request, and where its prompt is saved."""

    states: States
    key: str
    use: SlotUse
    keep: int
    """Tokens of the prompt, to save after it was read; 0 to save nothing."""
    post: Post
    run: Run
    size: int | None = None
    """Bytes of the saved prompt; None if it is not saved."""
    problem: str = ""
    """Why it was not saved."""
    broken: bool = False
    """Whether the engine ended while it restored a state, which is deleted: another attempt is safe."""

    async def restore(self, scales: object) -> None:
        """Restore the best saved state, unless the slot has as much itself. The request may then use the cache.

        Args:
            scales: The `lora` of the request. A restored state stays only if the slot's last request had the same.
        """
        use = self.use
        found = await self.run(self.states.find, self.key, use.rendered)
        if found is None or not use.alone or use.has(use.rendered[: found[1]]):
            return
        state = found[0]
        if not await self.run(self.states.is_whole, state):
            return
        first = {"prompt": "", "n_predict": 0, "id_slot": use.number, "cache_prompt": False, "lora": scales}
        try:
            if scales:
                await self.post("/completion", first)
            answer = await self.post(f"/slots/{use.number}?action=restore", {"filename": state.name})
        except (ConnectionFailed, StreamInterrupted):
            self.states.delete(state.name)
            self.broken = True
            raise
        whole = answer.get("n_restored") == state.tokens
        if not whole:
            self.states.delete(state.name)
        use.restored(state.tokens if whole and use.alone else None)

    async def save(self) -> None:
        """Save the slot's state after its prompt was read, unless it is saved already."""
        text = self.use.rendered
        found = await self.run(self.states.find, self.key, text)
        if found and found[1] == len(text) == found[0].length and await self.run(self.states.is_whole, found[0]):
            self.size = found[0].size
            return
        try:
            self.problem = await self._save(await self.run(self.states.new_part), text)
        except OSError as error:
            self.problem = f"the folder {self.states.folder} cannot be written ({error.strerror})"

    async def _save(self, part: str, text: str) -> str:
        path = self.states.folder / part
        try:
            answer = await self.post(f"/slots/{self.use.number}?action=save", {"filename": part})
            if not self.use.alone:
                return "other requests use its slot"
            if answer.get("n_saved") != self.keep:
                return f"the engine cannot write it to {self.states.folder}"
            if (size := path.stat().st_size) > self.states.limit:
                return f"its {size} bytes are more than the setting `prompts_bytes` allows"
            await self.run(self.states.install, part, self.key, text, self.keep)
            self.size = size
            return ""
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
