"""Adapters on Ollama: models derived from the base, created once and verified by reading them back.

Nothing here knows the content of an adapter; the resolver's `Adapter` does.

A success of `create` proves nothing: servers ignore unknown fields, and one without adapters may leave a plain copy of
the base. So each model is shown afterwards, and a wrong one is deleted. And each reply with an adapter is checked when
it begins: another process may have deleted the model, or put another one under its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from graftage import gguf
from graftage.calls import Call
from graftage.exceptions import (
    AdapterError,
    AdapterIncompatible,
    AdapterUnsupported,
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    InferenceFailed,
    ModelLoadFailed,
    ModelNotFound,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    StreamInterrupted,
)
from graftage.types import Chunk, LoadedAdapter, ModelInfo, PullProgress, canonical_name
from graftage_ollama import _convert

if TYPE_CHECKING:
    from graftage.calls import LoadAdapterRequest, PruneAdaptersRequest, UnloadAdapterRequest
    from graftage.http import Http
    from graftage.types import Adapter

__all__ = ["NAMESPACE", "Adapters"]

T = TypeVar("T")
NAMESPACE: Final = "graftage-lora"
"""The prefix of derived models: nothing outside it is ever deleted."""
MARK: Final = "graftage.adapter.digest"
"""The metadata key by which a merged model names its adapter; servers show it."""
KEY_LENGTHS: Final = (12, 24)
"""Digits of the key in a model's name: more if another model has the shorter name."""
PART_LENGTH: Final = 80
"""Characters of one part of a model's name (Ollama's `types/model/name.go`)."""
SPACE_FACTOR: Final = 2
"""A merged model is at most this much larger than its base: touched 4-bit tensors become 8-bit ones."""
AGAIN: Final = "Try again: it is then made again. Does another program clean the server?"
READ_SIZE: Final = 1 << 20
MISFIT: Final = re.compile(
    r"terminated: panic|unable to load lora|loras are not|unable to load model|invalid file magic"
)
"""How a server reports an adapter that it cannot apply (recorded from 0.24); its newer engine says so of each one."""
EXITED: Final = re.compile(r"terminated: exit status")
"""All that 0.9 and 0.32 report of an adapter that they cannot apply (recorded). Other faults can end a runner with the
same words, so they prove a misfit only if this call created the model, which thus has never worked."""
TRY_NEXT: Final = (RequestRejected, CapabilityUnsupported, InferenceFailed, ModelLoadFailed, ProtocolError)
"""Errors of `create` after which the next strategy is tried; a lost connection is not one of them."""


class _StrategyUnavailable(Exception):
    """A strategy cannot be used; its text gives the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Derived:
    """A model to create: its name, and the check that it is right."""

    name: str
    proves: Callable[[ModelInfo], bool]
    exists: bool


class Adapters:
    """The adapters of one server."""

    def __init__(self, http: Http, address: str, *, merge: bool | int = False, base_file: Path | None = None) -> None:
        self._http = http
        self._address = address
        self._merge = merge
        self._base_file = base_file
        self._proven: dict[str, str | None] = {}
        """The digest of each model that was proven to contain its adapter, by name."""

    async def load(self, request: LoadAdapterRequest) -> LoadedAdapter:
        """Make an adapter usable by the first strategy that works.

        Raises:
            ModelNotFound: the base model does not exist.
            AdapterIncompatible: the server cannot run the base with it.
            AdapterUnsupported: no strategy works; `reasons` has one reason for each.
            AdapterError: another program deletes what is made.
        """
        # Check this first: `create` would pull a missing base from a registry.
        base = await self._show(request.call, request.model)
        reasons: list[str] = []
        for strategy, attempt in (("served", self._served), ("native", self._native), ("merged", self._merged)):
            try:
                with contextlib.suppress(ModelNotFound):
                    return await attempt(request, base)
                # The base exists, so another program has just deleted what was made from it.
                return await attempt(request, base)
            except _StrategyUnavailable as why:
                reasons.append(f"{strategy}: {why}")
            except ModelNotFound as error:
                what = f"Another program deletes the server's models with the adapter `{request.adapter.name}`."
                raise AdapterError(what, reference=request.adapter.name, retryable=True, hint=AGAIN) from error
        raise AdapterUnsupported(
            f"This server cannot use the adapter `{request.adapter.name}`: {'; '.join(reasons)}.",
            reference=request.adapter.name,
            reasons=reasons,
            hint="Allow the setting `merge_adapters`, use Ollama before 0.34, or the embedded provider.",
        )

    async def checked(self, call: Call, adapter: LoadedAdapter, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
        """Yield the chunks of a reply, once it is certain that the adapter gives it."""
        async with self.certain(call, adapter):
            first = await anext(chunks, None)
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk

    @contextlib.asynccontextmanager
    async def certain(self, call: Call, adapter: LoadedAdapter | None) -> AsyncIterator[None]:
        """Make sure that the answer to the request in this block comes from the model that was proven.

        The server looks its name up before it answers, and `/api/tags` shows what the name means afterwards (1.3 ms,
        and 0.2 ms for each model; `/api/show` takes 26 ms, and `/api/ps` does not show which runner answers). So an
        answer of another model passes only if that had the name for this moment alone.

        Raises:
            AdapterError: the name is gone, or means another model.
        """
        try:
            yield
        except ProviderError as error:
            if adapter is None or error.retryable:
                raise
            if isinstance(error, ModelNotFound) or not await self._is_proven(call, adapter):
                raise self._lost(adapter) from error
            raise
        if adapter is not None and not await self._is_proven(call, adapter):
            raise self._lost(adapter)

    async def _is_proven(self, call: Call, adapter: LoadedAdapter) -> bool:
        name, listed = canonical_name(adapter.model), await self._digests(call)
        return name in listed and name in self._proven and listed[name] == self._proven[name]

    def _lost(self, adapter: LoadedAdapter) -> AdapterError:
        self._proven.pop(canonical_name(adapter.model), None)
        return AdapterError(
            f"Another program has deleted or replaced the server's model with the adapter `{adapter.name}`.",
            reference=adapter.name,
            retryable=True,
            hint=AGAIN,
        )

    async def _digests(self, call: Call) -> dict[str, str | None]:
        """Return the digest of each model of the server, by name."""
        models: Sequence[ModelInfo] = await self._request(call, "GET", "/api/tags", read=_convert.listed_models)
        return {canonical_name(each.name): each.digest for each in models}

    async def _prove(self, call: Call, name: str, proves: Callable[[ModelInfo], bool]) -> bool | None:
        """Whether a model contains its adapter; None if it does not exist. If it does, remember its digest."""
        listed = await self._digests(call)  # Before the model is shown: what replaces it in between is noticed later.
        key = canonical_name(name)
        if key not in listed or (model := await self._show_or_none(call, name)) is None:
            return None
        if is_proven := proves(model):
            self._proven[key] = listed[key]
        return is_proven

    async def unload(self, request: UnloadAdapterRequest) -> None:
        """Free the memory of an adapter's model, if it still exists."""
        await self._unload(request.call, request.adapter.model)

    async def _unload(self, call: Call, model: str) -> None:
        body = {"model": model, "keep_alive": 0, "stream": False}
        with contextlib.suppress(ModelNotFound):
            await self._request(call, "POST", "/api/generate", body)

    async def _request(
        self,
        call: Call,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        read: Callable[[Mapping[str, Any]], Any] = dict,
    ) -> Any:
        """Request a JSON object and read it; an empty response is an empty object."""
        # An error is about the requested model, not the model of the call.
        about = replace(call, operation="load_adapter", model=(body or {}).get("model"))
        return await self._http.json(method, path, body, call=about, read=read, empty=True)

    # --- Strategies --------------------------------------------------------------------------------------------------

    async def _served(self, request: LoadAdapterRequest, base: ModelInfo) -> LoadedAdapter:
        """Use a model of the server that contains the adapter already."""
        adapter = request.adapter
        if adapter.served_as is None:
            raise _StrategyUnavailable("no model that contains it was named")
        found: list[ModelInfo] = []

        def proves(model: ModelInfo) -> bool:
            found.append(model)
            return adapter.digest in (model.metadata.get(MARK), *model.adapters)

        is_proven = await self._prove(request.call, adapter.served_as, proves)
        if not is_proven:
            why = "no longer exists" if is_proven is None else "does not contain it"
            raise _StrategyUnavailable(f"`{adapter.served_as}` {why}")
        model = found[-1]
        if model.adapters and _weights(model) != _weights(base) and not request.force:
            reason = f"`{adapter.served_as}` was made from a model other than `{request.model}`"
            raise AdapterIncompatible(
                f"The adapter does not belong to this model: {reason}.",
                reference=adapter.name,
                reasons=[reason],
                hint="Choose the model it was made from, or pass `force=True`.",
            )
        return _loaded(adapter, adapter.served_as, "served")

    async def _native(self, request: LoadAdapterRequest, base: ModelInfo) -> LoadedAdapter:
        """Create a model from the base and the adapter's GGUF file."""
        weights = _weights(base)
        if not weights:
            raise _StrategyUnavailable("the server does not report the weights of the base")
        file, digest = await self._convert_adapter(request, base)

        def proves(model: ModelInfo) -> bool:
            return _weights(model) == weights and sorted(model.adapters) == sorted((*base.adapters, digest))

        derived = await self._derive(request, _key("native", digest, weights), proves)
        if not derived.exists:
            record = await self._record(request.call)
            if record.reason:
                raise _StrategyUnavailable(record.reason)
            await self._upload_adapter(request, base, file, digest)
            await self._create(request, derived, {"from": request.model, "adapters": {"adapter.gguf": digest}}, record)
        await self._probe(request, derived)
        return _loaded(request.adapter, derived.name, "native")

    async def _merged(self, request: LoadAdapterRequest, base: ModelInfo) -> LoadedAdapter:
        """Create a model from a copy of the base file with the adapter merged into it. Costly, so only if allowed."""
        adapter = request.adapter

        def proves(model: ModelInfo) -> bool:
            same = (model.template, model.system) == (base.template, base.system)
            return same and model.metadata.get(MARK) == adapter.digest

        derived = await self._derive(request, _key("merged", adapter.digest, _weights(base)), proves)
        if not derived.exists:
            base_file, size = self._allowed_base_file(base)
            folder = _temporary_folder(SPACE_FACTOR * size)
            try:
                file = await self._from_resolver(request.call, lambda: _merge(adapter, base_file, folder, request.call))
                digest = await request.call.run(_sha256, file)
                await self._upload(request.call, digest, file)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            await self._create(request, derived, {"files": {"model.gguf": digest}, **_model_settings(base)})
        await self._probe(request, derived)
        return _loaded(adapter, derived.name, "merged")

    def _allowed_base_file(self, base: ModelInfo) -> tuple[Path, int]:
        """Return the file to merge into, and its size."""
        if not self._merge:
            raise _StrategyUnavailable("merging is not allowed (`merge_adapters`)")
        if len(_weights(base)) > 1:
            raise _StrategyUnavailable("a base of several files cannot be merged")
        file = self._base_file or base.path
        if file is None:
            raise _StrategyUnavailable(
                "the base model's file cannot be read from here (`adapter_base_file` can name it)"
            )
        try:
            size = file.stat().st_size
        except OSError as error:
            raise _StrategyUnavailable(f"the base model's file cannot be read: {error.strerror}") from None
        if self._merge is not True and size > self._merge:
            raise _StrategyUnavailable(
                f"the base has {size} bytes, more than `merge_adapters` allows ({self._merge:d})"
            )
        return file, size

    async def _convert_adapter(self, request: LoadAdapterRequest, base: ModelInfo) -> tuple[Path, str]:
        """Return the adapter's GGUF file and its digest. The file is in a cache, which may be emptied at any time."""

        def make() -> tuple[Path, str, bool]:
            for _ in range(2):
                file = request.adapter.gguf(base)
                with contextlib.suppress(FileNotFoundError):
                    return file, _sha256(file), gguf.read_file(file).is_activated
            raise _file_vanished(request, file)

        file, digest, is_activated = await self._from_resolver(request.call, make)
        if is_activated:
            raise _activated(request)
        return file, digest

    async def _upload_adapter(self, request: LoadAdapterRequest, base: ModelInfo, file: Path, digest: str) -> None:
        """Upload the adapter's file, converted once more if it was deleted meanwhile."""
        for _ in range(2):
            try:
                return await self._upload(request.call, digest, file)
            except ProtocolError:
                if await request.call.run(file.exists):
                    raise
            file, digest = await self._convert_adapter(request, base)
        raise _file_vanished(request, file)

    async def _from_resolver(self, call: Call, make: Callable[[], T]) -> T:
        """Let the resolver make something; if it cannot, the next strategy is tried."""
        try:
            return await call.run(make)
        except AdapterUnsupported as error:
            raise _StrategyUnavailable(error.message.rstrip(".")) from error
        except GraftageError:
            raise
        except Exception as error:
            raise AdapterError(
                f"The adapter could not be prepared ({type(error).__name__}: {error}).",
                hint="This is a bug in the plugin that resolved it.",
            ) from error

    # --- Create and verify -------------------------------------------------------------------------------------------

    async def _derive(self, request: LoadAdapterRequest, key: str, proves: Callable[[ModelInfo], bool]) -> _Derived:
        """Return the derived model, which may exist already, under a name that no other model has.

        Raises:
            AdapterError: other models have its names. They are not overwritten.
        """
        for length in KEY_LENGTHS:
            name = _name(request.model, request.adapter.name, key[:length])
            exists = await self._prove(request.call, name, proves)
            if exists is not False:
                return _Derived(name=name, proves=proves, exists=bool(exists))
        raise AdapterError(
            f"Other models have the names that the adapter `{request.adapter.name}` would get on the server.",
            reference=request.adapter.name,
            hint="They are not overwritten: give the adapter another name.",
        )

    async def _create(
        self,
        request: LoadAdapterRequest,
        derived: _Derived,
        body: Mapping[str, Any],
        record: _ServerRecord | None = None,
    ) -> None:
        """Create a model and read it back; a wrong one is deleted.

        Raises:
            _StrategyUnavailable: the server refused, or created something else. `record` notes it if it always would.
            ModelNotFound: another process has deleted it at once.
        """
        try:
            await self._request(request.call, "POST", "/api/create", {"model": derived.name, **body, "stream": False})
        except TRY_NEXT as error:
            why = f"the server refused to create the model ({_cause(error)})"
            if record is not None and "adapter" in str(error.details.get("server_message", error)).lower():
                record.reason = why  # Other refusals may be about this request only.
            raise _StrategyUnavailable(why) from error
        is_proven = await self._prove(request.call, derived.name, derived.proves)
        if is_proven is None:
            raise ModelNotFound("The new model was deleted.")
        if is_proven:
            return
        why = "the created model does not contain the adapter"
        await self._delete(request.call, derived.name)
        if record is not None:
            record.reason = why
        raise _StrategyUnavailable(why)

    async def _probe(self, request: LoadAdapterRequest, derived: _Derived) -> None:
        """Generate one token: `create` accepts an adapter that does not fit, which then ends the runner.

        A model that existed before this call has worked before: it is never deleted.

        Raises:
            AdapterIncompatible: the server's message proves that the adapter does not fit.
            ProviderError: something else failed. It proves nothing about the adapter, and the model stays.
            _StrategyUnavailable: the server's engine does not support adapters.
        """
        options: dict[str, Any] = {"num_predict": 1}
        if request.context_window is not None:
            options["num_ctx"] = request.context_window
        body = {"model": derived.name, "prompt": "Hi", "raw": True, "stream": False, "options": options}
        if request.keep_alive is not None:
            body["keep_alive"] = _convert.keep_alive(request.keep_alive)
        try:
            await self._request(request.call, "POST", "/api/generate", body)
        except ModelLoadFailed as error:
            words = str(error.details.get("server_message", ""))
            if not _is_misfit(error, words, is_new=not derived.exists):
                raise
            if not await self._prove(request.call, derived.name, derived.proves):
                raise ModelNotFound("The new model was deleted or replaced.") from error
            if not derived.exists:
                await self._delete(request.call, derived.name)
            if "not yet implemented" in words:
                raise _StrategyUnavailable(
                    "the server's engine for this architecture does not support adapters"
                ) from error
            raise _incompatible(request, derived, error) from error

    async def _upload(self, call: Call, digest: str, file: Path) -> None:
        """Upload a file, unless the server has it: that saves the transfer, and a reset in the middle of it."""
        path = f"/api/blobs/{digest}"
        if await self._has_blob(call, path):
            return
        try:
            await self._http.upload(path, file, call=call)
        except (ConnectionFailed, StreamInterrupted):
            # The server does not read a file that it has: if another client was faster, the connection is reset.
            if not await self._has_blob(call, path):
                raise

    async def _has_blob(self, call: Call, path: str) -> bool:
        try:
            await self._request(call, "HEAD", path)
        except ProviderError as error:
            if error.status == 404:  # The server does not have it.
                return False
            raise
        return True

    async def _record(self, call: Call) -> _ServerRecord:
        answer = await self._request(call, "GET", "/api/version")
        return _server_record(self._address, str(answer.get("version")))

    async def _show(self, call: Call, model: str) -> ModelInfo:
        read = partial(_convert.model_info, model)
        shown: ModelInfo = await self._request(call, "POST", "/api/show", {"model": model}, read=read)
        return shown

    async def _show_or_none(self, call: Call, model: str) -> ModelInfo | None:
        try:
            return await self._show(call, model)
        except ModelNotFound:
            return None

    async def _delete(self, call: Call, model: str) -> None:
        with contextlib.suppress(ModelNotFound):  # Another client was faster.
            await self._request(call, "DELETE", "/api/delete", {"model": model})

    # --- Pruning -----------------------------------------------------------------------------------------------------

    async def prune(self, request: PruneAdaptersRequest) -> tuple[ModelInfo, ...]:
        """Delete or list the derived models: those in our namespace that Graftage provably created."""
        read = _convert.listed_models
        models = await self._request(request.call, "GET", "/api/tags", read=read)
        gone: list[ModelInfo] = []
        for model in models:
            if not _is_selected(model, request):
                continue
            found = await self._show_or_none(request.call, model.name)
            if found is None or not await self._is_ours(request.call, found, models):
                continue
            if not request.dry_run:
                # Unload it first: a deleted model stays in memory and cannot be named any more.
                await self._unload(request.call, model.name)
                await self._delete(request.call, model.name)
            gone.append(replace(model, adapters=found.adapters or (str(found.metadata[MARK]),)))
        return tuple(gone)

    async def _is_ours(self, call: Call, model: ModelInfo, models: Sequence[ModelInfo]) -> bool:
        """Whether a model is exactly what its name promises, proven by a base that still exists."""
        promised = canonical_name(model.name).partition("/")[2].partition(":")[0]
        for each in models:
            if promised in {_slug(name, PART_LENGTH) for name in (each.name, each.name.removesuffix(":latest"))}:
                base = await self._show_or_none(call, each.name)
                if base is not None and _made_from(base, model):
                    return True
        return False


# --- Known servers ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ServerRecord:
    """Why one server in one version supports no adapters, if known."""

    reason: str = ""


_server_records: dict[tuple[str, str], _ServerRecord] = {}
_server_records_lock = threading.Lock()


def _server_record(address: str, version: str) -> _ServerRecord:
    with _server_records_lock:
        return _server_records.setdefault((address, version), _ServerRecord())


# --- Names and proofs ------------------------------------------------------------------------------------------------


def _name(base: str, adapter: str, key: str) -> str:
    """Return `graftage-lora/BASE:ADAPTER-KEY`, which is equal for equal content only."""
    base, adapter = _slug(base, PART_LENGTH), _slug(adapter, PART_LENGTH - len(key) - 1)
    return f"{NAMESPACE}/{base}:{adapter}-{key}"


def _key(strategy: str, digest: str, weights: Sequence[str]) -> str:
    text = "\n".join((strategy, digest, *weights))
    return hashlib.sha256(text.encode()).hexdigest()


def _slug(text: str, length: int) -> str:
    """Return a text as a valid part of a model's name."""
    slug = re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")
    return slug[:length].rstrip("-") or "x"


def _weights(model: ModelInfo) -> tuple[str, ...]:
    """Return the digests of the weights, and of other files loaded with them."""
    return _convert.blob_digests(str(model.raw.get("modelfile") or ""), "FROM")


def _made_from(base: ModelInfo, model: ModelInfo) -> bool:
    """Whether a model is the unchanged base with one adapter, by the key in its name."""
    key, weights = model.name.rpartition("-")[2], _weights(base)
    if _model_settings(model) != _model_settings(base):
        return False  # The user has changed it.
    if isinstance(mark := model.metadata.get(MARK), str):
        keys = [_key("merged", mark, weights)]
    elif _weights(model) == weights:
        keys = [_key("native", digest, weights) for digest in model.adapters]
    else:
        return False
    return key in {each[:length] for each in keys for length in KEY_LENGTHS}


def _model_settings(model: ModelInfo) -> dict[str, Any]:
    """Return all of a model but its weights, as fields of `create`. A model created from a file inherits none of it."""
    raw = model.raw
    fields = {
        "template": model.template,
        "system": model.system,
        "license": model.licence,
        "parameters": _convert.parameters(str(raw.get("parameters") or "")),
        "messages": raw.get("messages"),
        "renderer": raw.get("renderer"),
        "parser": raw.get("parser"),
    }
    return {name: value for name, value in fields.items() if value}


def _is_selected(model: ModelInfo, request: PruneAdaptersRequest) -> bool:
    name = canonical_name(model.name)
    if not name.startswith(f"{NAMESPACE}/") or name in {canonical_name(each) for each in request.keep}:
        return False
    if request.older_than is None:
        return True
    return model.modified_at is not None and time.time() - model.modified_at.timestamp() >= request.older_than


def _loaded(adapter: Adapter, model: str, strategy: str) -> LoadedAdapter:
    return LoadedAdapter(
        name=adapter.name,
        digest=adapter.digest,
        model=model,
        scale=adapter.scale,
        strategy=strategy,
    )


def _is_misfit(error: ModelLoadFailed, words: str, *, is_new: bool) -> bool:
    """Whether a failure to load proves that the adapter does not fit, rather than a lack of resources."""
    if error.reason in ("memory", "timeout"):
        return False
    return bool(MISFIT.search(words) or (is_new and EXITED.search(words)))


def _incompatible(request: LoadAdapterRequest, derived: _Derived, error: ProviderError) -> AdapterIncompatible:
    reason = f"the server cannot run `{request.model}` with it ({_cause(error)})"
    rest = f"existed before and stays: `ollama rm {derived.name}` deletes it" if derived.exists else "was deleted"
    return AdapterIncompatible(
        f"The adapter `{request.adapter.name}` does not work: {reason}.",
        reference=request.adapter.name,
        reasons=[reason],
        hint=f"It was probably made for another base model. Its model on the server {rest}.",
    )


def _activated(request: LoadAdapterRequest) -> AdapterUnsupported:
    reason = "it acts only after its invocation tokens, but Ollama would apply it to every token"
    return AdapterUnsupported(
        f"This server cannot use the adapter `{request.adapter.name}`: {reason}.",
        reference=request.adapter.name,
        reasons=[reason],
        hint="Use the embedded provider (`graftage-llamacpp`).",
    )


def _file_vanished(request: LoadAdapterRequest, file: Path) -> AdapterError:
    return AdapterError(
        f"The adapter's file `{file.name}` was deleted right after it was made.",
        reference=request.adapter.name,
        hint="Does another program empty the cache of adapters? Try again later.",
    )


def _cause(error: ProviderError) -> str:
    return error.message.rstrip(".")


# --- Files -----------------------------------------------------------------------------------------------------------


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(READ_SIZE):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _temporary_folder(room: int) -> Path:
    """Make a folder for temporary files on a disk with enough space."""
    try:
        where = tempfile.gettempdir()
        free = shutil.disk_usage(where).free
        if free < room:
            raise _StrategyUnavailable(f"the disk has {free} bytes free, and merging may need {room}")
        return Path(tempfile.mkdtemp(prefix="graftage-"))
    except OSError as error:
        raise _StrategyUnavailable(
            f"the folder for temporary files (TMPDIR) cannot be used: {error.strerror or error}"
        ) from None


def _merge(adapter: Adapter, base_file: Path, folder: Path, call: Call) -> Path:
    """Merge into a file of that folder, until the deadline, or until the folder is deleted."""

    def report(written: int, total: int) -> None:
        if time.monotonic() > call.deadline:
            raise ProviderTimeout(
                f"The adapter was not merged within {call.timeouts.total:g} s.",
                phase="total",
                hint="Raise `timeout`: a model of 7 billion parameters takes about ten minutes.",
            )
        if not folder.exists():
            raise AdapterError("The merge was cancelled.", hint="Try again.")
        call.emit("progress", progress=PullProgress(status="merging", total=total, completed=written))

    return adapter.merge(base_file, folder / "merged.gguf", report)
