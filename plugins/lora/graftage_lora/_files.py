"""Files that nobody vouches for: opened once, then checked, hashed and read from that one descriptor."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Files", "Opened", "Refused", "locate", "outside"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapters.npz", "pytorch_model.bin")
MAX_FOLDER: Final = 10_000
"""Entries of a folder that are looked at."""


class Refused(Exception):
    """Why a file is not used, as the rest of a sentence; and the way out, where there is one."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where an adapter lies."""

    weights: Path
    config: Path | None = None
    """Beside the weights of PEFT and MLX; a GGUF file needs none."""
    within: Path | None = None
    """The folder that no link may lead out of."""

    def signature(self) -> tuple[tuple[int, ...], ...]:
        """Changes when a file does, as far as the file system tells."""
        found = [os.stat(each) for each in (self.weights, self.config) if each is not None]
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def outside(path: Path, folder: Path) -> bool:
    """Whether a path, all links followed, leads out of a folder."""
    return not path.resolve().is_relative_to(folder.resolve())


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
    names = sorted(entry.name for _, entry in zip(range(MAX_FOLDER), folder.iterdir()))  # noqa: B905 - a limit
    if CONFIG in names:
        for name in WEIGHTS.values():
            if name in names:
                return Files(weights=folder / name, config=folder / CONFIG, within=within)
    adapters = [name for name in names if name.endswith(".gguf") and _is_adapter(folder / name, within)]
    if len(adapters) == 1:
        return Files(weights=folder / adapters[0], within=within)
    if adapters:
        raise Refused(f"the folder holds several adapters: {', '.join(adapters)}", "Name the file you mean.")
    if pickles := [name for name in PICKLES if name in names]:
        raise Refused(*_pickle(pickles[0]))
    raise Refused(
        "the folder holds no adapter",
        f"Expected are {CONFIG} with {' or '.join(WEIGHTS.values())}, or one GGUF adapter.",
    )


def _is_adapter(path: Path, within: Path | None) -> bool:
    """Whether a GGUF file is an adapter and not a model, which some trainers put beside it."""
    from graftage_lora._gguf import is_adapter  # noqa: PLC0415 - that module needs this one

    try:
        with Opened(path, within=within) as file:
            return is_adapter(file)
    except Refused:
        return False


def _pickle(name: str) -> tuple[str, str]:
    return (
        f"`{name}` is a pickle, which can run any program when it is read",
        "Save the adapter as safetensors, the default of every current trainer.",
    )


class Opened:
    """A file that is read from front to back, no further than its size, and hashed on the way.

    Raises:
        Refused: it is not a regular file, is too large, leads out of its folder, or cannot be read.
    """

    def __init__(self, path: Path, *, within: Path | None = None, limit: int | None = None) -> None:
        self.name = path.name
        self.position = 0
        self._hash = hashlib.sha256()
        if within is not None and outside(path, within):
            raise Refused(f"`{self.name}` is a link that leads out of its folder", "Put the file itself there.")
        # Without O_NONBLOCK, opening a named pipe would wait for ever for its other end.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise Refused(f"`{self.name}` cannot be opened: {error.strerror}") from None
        self._file: IO[bytes] = os.fdopen(descriptor, "rb")
        self.state = os.fstat(descriptor)
        self.size = self.state.st_size
        self._check(limit)

    def _check(self, limit: int | None) -> None:
        problem = None
        if not stat.S_ISREG(self.state.st_mode):
            problem = Refused(f"`{self.name}` is not a regular file")
        elif self.size == 0:
            problem = Refused(f"`{self.name}` is empty")
        elif limit is not None and self.size > limit:
            problem = Refused(
                f"`{self.name}` has {self.size:,} bytes, and {limit:,} are allowed",
                "If it is what you want, raise GRAFTAGE_LORA_MAX_BYTES.",
            )
        if problem:
            self.close()
            raise problem

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next bytes; asking for more than there are allocates nothing."""
        if not 0 <= count <= self.left:
            raise Refused(f"`{self.name}` ends within its {what}")
        data = self._file.read(count)
        self._advance(data, count)
        return data

    def rest(self) -> memoryview:
        """Everything that is left."""
        data = self._file.read(self.left)
        self._advance(data, self.left)
        return memoryview(data)

    def _advance(self, data: bytes, count: int) -> None:
        if len(data) != count:
            raise Refused(f"`{self.name}` became shorter while it was read")
        self._hash.update(data)
        self.position += count

    def peek(self, count: int) -> bytes:
        """The first bytes, without reading them; at most what there is."""
        return self._file.peek(count)[:count]  # type: ignore[attr-defined] # a buffered reader has it

    def read_at(self, position: int, count: int) -> bytes:
        """Bytes from anywhere, outside the hash: for files too large to keep."""
        self._file.seek(position)
        data = self._file.read(count)
        if len(data) != count:
            raise Refused(f"`{self.name}` became shorter while it was read")
        return data

    @property
    def sha256(self) -> str:
        """Over what has been read."""
        return self._hash.hexdigest()

    def unchanged(self) -> bool:
        """Whether the file is still as it was when it was opened."""
        now = os.fstat(self._file.fileno())
        return (now.st_size, now.st_mtime_ns) == (self.size, self.state.st_mtime_ns)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
