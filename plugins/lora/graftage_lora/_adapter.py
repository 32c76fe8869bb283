"""What the plugin hands to a provider: an adapter in files, or one that a model of the server carries already."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from graftage.exceptions import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from graftage.types import ModelInfo, Verdict
from graftage_lora import _convert, _gguf, _merge
from graftage_lora._files import Files, Opened, Refused
from graftage_lora._lora import Facts, Lora
from graftage_lora._read import read
from graftage_lora._verdict import judge

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

__all__ = ["FileAdapter", "ServedAdapter", "invalid", "load", "served"]

Progress = Callable[[int, int], None]


def _silent(_written: int, _total: int) -> None:
    """The `on_progress` of a merge that nobody watches."""


def load(files: Files, scale: float | None, settings: LoraSettings) -> Lora:
    """The adapter in some files, with the scale its registry gives it.

    Raises:
        Refused: it is malformed, unsafe, or of a kind that is not supported.
    """
    lora = read(files, max_bytes=settings.max_bytes)
    return lora if scale is None else lora.scaled(scale)


def invalid(name: str, error: Refused) -> AdapterInvalid:
    """The error of an adapter that cannot be used."""
    return AdapterInvalid(
        f"The adapter `{name}` cannot be used: {error.reason}.",
        reference=name,
        reasons=[error.reason],
        hint=error.hint or None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAdapter:
    """An adapter in files, found and checked; an `Adapter` of the contract.

    Each method reads the files again, from one descriptor that is checked, hashed and used, and refuses them where they
    are not what was checked first.
    """

    name: str
    digest: str
    scale: float
    verdict: Verdict
    facts: Facts = field(repr=False)
    files: Files = field(repr=False)
    settings: LoraSettings = field(repr=False)
    source: str = ""
    """Where it was found."""
    given_scale: float | None = None
    """The scale of the registry, in place of its own."""
    meant_for: str | None = None
    """The base model that the registry names."""
    served_as: str | None = None

    def gguf(self, base: ModelInfo) -> Path:
        """A GGUF file of the adapter for a base model, in the cache; its bytes depend on nothing but the content.

        Raises:
            AdapterInvalid: its files are not what they were when it was resolved.
            AdapterUnsupported: its modules have no known place in such a model.
            AdapterError: the cache cannot be written.
        """
        lora = self._read()
        try:
            with self._typed("written"):
                return _convert.store(_convert.pieces(lora, base.metadata), self.settings.cache, _slug(self.name))
        except Refused as error:
            raise self._unsupported(error) from None

    def merge(self, base_file: Path, out: Path, on_progress: Progress = _silent) -> Path:
        """Write the base model with the adapter merged into it to `out`; nothing is left of it where that fails.

        It costs about 0.1 s of one core for each million numbers that the adapter touches, and the memory of a few
        blocks. Metadata is the base model's, byte for byte, with the keys `graftage.adapter.*` and `graftage.merge.*`.

        Args:
            base_file: the base model in GGUF; a split one is refused.
            out: the file to write, replaced where it is there.
            on_progress: told bytes written and bytes in all; an error that it raises ends the work.

        Raises:
            AdapterInvalid: its files are not what they were when it was resolved.
            AdapterIncompatible: it does not fit that file.
            AdapterUnsupported: it or that file is of a kind that cannot be merged.
            AdapterError: the disk is full, or a file cannot be read or written.
        """
        lora = self._read()
        watched = _Watched(on_progress)
        try:
            with self._typed("merged"), Opened(base_file) as base:
                header = self._base_header(base, base_file, out)
                return self._merged(lora, base, header, out, watched)
        except Refused as error:
            raise self._unsupported(error) from None
        except _Stopped:
            raise watched.error from None  # type: ignore[misc] # it is set wherever that is raised

    def _merged(self, lora: Lora, base: Opened, header: _gguf.Header, out: Path, watched: Progress) -> Path:
        self._require_fit(header, base.name)
        kind = self.settings.merge_type
        return _merge.merge(base, header, lora, out, digest=self.digest, kind=kind, on_progress=watched)

    def _base_header(self, base: Opened, base_file: Path, out: Path) -> _gguf.Header:
        if out.exists() and out.samefile(base_file):
            raise Refused("the merged model would take the place of its base model", "Choose another file.")
        header = _gguf.read(base, _gguf.MODEL)
        if header.is_adapter:
            raise Refused(f"`{base.name}` is an adapter and not a model")
        return header

    def _require_fit(self, header: _gguf.Header, name: str) -> None:
        tensors = {tensor.name: tensor.shape for tensor in header.tensors}
        verdict = judge(self.facts, ModelInfo(name=name, metadata=header.metadata, tensors=tensors))
        if verdict.status == "incompatible":
            raise AdapterIncompatible(
                f"The adapter `{self.name}` does not fit `{name}`: {'; '.join(verdict.reasons)}.",
                reference=self.name,
                reasons=verdict.reasons,
                hint="Give the model it was made for.",
            )
        if verdict.status == "unknown":
            raise Refused(f"it is not known whether it fits `{name}`: {'; '.join(verdict.reasons)}")

    def _read(self) -> Lora:
        try:
            with self._typed("read"):
                lora = load(self.files, self.given_scale, self.settings)
            if lora.facts != self.facts:
                raise Refused("its files changed after it was checked", "Resolve it again.")
        except Refused as error:
            raise invalid(self.name, error) from None
        return lora

    @contextmanager
    def _typed(self, done: str) -> Iterator[None]:
        """Turn what the system refuses into an error of the contract."""
        try:
            yield
        except (OSError, MemoryError, _merge.NoRoom) as error:
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise AdapterError(
                f"The adapter `{self.name}` could not be {done}: {words}.", reference=self.name
            ) from error

    def _unsupported(self, error: Refused) -> AdapterUnsupported:
        return AdapterUnsupported(
            f"The adapter `{self.name}` cannot be used so: {error.reason}.",
            reference=self.name,
            reasons=[error.reason],
            hint=error.hint or None,
        )


class _Stopped(Exception):
    """The one who watches wants no more."""


class _Watched:
    """Progress whose own errors are told from those of the work."""

    def __init__(self, told: Progress) -> None:
        self._told = told
        self.error: BaseException | None = None

    def __call__(self, written: int, total: int) -> None:
        try:
            self._told(written, total)
        except BaseException as error:  # noqa: BLE001 - it is raised again as it is
            self.error = error
            raise _Stopped from None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "adapter"


# --- In the server ---------------------------------------------------------------------------------------------------

HINT: Final = "Give the adapter's files instead of the model's name."


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An adapter that a model of the server carries; an `Adapter` of the contract without files."""

    name: str
    digest: str
    scale: float
    verdict: Verdict
    served_as: str | None

    def gguf(self, base: ModelInfo) -> Path:  # noqa: ARG002 - the contract's signature
        """No file of it is known.

        Raises:
            AdapterUnsupported: always.
        """
        raise self._unsupported()

    def merge(self, base_file: Path, out: Path, on_progress: Progress = _silent) -> Path:  # noqa: ARG002 - as above
        """No file of it is known.

        Raises:
            AdapterUnsupported: always.
        """
        raise self._unsupported()

    def _unsupported(self) -> AdapterUnsupported:
        return AdapterUnsupported(
            f"The adapter `{self.name}` is inside a model of the server, and its file is not known.",
            reference=self.name,
            hint=HINT,
        )


def served(model: ModelInfo, base: ModelInfo | None) -> ServedAdapter | None:
    """The adapter that a model carries: as a layer of its own, or merged by us; `None` where it carries none."""
    digest, scale = model.metadata.get(_merge.DIGEST), model.metadata.get(_merge.SCALE)
    if not isinstance(digest, str):
        if not model.adapters:
            return None
        digest, scale = model.adapters[-1], None
    return ServedAdapter(
        name=model.name,
        digest=digest,
        scale=float(scale) if isinstance(scale, (int, float)) else 1.0,
        verdict=_of_served(model, base),
        served_as=model.name,
    )


def _of_served(model: ModelInfo, base: ModelInfo | None) -> Verdict:
    if base is None:
        return Verdict(status="unknown", reasons=("the provider tells nothing of the base model",))
    own, other = (each.architecture or each.metadata.get("general.architecture") for each in (model, base))
    if own and other and own != other:
        reason = f"`{model.name}` is of the architecture `{own}`, and the base model of `{other}`"
        return Verdict(status="incompatible", reasons=(reason,))
    if model.parent and model.parent != base.name:
        note = f"`{model.name}` was made from `{model.parent}`, and the base model is `{base.name}`."
        return Verdict(status="compatible", warnings=(note,))
    return Verdict(status="compatible")
