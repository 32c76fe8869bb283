"""Finds an adapter through the chain of sources, reads it, and judges it against the base model."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from graftage.exceptions import AdapterNotFound, CapabilityUnsupported, RequestRejected
from graftage.types import Adapter, AdapterInfo, ModelInfo, ResolveRequest
from graftage_lora._adapter import FileAdapter, ServedAdapter, invalid, load, served
from graftage_lora._files import Files, Refused
from graftage_lora._lora import Facts
from graftage_lora._read import stated_base
from graftage_lora._sources import Found, Passed, Reference, chain, parse
from graftage_lora._verdict import judge

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

__all__ = ["Resolver"]

MODEL: Final = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){0,3}(?::\w[\w.-]*)?", re.ASCII)
"""How providers name their models."""
REMEMBERED: Final = 64
"""Adapters whose facts are kept: a chat that names its adapter must not read it each time."""


class Resolver:
    """What `resolve_adapter` and `list_adapters` do, with one set of settings."""

    def __init__(self, settings: LoraSettings) -> None:
        self._settings = settings
        self._sources = chain(settings)
        self._read: OrderedDict[object, tuple[Facts, str]] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(self, request: ResolveRequest) -> Adapter:
        """The adapter of a reference.

        Raises:
            AdapterNotFound: no source knows it; `reasons` tells what each said.
            AdapterInvalid: it was found and cannot be used.
        """
        try:
            reference = parse(request.reference)
        except Passed as reason:
            raise _not_found(ascii(request.reference[:80]), [str(reason)]) from None
        try:
            found = self._find(reference)
            if isinstance(found, Found):
                return self._checked(found, reference, request)
            return self._served(reference, request, found)
        except Refused as error:
            raise invalid(request.reference, error) from None

    def known(self) -> Iterator[AdapterInfo]:
        """What all sources know; a broken one hides only itself."""
        for source in self._sources:
            try:
                found = list(source.known())
            except (Passed, Refused, OSError):
                continue
            for each in found:
                yield AdapterInfo(
                    name=each.name,
                    reference=each.reference,
                    source=source.name,
                    base_model=each.base_model or stated_base(each.files),
                    digest=f"sha256:{each.digest}" if each.digest else None,
                )

    def _find(self, reference: Reference) -> Found | list[str]:
        """What the first source that knows it found, or why each passed."""
        passed = []
        for source in self._sources:
            try:
                return source.find(reference)
            except Passed as reason:  # noqa: PERF203 - each source is on its own
                passed.append(f"{source.name}: {reason}")
            except OSError as error:
                passed.append(f"{source.name}: {error.strerror or error}")
        return passed

    def _checked(self, found: Found, reference: Reference, request: ResolveRequest) -> FileAdapter:
        base = request.base()
        facts, digest = self._facts(found, base)
        for pin in (reference.digest, found.digest):
            _require_digest(pin, digest, facts)
        return FileAdapter(
            name=found.name,
            digest=digest,
            scale=facts.scale,
            verdict=judge(facts, base, meant_for=found.base_model),
            facts=facts,
            files=found.files,
            settings=self._settings,
            source=found.source,
            given_scale=found.scale,
            meant_for=found.base_model,
        )

    def _facts(self, found: Found, base: ModelInfo | None) -> tuple[Facts, str]:
        """Facts and digest, remembered as long as the file system says that the files are the same."""
        metadata = base.metadata if base is not None else {}
        with self._lock:  # of several callers one reads, and the others find it
            key = (_signature(found.files), found.scale, _order(metadata))
            if key not in self._read:
                lora = load(found.files, found.scale, self._settings)
                if _signature(found.files) != key[0]:
                    raise Refused("its files changed while they were read", "Resolve it again.")
                self._read[key] = lora.facts, lora.digest(metadata)
            self._read.move_to_end(key)
            while len(self._read) > REMEMBERED:
                self._read.popitem(last=False)
            return self._read[key]

    def _served(self, reference: Reference, request: ResolveRequest, passed: list[str]) -> ServedAdapter:
        """The last source: a model of the server that carries an adapter already."""
        try:
            model = _model(reference.text, request)
        except (RequestRejected, CapabilityUnsupported) as error:
            raise _not_found(reference.text, [*passed, f"server: {error.message}"]) from None
        if model is None:
            why = "it has no model of that name"
        elif found := served(model, request.base()):
            _require_served(reference.digest, found.digest)
            return found
        else:
            why = "the model of that name carries no adapter"
        raise _not_found(reference.text, [*passed, f"server: {why}"])


def _model(name: str, request: ResolveRequest) -> ModelInfo | None:
    """A model of the server; a path, or what no server takes for a name, is not told to it."""
    if name == request.model:
        return request.base()
    show: Callable[[str], ModelInfo | None] | None = getattr(request, "show", None)
    return show(name) if show and MODEL.fullmatch(name) else None


def _not_found(reference: str, reasons: list[str]) -> AdapterNotFound:
    return AdapterNotFound(
        f"The adapter `{reference}` was not found: {'; '.join(reasons)}.",
        reference=reference,
        reasons=reasons,
        hint="`graftage adapters list` shows those that are known.",
    )


def _signature(files: Files) -> tuple[tuple[int, ...], ...]:
    try:
        return files.signature()
    except OSError as error:
        raise Refused(f"it cannot be read: {error.strerror}") from None


def _order(metadata: Mapping[str, Any]) -> str:
    """What the digest depends on beside the files: how the base model orders rows."""
    architecture = metadata.get("general.architecture")
    heads = [metadata.get(f"{architecture}.attention.{key}") for key in ("head_count", "head_count_kv")]
    return repr((architecture, *heads))


def _require_digest(pin: str | None, digest: str, facts: Facts) -> None:
    if pin and not digest.removeprefix("sha256:").startswith(pin) and not facts.sha256.startswith(pin):
        raise Refused(
            f"its digest is {digest}, its weights' {facts.sha256[:12]}…, and asked for is {pin}",
            "It is another version of the adapter; correct the digest if that is what you want.",
        )


def _require_served(pin: str | None, digest: str) -> None:
    if pin and not digest.removeprefix("sha256:").startswith(pin):
        raise Refused(f"the model of that name carries {digest}, and asked for is {pin}")
