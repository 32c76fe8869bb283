"""Finds an adapter in the chain of sources, reads it, judges it against the base model, and returns it."""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from graftage.calls import ListAdaptersRequest, ResolveRequest
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    CapabilityUnsupported,
    GraftageError,
    RequestRejected,
)
from graftage.gguf import MAX_HEAD, Header
from graftage.types import Adapter, AdapterInfo, ModelInfo, Verdict
from graftage_lora import _layouts, _write
from graftage_lora._files import CheckedFile, Refused, read_head
from graftage_lora._lora import STATUSES, Facts, Lora, head_count, is_reordered, judge
from graftage_lora._mix import mixed
from graftage_lora._read import read
from graftage_lora._sources import USERS, Found, Hub, NotKnown, Reference, chain, may_be_adapter, parse, refusal

if TYPE_CHECKING:
    from graftage_lora._settings import LoraSettings

T = TypeVar("T")

__all__ = ["Resolver"]

MODEL: Final = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){0,3}(?::\w[\w.-]*)?", re.ASCII)
"""The pattern of model names."""
LOOKING: Final = "resolve_adapter"
"""The operation that uses no adapter."""
PINNED: Final = len("sha256:") + 12
"""Characters of a digest that tell two adapters of one name apart."""
REMEMBERED: Final = 256
"""Adapters whose facts are kept, so that a chat does not read its adapter in every turn."""


class Resolver:
    """Implements `resolve_adapter` and `list_adapters` for one set of settings."""

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self._sources = chain(settings)
        self._read: OrderedDict[object, tuple[Facts, str]] = OrderedDict()
        self._judged: OrderedDict[object, tuple[Facts, ModelInfo | None, Verdict]] = OrderedDict()
        self._lock = threading.Lock()

    def resolve(self, request: ResolveRequest) -> Adapter:
        """Find, read and judge the adapter of a reference."""
        text, reasons = ascii(request.reference[:80]), list[str]()
        try:
            reference = parse(request.reference)
            text = reference.text
            found, reasons = self.candidates(reference)
            if len(found) == 1:
                return self._from_files(found[0], reference, request)
            return self._chosen(found, reference, request) if found else _from_server(reference, request)
        except NotKnown as reason:
            reasons.append(str(reason))
            raise AdapterNotFound(
                f"The adapter `{text}` was not found: {'; '.join(reasons)}.",
                reference=text,
                reasons=reasons,
                hint="`graftage adapters list` shows the known ones.",
            ) from None
        except Refused as error:
            raise refused_adapter(request.reference, error, AdapterInvalid) from None

    def known(self, request: ListAdaptersRequest) -> Iterator[AdapterInfo]:
        """List the adapters of all sources, each with what is wrong with it, and the sources that cannot be read."""
        base, unreachable = None, None
        try:
            base = request.base() if request.model is not None else None
        except GraftageError as error:  # A server that does not answer hides no adapter.
            unreachable = Verdict(status="unknown", reasons=(error.message,))
        found: dict[object, Found] = {}
        for each in (each for source in self._sources for each in source.known()):
            if each.source != Hub.name or not any(each.path == other.path for other in found.values()):
                found.setdefault((each.name, each.path.absolute()), each)
        names = Counter(each.name for each in found.values() if each.reference == each.name)
        blocked = any(each.bound and not each.name for each in found.values())  # By a registry that cannot be read.
        for each in found.values():
            settled = each.source == USERS or names[each.name] == 1
            info = self.info(each, base, settled=settled and not blocked)
            asked = info.verdict if request.model is not None else None
            yield replace(info, verdict=asked and (unreachable or asked))

    def info(self, found: Found, base: ModelInfo | None, *, settled: bool) -> AdapterInfo:
        """Describe an adapter, or what is wrong with it; `settled` means that its name finds it."""
        path = found.path.absolute()
        info = AdapterInfo(name=found.name, reference=found.reference, source=found.source, path=path)
        pin = ""
        try:
            facts, digest = self.facts(found, base)
            _require_digest(found.digest, digest, facts)
            info = replace(
                info,
                base_model=found.base_model or facts.base_model,
                digest=digest if is_lasting(facts, base) else None,
                size=found.usable().weights.stat().st_size,
                rank=Counter(each.rank for each in facts.shapes).most_common(1)[0][0],
                verdict=self._verdict(facts, base, found.base_model),
            )
            pin = info.digest or f"sha256:{facts.sha256}"
        except (Refused, OSError) as error:
            why = refusal(error)
            info = replace(info, problem=f"{why}. {why.hint}".strip())
        if not found.name or found.reference != found.name or (settled and is_plain(found.name)):
            return info
        if pin and (found.bound or not self.settings.paths):
            return replace(info, reference=f"{found.name}@{pin[:PINNED]}")
        # A slash at its end keeps the end of a name from being read as a digest.
        return replace(info, reference=f"{path}" + ("" if is_plain(f"{path}") else "/"))

    def candidates(self, reference: Reference) -> tuple[list[Found], list[str]]:
        """Return the adapters that a reference may mean, and a reason from each source that has none."""
        found: list[Found] = []
        reasons = []
        for source in self._sources:
            try:
                found += source.find(reference)
            except (NotKnown, OSError) as error:
                reasons.append(f"{source.name}: {refusal(error)}")
            if found and source.settles:
                break
        if len(found) > 1:  # What else lies in a folder is only a reason if nothing has the name.
            found = [each for each in found if each.bound or may_be_adapter(each.path, each.path.parent)] or found
        return found, reasons

    def _chosen(self, found: Sequence[Found], reference: Reference, request: ResolveRequest) -> FileAdapter:
        """Return the adapter that a name means: the one with the required digest, or any if all are equal."""
        versions: dict[str, Found] = {}
        reasons, broken = [], False
        for each in found:
            try:
                facts, digest = self.facts(each, request.base())
            except Refused as error:
                reasons.append(f"{each.path}: {error}")
                broken = True
            else:
                reasons.append(f"{each.path}: {digest[:PINNED]}")
                if _has_digest(reference.digest, digest, facts):
                    versions.setdefault(digest, each)
        if reference.digest and not versions:
            raise Refused(f"none of its versions has the digest {reference.digest}: {'; '.join(reasons)}")
        first = next(iter(versions.values()), None)
        if first and len(versions) == 1 and (reference.digest or not broken):
            return self._from_files(first, reference, request)
        ambiguous = AdapterInvalid(
            f"The adapter name `{reference.text}` is ambiguous: {'; '.join(reasons)}.",
            reference=reference.text,
            reasons=reasons,
            hint=f"Give the path, add `@` and the digest, or bind the name in {self.settings.registry}.",
        )
        if request.call.operation != LOOKING or first is None:
            raise ambiguous
        # Who only looks sees the first one; its use is refused.
        shown = self._from_files(first, reference, request)
        verdict = replace(shown.verdict, status="unknown", reasons=("its name is ambiguous", *reasons))
        return replace(shown, verdict=verdict, refusal=ambiguous)

    def _from_files(self, found: Found, reference: Reference, request: ResolveRequest) -> FileAdapter:
        base = request.base()
        facts, digest = self.facts(found, base)
        for pin in (reference.digest, found.digest):
            _require_digest(pin, digest, facts)
        return FileAdapter(
            name=found.name,
            digest=digest,
            scale=facts.scale,
            verdict=self._verdict(facts, base, found.base_model),
            facts=facts,
            found=found,
            settings=self.settings,
        )

    def facts(self, found: Found, base: ModelInfo | None) -> tuple[Facts, str]:
        """Return facts and digest, from memory as long as the files are unchanged."""
        files = found.usable()
        metadata = base.metadata if base is not None else {}
        state = files.signature()

        def read_now() -> tuple[Facts, str]:
            lora = load(found, self.settings)
            if files.signature() != state:
                raise Refused("its files changed while they were read", "Resolve it again.")
            return lora.facts, lora.digest(metadata)

        # Only the digest of a GGUF file depends on the base model.
        order = _row_order(metadata) if files.config is None else None
        return self._remembered(self._read, (state, found.scale, order), read_now)

    def _verdict(self, facts: Facts, base: ModelInfo | None, meant_for: str | None) -> Verdict:
        """Judge an adapter once for all calls that use it: that takes longer than all else in a call."""
        # With the objects, so that no others get their identities.
        key = (id(facts), id(base), meant_for)
        return self._remembered(self._judged, key, lambda: (facts, base, judge(facts, base, meant_for=meant_for)))[2]

    def _remembered(self, memory: OrderedDict[object, T], key: object, find: Callable[[], T]) -> T:
        with self._lock:  # One of several callers finds it for all.
            if key not in memory:
                memory[key] = find()
            memory.move_to_end(key)
            if len(memory) > REMEMBERED:
                memory.popitem(last=False)
            return memory[key]


def is_plain(text: str) -> bool:
    """Return whether a reference has no digest."""
    return parse(text).digest is None


def is_lasting(facts: Facts, base: ModelInfo | None) -> bool:
    """Return whether a digest is that for every base model: without it, some rows of GGUF adapters stay reordered."""
    metadata = base.metadata if base is not None else {}
    return facts.layout != "gguf" or not any(
        is_reordered(facts.architecture, each.tensor) and head_count(metadata, each.tensor) is None
        for each in facts.shapes
    )


def _row_order(metadata: Mapping[str, object]) -> str:
    """Return what the digest depends on besides the files: how the base model orders rows."""
    architecture = metadata.get("general.architecture")
    heads = [metadata.get(f"{architecture}.attention.{key}") for key in ("head_count", "head_count_kv")]
    return repr((architecture, *heads))


def _has_digest(pin: str | None, digest: str, facts: Facts | None) -> bool:
    """Return whether a digest, or the weights' SHA-256, starts with the pin."""
    weights = facts.sha256 if facts else ""
    return not pin or digest.removeprefix("sha256:").startswith(pin) or weights.startswith(pin)


def _require_digest(pin: str | None, digest: str, facts: Facts | None) -> None:
    if not _has_digest(pin, digest, facts):
        also = f" (weights: {facts.sha256[:12]}…)" if facts else ""
        raise Refused(
            f"its digest is {digest}{also}, not {pin}",
            "This is another version of the adapter. Correct the digest to use it.",
        )


# --- An adapter in files ---------------------------------------------------------------------------------------------


def _ignore(_written: int, _total: int) -> None:
    """Ignore the progress of a merge."""


def load(found: Found, settings: LoraSettings) -> Lora:
    """Read an adapter, with its registry's scale if that has one."""
    lora = read(found.usable(), max_bytes=settings.max_bytes, leave_out_vision=settings.leave_out_vision)
    return lora if found.scale is None else lora.scaled(found.scale)


E = TypeVar("E", bound=AdapterError)


def refused_adapter(name: str, error: Refused, kind: type[E]) -> E:
    """Build the error for an adapter that cannot be used, or not in one way (`AdapterUnsupported`)."""
    way = " this way" if kind is AdapterUnsupported else ""
    return kind(
        f"The adapter `{name}` cannot be used{way}: {error}.",
        reference=name,
        reasons=[error.reason],
        hint=error.hint or None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FileAdapter:
    """An `Adapter` in files, found and checked.

    Each method reads the files again, from one descriptor that is checked, hashed and used, and refuses them if they
    have changed since the first check.
    """

    name: str
    digest: str
    scale: float
    verdict: Verdict
    facts: Facts = field(repr=False)
    found: Found = field(repr=False)
    settings: LoraSettings = field(repr=False)
    served_as: str | None = None
    refusal: AdapterInvalid | None = field(default=None, repr=False)
    """Why it may only be looked at."""
    parts: tuple[tuple[FileAdapter, float], ...] = field(default=(), repr=False)
    """The adapters that it is the sum of, each with its weight; empty if it is one."""

    @property
    def source(self) -> str:
        """The source that found it."""
        return self.found.source

    def mix(self, weight: float, others: Sequence[tuple[Adapter, float]]) -> FileAdapter:
        """Return one adapter that is exactly the sum of this one and others, each by its weight.

        Raises:
            AdapterUnsupported: one of the others comes from another resolver, or they cannot be added up.
        """
        parts = [(self, weight)]
        with self._translate_errors("mixed"):
            for each, factor in others:
                if not isinstance(each, FileAdapter):
                    raise Refused(f"`{each.name}` has no files to add to it", "Give its files.")
                parts.append((each, factor))
            for part, _ in parts:
                if part.parts:
                    raise Refused(f"`{part.name}` is a sum already", "Mix the adapters themselves.")
                if part.facts.invocation and others:
                    reason = f"`{part.name}` acts only after its invocation tokens, but the sum would always act"
                    raise Refused(reason, "Use it alone.")
        if parts == [(self, 1.0)]:
            return self
        name = " + ".join(each.name if factor == 1 else f"{factor:g} {each.name}" for each, factor in parts)
        # The sum does not depend on the order, so neither do digest and files.
        ordered = sorted(parts, key=lambda part: (part[0].digest, part[1]))
        lines = ["graftage-lora mix 1", *(f"{each.digest} {float(factor)!r}" for each, factor in ordered)]
        return replace(
            self,
            name=name,
            digest=f"sha256:{hashlib.sha256('|'.join(lines).encode()).hexdigest()}",
            scale=1.0 if others else self.scale * weight,
            verdict=_joint(each.verdict for each, _ in parts),
            parts=tuple(ordered),
        )

    def gguf(self, base: ModelInfo) -> Path:
        """Write a GGUF file of the adapter for a base model to the cache; equal content gives equal bytes.

        Raises:
            AdapterInvalid: its files have changed since it was resolved.
            AdapterUnsupported: its modules have no known names in such a model, or the layout cannot hold it.
            AdapterError: the cache cannot be written.
        """
        return self._written(base, _write.encode)

    def peft(self, base: ModelInfo) -> Path:
        """Write a folder of the adapter in PEFT's layout to the cache; errors are those of `gguf`.

        It is always a copy: a trainer may write to the adapter's own folder at any time, and servers read theirs again.
        """
        return self._written(base, _layouts.peft)

    def mlx(self, base: ModelInfo) -> Path:
        """Write a folder of the adapter in mlx-lm's layout to the cache, as `peft` does."""
        return self._written(base, _layouts.mlx)

    def _written(
        self, base: ModelInfo, encode: Callable[[Lora, Mapping[str, object]], bytes | Mapping[str, bytes]]
    ) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:60] or "adapter"
        with self._translate_errors("written"):
            return _write.store(encode(self._content(base.metadata), base.metadata), self.settings.cache / name)

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = _ignore) -> Path:
        """Write the base model with the adapter merged into it to `out`; leave nothing if that fails.

        It takes about 0.1 s of one core per million numbers that the adapter touches, and the memory of a few blocks.
        The metadata is the base model's, byte for byte, plus the keys `graftage.adapter.*` and `graftage.merge.*`.

        Args:
            base_file: the base model in GGUF, in one file.
            out: the file to write or replace.
            on_progress: called with the bytes written and the total; an error that it raises stops the merge.

        Raises:
            AdapterInvalid: its files have changed since it was resolved.
            AdapterIncompatible: it does not fit the base model.
            AdapterUnsupported: the adapter or the base model cannot be merged.
            AdapterError: the disk is full, or a file cannot be read or written.
        """
        with closing(self._merge(base_file, out)) as steps:
            for written, total in steps:
                on_progress(written, total)
        return out

    def _merge(self, base_file: Path, out: Path) -> Generator[_write.Step]:
        with self._translate_errors("merged"), CheckedFile(base_file) as base:
            header = self._read_base(base, base_file, out)
            lora = self._content(header.metadata)
            yield from _write.merge(base, header, lora, out, digest=self.digest, kind=self.settings.merge_type)

    def _read_base(self, base: CheckedFile, base_file: Path, out: Path) -> Header:
        if out.exists() and out.samefile(base_file):
            raise Refused("the merged model would replace its base model", "Choose another file.")
        header = read_head(base, MAX_HEAD)
        if header.is_adapter:
            raise Refused(f"`{base.name}` is an adapter, not a model")
        tensors = {name: tensor.shape for name, tensor in header.tensors.items()}
        model = ModelInfo(name=base.name, metadata=header.metadata, tensors=tensors)
        verdict = _joint(judge(each.facts, model) for each, _ in self.parts or [(self, 1.0)])
        if verdict.status == "incompatible":
            raise AdapterIncompatible(
                f"The adapter `{self.name}` does not fit `{base.name}`: {'; '.join(verdict.reasons)}.",
                reference=self.name,
                reasons=verdict.reasons,
                hint="Use the model that it was made for.",
            )
        if verdict.status != "compatible":
            raise Refused(f"it may not fit `{base.name}`: {'; '.join(verdict.reasons)}")
        return header

    def _content(self, metadata: Mapping[str, object]) -> Lora:
        """Read it for a base model with this metadata."""
        if not self.parts:
            return self.read()
        return mixed([(each.read(), weight) for each, weight in self.parts], metadata)

    def read(self) -> Lora:
        """Read its own files again; refuse it if they have changed, or if it may only be looked at."""
        if self.refusal is not None:
            raise copy.copy(self.refusal)  # One instance raised twice would mix tracebacks.
        with self._translate_errors("read", AdapterInvalid):
            lora = load(self.found, self.settings)
            if lora.facts != self.facts:
                raise Refused("its files changed after the check", "Resolve it again.")
            return lora

    @contextmanager
    def _translate_errors(self, done: str, refused: type[AdapterError] = AdapterUnsupported) -> Iterator[None]:
        try:
            yield
        except Refused as error:
            raise refused_adapter(self.name, error, refused) from None
        except (OSError, MemoryError) as error:
            words = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise AdapterError(
                f"The adapter `{self.name}` could not be {done}: {words}.", reference=self.name
            ) from error


def _joint(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of some verdicts, with its reasons and everyone's warnings."""
    found = tuple(verdicts)
    status = max((each.status for each in found), key=("compatible", *reversed(STATUSES)).index)
    reasons = dict.fromkeys(reason for each in found if each.status == status for reason in each.reasons)
    warnings = dict.fromkeys(warning for each in found for warning in each.warnings)
    return Verdict(status=status, reasons=tuple(reasons), warnings=tuple(warnings))


# --- An adapter in the server ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An `Adapter` without files: a model of the server already contains it."""

    name: str
    digest: str
    scale: float
    verdict: Verdict
    served_as: str | None

    def gguf(self, *_: object, **__: object) -> NoReturn:
        """Raise `AdapterUnsupported`: the adapter's file is not known."""
        raise AdapterUnsupported(
            f"The adapter `{self.name}` is inside a model of the server, and its file is not known.",
            reference=self.name,
            hint="Give the adapter's files instead of the model's name.",
        )

    merge = gguf


def _from_server(reference: Reference, request: ResolveRequest) -> ServedAdapter:
    """Find a model of the server that contains an adapter as a layer, or merged by Graftage."""
    name = reference.text
    try:
        model = request.base() if name == request.model else None
        if name != request.model and MODEL.fullmatch(name):  # Other references are not sent to the server.
            model = request.show(name)
    except (RequestRejected, CapabilityUnsupported) as error:
        raise NotKnown(f"server: {error.message}") from None
    if model is None:
        raise NotKnown("server: it has no model of that name")
    digest, scale = model.metadata.get(_write.DIGEST), model.metadata.get(_write.SCALE)
    if not isinstance(digest, str):
        if not model.adapters:
            raise NotKnown("server: the model of that name has no adapter")
        digest, scale = model.adapters[-1], None
    _require_digest(reference.digest, digest, None)
    return ServedAdapter(
        name=model.name,
        digest=digest,
        scale=float(scale) if isinstance(scale, (int, float)) else 1.0,
        verdict=_served_verdict(model, request.base()),
        served_as=model.name,
    )


def _served_verdict(model: ModelInfo, base: ModelInfo | None) -> Verdict:
    if base is None:
        return Verdict(status="unknown", reasons=("the provider does not report the base model",))
    own, other = (each.architecture or each.metadata.get("general.architecture") for each in (model, base))
    if own and other and own != other:
        reason = f"`{model.name}` has the architecture `{own}`, but the base model has `{other}`"
        return Verdict(status="incompatible", reasons=(reason,))
    if model.parent and model.parent != base.name:
        note = f"`{model.name}` was made from `{model.parent}`, but the base model is `{base.name}`."
        return Verdict(status="compatible", warnings=(note,))
    return Verdict(status="compatible")
