"""How each server takes an adapter, and the proof that the adapter answered.

mlx_lm reads the folder that a request names. llama-server scales, for each request, the adapters that it was started
with. vLLM loads a folder under a name. Some of them let the base model answer without a word: mlx_lm for its default
model and in old releases, llama-server for a number that it does not know.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from graftage import gguf
from graftage.calls import UnloadAdapterRequest
from graftage.exceptions import AdapterError, AdapterUnsupported, ProviderError
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


class Adapters:
    """The adapters of one connection."""

    def __init__(self, http: Http, api: str) -> None:
        self._http = http
        self._api = api
        self.is_local = is_local(http.base_url)
        self._places: dict[tuple[str, str], str] = {}
        """By digest and model: the folder for mlx_lm, or the file of llama-server."""
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
        place = self._places.get((adapter.digest, adapter.model)) if adapter else None
        if profile.adapters == "slots" and (adapter or self._slots is None):
            self._slots = await self._list_slots(call)  # The server may have been restarted with others.
        slots = self._slots or {}
        if adapter and (place is None or (profile.adapters == "slots" and place not in slots.values())):
            why = f"The server no longer has the adapter `{adapter.name}`."
            raise AdapterError(why, reference=adapter.name, hint="Unload it, and load it again.")
        if profile.adapters == "request" and place:
            return {"adapters": place}
        if not slots:
            return {}
        scale = adapter.scale if adapter else 0.0
        scales = [{"id": slot, "scale": scale if path == place else 0.0} for slot, path in slots.items()]
        # Its cache mixes up prompts that were read with different adapters (seen with build 11549).
        return {"lora": scales, "cache_prompt": False}

    # --- Servers -----------------------------------------------------------------------------------------------------

    async def _by_request(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        if request.model == profile.default_model:
            raise _unsupported(
                request,
                f"with the model's name `{request.model}`, {profile.name} ignores adapters",
                f"Name the model by its folder, {f'`{base.path}`' if base.path else 'or by its repository'}.",
            )
        folder = await self._folder(request, "mlx", base)
        return self._loaded(request, "request", str(folder))

    async def _by_endpoint(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        folder = await self._folder(request, "peft", base)
        slug = re.sub(r"[^a-z0-9]+", "-", request.adapter.name.lower()).strip("-")[:40]
        name = f"graftage-{slug}-{request.adapter.digest.removeprefix('sha256:')[:12]}"
        body = {"lora_name": name, "lora_path": str(folder)}
        _, refusal = await self._ask(request.call, "POST", f"{self._api}/load_lora_adapter", body)
        if refusal is not None and "already been loaded" not in refusal:
            hint = "Start vLLM with `--enable-lora`, and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
            raise _unsupported(request, f"{profile.name} does not load it: {refusal.rstrip('.')}", hint)
        return self._loaded(request, "endpoints", str(folder), model=name)

    async def _by_slot(self, request: LoadAdapterRequest, profile: Profile, base: ModelInfo) -> LoadedAdapter:
        adapter, run = request.adapter, request.call.run
        self._slots = slots = await self._list_slots(request.call)
        file = own = None
        with contextlib.suppress(AdapterUnsupported):  # Its modules may have no known names in this model.
            file = await run(adapter.gguf, base)
            own = await run(gguf.hash_adapter, file)
        for slot, path in slots.items():
            other = await run(gguf.hash_adapter, Path(path)) if self.is_local else None
            if own and other and own[0] == other[0]:
                # A registry may give it another scale than the server's file has.
                return self._loaded(request, "slots", path, slot=slot, scale=own[1] / other[1])
            if other is None and PurePosixPath(path).stem in (adapter.name, file and file.stem):
                note = f"The server's file `{PurePosixPath(path).name}` was taken for the adapter because of its name."
                return self._loaded(request, "slots", path, slot=slot, warnings=(note,))
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

    def _loaded(self, request: LoadAdapterRequest, strategy: str, place: str, **more: Any) -> LoadedAdapter:
        adapter = request.adapter
        known = {"name": adapter.name, "digest": adapter.digest, "model": request.model, "strategy": strategy}
        loaded = LoadedAdapter(**{**known, **more})
        self._places[loaded.digest, loaded.model] = place
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
