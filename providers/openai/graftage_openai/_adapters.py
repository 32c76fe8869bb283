"""How each server takes an adapter, and the proof that the adapter answered.

mlx_lm reads the folder that a request names. llama-server scales, for each request, the adapters that it was started
with. vLLM loads a folder under a name. Some of them let the base model answer without a word: mlx_lm for its default
model and in old releases, llama-server for a number that it does not know.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from graftage import gguf
from graftage.calls import UnloadAdapterRequest
from graftage.exceptions import AdapterError, AdapterUnsupported, ModelNotFound, ProviderError
from graftage.http import is_local, read_entries, read_logprobs, read_object
from graftage.types import LoadedAdapter, PortableAdapter

if TYPE_CHECKING:
    from graftage.calls import Call, LoadAdapterRequest
    from graftage.http import Http
    from graftage.types import ModelInfo
    from graftage_openai._profiles import Profile

__all__ = ["Adapters"]

NOT_THERE: Final = (400, 404, 405)
PROBE: Final = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "logprobs": True, "top_logprobs": 5}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the server finds an adapter: the folder for mlx_lm and vLLM, or the file of llama-server."""

    path: str
    stamp: tuple[int, ...] | None
    """As `_stamp` found it."""


class Adapters:
    """The adapters of one connection."""

    def __init__(self, http: Http, api: str) -> None:
        self._http = http
        self._api = api
        self.is_local = is_local(http.base_url)
        self._places: dict[tuple[str, str], _Place] = {}
        """By digest and model."""
        self._slots: dict[int, str] | None = None
        """The files of llama-server's adapters by number, once they are known."""

    async def load(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        """Make an adapter usable, and prove that it changes what the model says.

        Raises:
            AdapterUnsupported: this server cannot take it, or the base model answered in its place.
        """
        load = {"request": self._by_request, "slots": self._by_slot, "endpoints": self._by_endpoint}
        if profile.adapters is None:
            name = profile.name or "a server that is not recognised"
            raise _unsupported(request, f"{name} takes no adapters", "Use another server, or set `profile`.")
        loaded: LoadedAdapter = await load[profile.adapters](request, profile, base)
        try:
            await self._prove(request, loaded, profile)
        except AdapterUnsupported:
            await self.unload(UnloadAdapterRequest(call=request.call, adapter=loaded))
            raise
        return loaded

    async def unload(self, request: UnloadAdapterRequest) -> None:
        """Free an adapter's memory, where the server can."""
        adapter = request.adapter
        self._places.pop((adapter.digest, adapter.model), None)
        if adapter.strategy == "endpoints":
            await self._ask(request.call, "POST", f"{self._api}/unload_lora_adapter", {"lora_name": adapter.model})

    async def body(self, call: Call, adapter: LoadedAdapter | None, profile: Profile) -> Mapping[str, object]:
        """Return the fields to add to a chat or completion, also to one without an adapter.

        Raises:
            AdapterError: the server no longer has the adapter.
        """
        if profile.adapters == "slots" and (adapter or self._slots is None):
            self._slots = await self._list_slots(call)  # The server may have been restarted with others.
        slots = self._slots or {}
        scales = dict.fromkeys(slots, 0.0)
        for one, weight in adapter.weights if adapter else ():
            place = self._places.get((one.digest, one.model))
            if place is None:
                raise self._lost(one)
            if profile.adapters == "endpoints":
                continue
            slot = next((each for each, path in slots.items() if path == place.path), None)
            changed = self.is_local and await call.run(_stamp, place.path) != place.stamp
            if changed or (profile.adapters == "slots" and slot is None):
                raise self._lost(one)
            if slot is None:
                return {"adapters": place.path}
            scales[slot] += one.scale * weight
        if not slots:
            return {}
        # Its cache of prompts knows tokens only. Build 11549 gave to the base what an adapter had computed, after a
        # request without `lora`, and out of its cache in memory even with `id_slot`: log-probabilities were wrong by
        # 0.6 to 1.7. No form of request is safe from that, and `cache_n` does not show whose tokens they were.
        return {"lora": [{"id": each, "scale": scale} for each, scale in scales.items()], "cache_prompt": False}

    @contextlib.contextmanager
    def holding(self, adapter: LoadedAdapter | None) -> Iterator[None]:
        """Say that the adapter is lost if the server does not know the model in this block: vLLM was restarted."""
        try:
            yield
        except ModelNotFound as error:
            if adapter is None:
                raise
            raise self._lost(adapter) from error

    def _lost(self, adapter: LoadedAdapter) -> AdapterError:
        """Forget an adapter that the server has lost, and return the error with which the core loads it again."""
        self._places.pop((adapter.digest, adapter.model), None)
        return AdapterError(
            f"The server no longer has the adapter `{adapter.name}`.",
            reference=adapter.name,
            retryable=True,
            hint="Try again: it is then loaded again.",
        )

    # --- Servers -----------------------------------------------------------------------------------------------------

    async def _by_request(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        if request.model == profile.default_model:
            raise _unsupported(
                request,
                f"with the model's name `{request.model}`, {profile.name} ignores adapters",
                f"Name the model by its folder, {f'`{base.path}`' if base.path else 'or by its repository'}.",
            )
        folder = await self._folder(request, "mlx", base)
        return await self._loaded(request, "request", str(folder))

    async def _by_endpoint(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        folder = await self._folder(request, "peft", base)
        slug = re.sub(r"[^a-z0-9]+", "-", request.adapter.name.lower()).strip("-")[:40]
        name = f"graftage-{slug}-{request.adapter.digest.removeprefix('sha256:')[:12]}"
        body = {"lora_name": name, "lora_path": str(folder)}
        _, refusal = await self._ask(request.call, "POST", f"{self._api}/load_lora_adapter", body)
        if refusal is not None and "already been loaded" not in refusal:
            hint = "Start vLLM with `--enable-lora`, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
            raise _unsupported(request, f"{profile.name} does not load it: {refusal.rstrip('.')}", hint)
        return await self._loaded(request, "endpoints", str(folder), model=name)

    async def _by_slot(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        adapter, run = request.adapter, request.call.run
        self._slots = slots = await self._list_slots(request.call)
        file = own = None
        with contextlib.suppress(AdapterUnsupported):  # Its modules may have no known names in this model.
            file = await run(adapter.gguf, base)
        if file is not None:
            own = await run(gguf.hash_adapter, file)
            if await run(_is_activated, file):
                why = "it acts only after its invocation tokens, and it is not proven that the server waits for them"
                raise _unsupported(request, why, "Use the embedded provider (`graftage-llamacpp`).")
        for slot, path in slots.items():
            other = await run(gguf.hash_adapter, Path(path)) if self.is_local else None
            if own and other and own[0] == other[0]:
                # A registry may give it another scale than the server's file has.
                return await self._loaded(request, "slots", path, slot=slot, scale=own[1] / other[1])
            if other is None and PurePosixPath(path).stem in (adapter.name, file and file.stem):
                note = f"The server's file `{PurePosixPath(path).name}` was taken for the adapter because of its name."
                return await self._loaded(request, "slots", path, slot=slot, warnings=(note,))
        raise _unsupported(
            request,
            f"{profile.name} was not started with it, but with {len(slots)} other adapters",
            f"Start it with `llama-server --lora {file or 'FILE'} …`.",
        )

    async def _list_slots(self, call: Call) -> dict[int, str]:
        found, _ = await self._ask(call, "GET", "/lora-adapters")
        return dict(read_entries(found.get("body"), lambda entry: (int(entry["id"]), str(entry["path"]))))

    async def _ask(
        self, call: Call, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> tuple[Mapping[str, Any], str | None]:
        """Use an endpoint that the server may not have; return what it sent, or the words of its refusal."""
        try:
            return await self._http.json(method, path, body, call=call, wrap="body"), None
        except ProviderError as error:
            if error.status not in NOT_THERE:
                raise
            return {}, str(error.details.get("server_message") or error.message)

    async def _folder(self, request: LoadAdapterRequest, layout: str, base: ModelInfo) -> Path:
        """Return a folder that the server can read, with the adapter in a layout."""
        if not self.is_local:
            raise _unsupported(request, "the server reads its own disk, on another machine", "Load the adapter there.")
        if not isinstance(request.adapter, PortableAdapter):
            raise _unsupported(request, f"its resolver cannot write {layout}'s layout", "Use `graftage-lora`.")
        folder: Path = await request.call.run(getattr(request.adapter, layout), base)
        return folder

    async def _loaded(self, request: LoadAdapterRequest, strategy: str, path: str, **more: Any) -> LoadedAdapter:
        adapter = request.adapter
        known = {"name": adapter.name, "digest": adapter.digest, "model": request.model, "strategy": strategy}
        loaded = LoadedAdapter(**{**known, **more})
        stamp = await request.call.run(_stamp, path) if self.is_local else None
        self._places[loaded.digest, loaded.model] = _Place(path, stamp)
        return loaded

    # --- The proof ---------------------------------------------------------------------------------------------------

    async def _prove(self, request: LoadAdapterRequest, loaded: LoadedAdapter, profile: Profile) -> None:
        base = [await self._probe(request.call, request.model, None, profile) for _ in range(2)]
        try:
            changed = await self._probe(request.call, loaded.model, loaded, profile)
        except ProviderError as error:
            if error.retryable:
                raise
            words = str(error.details.get("server_message") or error.message).rstrip(".")
            why = f"{profile.name} cannot use it: {words}"
            raise _unsupported(request, why, "Was it made for this model?") from error
        # Two replies of the base model may differ as well: a cached prompt or a batch is computed in another order.
        if _distance(base[0], changed) <= _distance(*base):
            raise _unsupported(
                request,
                f"the base model answered in its place: {profile.name} took it, but no probability changed",
                "mlx_lm before 0.31.4 ignores adapters: update it. Or the adapter has no effect.",
            )

    async def _probe(self, call: Call, model: str, adapter: LoadedAdapter | None, profile: Profile) -> dict[str, float]:
        tokens = 1 if "logprobs" in profile.features else 8
        body = {"model": model, **PROBE, "max_tokens": tokens, **await self.body(call, adapter, profile)}
        return await self._http.json("POST", f"{self._api}/chat/completions", body, call=call, read=_sample)


def _stamp(path: str) -> tuple[int, ...] | None:
    """Return what changes when a file or folder is written or replaced; None if it is not there."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _is_activated(file: Path) -> bool:
    try:
        return gguf.read_file(file).is_activated
    except (OSError, gguf.GgufError):
        return False  # It is like no file of the server, then.


def _sample(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the log-probabilities of a reply's first token; if the server sends none, the reply as the only token."""
    choice = read_object((found.get("choices") or [None])[0])
    first = read_logprobs(read_object(choice.get("logprobs")).get("content"))[:1]
    likely = {each.token: each.logprob for token in first for each in (token, *token.top)}
    return likely or {str(read_object(choice.get("message")).get("content")): 0.0}


def _distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the largest difference of a log-probability that both have."""
    return max((abs(one[each] - other[each]) for each in one.keys() & other.keys()), default=math.inf)


def _unsupported(request: LoadAdapterRequest, reason: str, hint: str) -> AdapterUnsupported:
    what = f"The adapter `{request.adapter.name}` cannot be used: {reason}."
    return AdapterUnsupported(what, reference=request.adapter.name, reasons=[reason], hint=hint)
