"""Untrusted files: opened once, then checked, hashed and read from that descriptor; and the heads of GGUF files."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from graftage import gguf
from graftage.gguf import GgufError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["CONFIG", "MORE", "WEIGHTS", "CheckedFile", "Files", "Refused", "read_head"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
ADAPTER_HEAD: Final = 1 << 22
"""The largest head of an adapter in bytes: adapters have no vocabulary."""
# Without O_NONBLOCK, opening a named pipe would wait forever for its other end. The path is resolved before it is
# checked and opened; O_NOFOLLOW refuses a link that appears in between.
FLAGS: Final = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW"))
MORE: Final = "Raise `GRAFTAGE_LORA_MAX_BYTES` to allow it."
POINTER: Final = b"version https://git-lfs.github.com/"


class Refused(Exception):
    """Why a file cannot be used, as the rest of a sentence, with a hint if there is one."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of an adapter."""

    weights: Path
    config: Path | None = None
    """PEFT and MLX have one beside the weights, GGUF does not."""
    within: Path | None = None
    """The folder that links must not leave."""

    def signature(self) -> tuple[tuple[int, ...], ...]:
        """Return a value that changes when a file changes, as far as the file system shows."""
        try:
            found = [each.stat() for each in (self.weights, self.config) if each is not None and each.exists()]
        except OSError as error:
            raise Refused(f"it cannot be read: {error.strerror}") from None
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def _open(path: Path, within: Path | None) -> int:
    try:
        real = path.resolve()
        if within is not None and not real.is_relative_to(within.resolve()):
            raise Refused(f"`{path.name}` is a link out of its folder", "Put the file itself there.")
        return os.open(real, FLAGS)
    except ValueError:
        raise Refused(f"{path.name!r} is not a valid file name") from None
    except RuntimeError:  # Up to Python 3.12, for a circular link.
        raise Refused(f"`{path.name}` is a circular link") from None
    except OSError as error:
        raise Refused(f"`{path.name}` cannot be opened: {error.strerror}") from None


class CheckedFile:
    """A file that is read from start to end, at most as far as its first size, and hashed on the way.

    `more` is the hint for a file above `limit` bytes.

    Raises:
        Refused: it is not a regular file, is too large, leaves its folder, stands for another file, or cannot be read.
    """

    def __init__(
        self, path: Path, *, within: Path | None = None, limit: int | None = None, more: str = "", empty: bool = False
    ) -> None:
        self.name = path.name
        self.position = 0
        self._hash = hashlib.sha256()
        descriptor = _open(path, within)
        try:
            self.state = os.fstat(descriptor)
            self.size = self.state.st_size
            self._check(limit, more, empty=empty)
            self._file = os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
        if self.peek(len(POINTER)) == POINTER:
            self.close()
            raise Refused(
                f"`{self.name}` is a Git LFS pointer, not the file itself", "Run `git lfs pull` in its folder."
            )

    def _check(self, limit: int | None, more: str, *, empty: bool) -> None:
        if not stat.S_ISREG(self.state.st_mode):
            raise Refused(f"`{self.name}` is not a regular file")
        if self.size == 0 and not empty:
            raise Refused(f"`{self.name}` is empty")
        if limit is not None and self.size > limit:
            raise Refused(
                f"`{self.name}` has {self.size:,} bytes; at most {limit:,} are allowed",
                more,
            )

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        """Read exactly `count` bytes; asking for more than there are allocates nothing."""
        if not 0 <= count <= self.left:
            raise Refused(f"`{self.name}` ends within its {what}")
        data = self.read(count)
        if len(data) != count:
            raise Refused(f"`{self.name}` became shorter while it was read")
        return data

    def rest(self) -> memoryview:
        """Read everything that is left."""
        return memoryview(self.take(self.left, "end"))

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        data = self._file.read(count)
        self._hash.update(data)
        self.position += len(data)
        return data

    def peek(self, count: int) -> bytes:
        """Return up to `count` of the next bytes without moving on."""
        return self._file.peek(count)[:count]

    def read_at(self, position: int, count: int) -> bytes:
        """Read bytes at any position without hashing them: for files too large to keep."""
        self._file.seek(position)
        data = self._file.read(count)
        if len(data) != count:
            raise Refused(f"`{self.name}` became shorter while it was read")
        return data

    @property
    def sha256(self) -> str:
        """The hash of what has been read."""
        return self._hash.hexdigest()

    def unchanged(self) -> bool:
        """Return whether the file is as it was when it was opened."""
        now = os.fstat(self._file.fileno())
        return (now.st_size, now.st_mtime_ns) == (self.size, self.state.st_mtime_ns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- Heads of GGUF files ---------------------------------------------------------------------------------------------


def read_head(file: CheckedFile, most: int = ADAPTER_HEAD) -> gguf.Header:
    """Read the head of a GGUF file, up to the end of the table of tensors; refuse it if it breaks the format."""
    try:
        return gguf.read(file, file.size, most=most)
    except GgufError as error:
        raise Refused(str(error)) from None
