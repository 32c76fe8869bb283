"""Files of the adapters that engines load, made again where they have gone: a cache may be emptied at any time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterUnsupported,
    GraftageError,
    ModelLoadFailed,
)
from graftage.http import reason
from graftage_llamacpp import _convert, _gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.types import Adapter
    from graftage_llamacpp._store import Stored

__all__ = ["AdapterFile"]


class AdapterFile:
    """An adapter as a file that an engine can load with one model."""

    def __init__(self, adapter: Adapter, model: Callable[[], Stored]) -> None:
        self.name = adapter.name
        self.digest = adapter.digest
        self.path = Path()
        self.activated = False
        """Whether it acts only after its invocation tokens."""
        self._adapter = adapter
        self._model = model
        self._state: tuple[int, ...] | None = None

    def prepare(self) -> None:
        """Make the file at `path`, unless it is still what it was.

        Raises:
            GraftageError: it cannot be made, or the engine cannot take it.
        """
        if self._state is None or _state(self.path) != self._state:
            self._state = None
            self._make()

    def usable(self) -> bool:
        """Whether it can be prepared."""
        try:
            self.prepare()
        except GraftageError:
            return False
        return True

    def _make(self) -> None:
        model = self._model()
        try:
            self.path = self._adapter.gguf(_convert.model_info(model, full=True)).absolute()
        except GraftageError:
            raise
        except Exception as error:
            raise AdapterError(
                f"The file of the adapter `{self.name}` could not be made: {reason(error)}.",
                reference=self.name,
                hint="Ask the authors of the plugin that found it.",
            ) from error
        state = _state(self.path)
        self._check(model)
        self._state = state

    def _check(self, model: Stored) -> None:
        """Refuse by name what the engine would refuse without a reason."""
        try:
            header = _gguf.read(self.path, long_lists=False)
            _gguf.check_adapter(header)
        except (OSError, _gguf.GgufError) as error:
            raise AdapterInvalid(
                f"The file of the adapter `{self.name}` cannot be used: {error}.",
                reference=self.name,
                reasons=(str(error),),
                hint="Convert it again, or choose another adapter.",
            ) from error
        if header.architecture != model.header.architecture:
            reason = f"it is made for {header.architecture[:80]!r}, and the model is {model.header.architecture!r}"
            raise AdapterIncompatible(
                f"The adapter `{self.name}` does not fit `{model.name}`: {reason}.",
                reference=self.name,
                reasons=(reason,),
                hint="Choose the model it was made for.",
            )
        self.activated = "adapter.alora.invocation_tokens" in header.metadata

    def not_taken(self, error: ModelLoadFailed) -> GraftageError:
        """What it means that an engine did not start with this adapter and no other."""
        words = str(error.details.get("engine_stderr", ""))
        if error.reason != "incompatible" or "adapter_lora" not in words:
            return error
        kind = AdapterIncompatible if "wrong base model" in words or "mismatch" in words else AdapterUnsupported
        failed = kind(
            f"The engine cannot load the adapter `{self.name}`: {error.message}",
            reference=self.name,
            reasons=(error.message,),
            hint="Choose the model it was made for.",
        )
        failed.__cause__ = error
        return failed


def _state(path: Path) -> tuple[int, ...] | None:
    """Changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
