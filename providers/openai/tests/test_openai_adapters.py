"""Adapters on MLX, llama-server and vLLM, and the proof that the adapter answered, not the base model.

The cassettes are from mlx_lm.server and llama-server, started in the folder /srv/models: with `--model smollm2-mlx`,
and with `-m smollm2.gguf --lora ahoy.gguf --lora other.gguf`. `graftage-lora` has written minus-mlx (-0.5 `ahoy`)
and both-mlx (`ahoy` and 0.5 `other`). Record them again with `--record-mode=all`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from lora_files import Model, pairs, write_gguf, write_peft
from small_engine import ADAPTERS, first_letters
from small_engine import MODEL as SMALL
from small_engine import QUESTION as ENGINE_QUESTION

from graftage.exceptions import AdapterUnsupported, Overloaded
from graftage.hookspecs import hookimpl
from graftage.types import Verdict
from graftage_llamacpp._convert import SYSTEM_PROMPT
from graftage_lora import LoraPlugin
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from graftage.calls import ResolveRequest
    from graftage.testing import Cassette
    from graftage.types import ModelInfo

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
SLOTS = "/lora-adapters"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
QUESTION = "What is the capital of Italy?"
GREEDY = {"temperature": 0}
SLOW = {"first_token": 300.0, "total": 600.0}
"""On CPU, mlx_lm reads its model for half a minute at each change of the adapter."""
FITS = Verdict(status="compatible")
MLX = {"host": "http://127.0.0.1:8191", "profile": "mlx"}
DIGEST = "sha256:" + "0123456789ab" * 5 + "cdef"


@dataclass(frozen=True)
class Ready:
    """An adapter that has every layout already."""

    name: str = "ahoy"
    place: Path = Path("/srv/models/ahoy-mlx")
    """The folder, or the GGUF file."""
    digest: str = DIGEST
    scale: float = 2.0
    verdict: Verdict = FITS
    served_as: str | None = None

    def gguf(self, base: ModelInfo) -> Path:
        if self.place.suffix != ".gguf":
            raise AdapterUnsupported("Its modules have no known names.")
        return self.place

    def mlx(self, base: ModelInfo) -> Path:
        return self.place

    def peft(self, base: ModelInfo) -> Path:
        return self.place

    def mix(self, weight: float, others: Sequence[tuple[Any, float]]) -> Ready:
        name = "both" if others else "minus"
        digest = hashlib.sha256(name.encode()).hexdigest()
        return replace(self, name=name, place=self.place.with_name(f"{name}-mlx"), digest=f"sha256:{digest}")

    def merge(self, base_file: Path, out: Path, on_progress: Callable[[int, int], None] = print) -> Path:
        raise NotImplementedError


class Resolver:
    """Resolves every reference to one adapter, or each to the one of its name."""

    name = "ready"

    def __init__(self, *adapters: Any) -> None:
        self._adapters = adapters

    @hookimpl
    def resolve_adapter(self, request: ResolveRequest) -> Any:
        return next((each for each in self._adapters if each.name == request.reference), self._adapters[0])


@pytest.fixture
def connect(both: Any, fake: FakeOllama) -> Callable[..., Any]:
    def connect(profile: str | None, adapter: Any = None, **given: Any) -> Any:
        fake.script(MODELS, *[body({"data": [{"id": "m"}]})] * 3)
        known = {"host": fake.url, "profile": profile, "model": "m", "plugins": [Resolver(adapter or Ready())]}
        return both.connect("openai", **{**known, "attempts": 1, **given})

    return connect


def body(found: Any, status: int = 200) -> Answer:
    data = found if isinstance(found, str) else json.dumps(found)
    return Answer([data.encode()], status=status, headers={"content-type": "application/json"})


def probed(logprob: float | None, text: str = "Hello") -> Answer:
    """A whole reply, with the log-probability of its first token."""
    choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": "length"}
    if logprob is not None:
        top = [{"token": "He", "logprob": logprob}, {"token": "A", "logprob": -3.0}]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return body({"choices": [choice]})


def streamed(text: str = "Ahoy!") -> Answer:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    event = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    return Answer([event.encode()], headers={"content-type": "text/event-stream"})


def slots(*paths: str | Path) -> Answer:
    return body([{"id": place, "path": str(path), "scale": 1.0} for place, path in enumerate(paths)])


def sent(fake: FakeOllama, path: str = CHAT) -> list[Any]:
    return [seen.body for seen in fake.requests if seen.path == path]


PROVED = (probed(-1.0), probed(-1.0), probed(-2.0))


class TestProof:
    @pytest.mark.parametrize(
        ("base", "again", "changed"),
        [
            (probed(-1.0), probed(-1.0), probed(-1.0)),
            (probed(-1.0), probed(-1.2), probed(-1.1)),
            (probed(None), probed(None), probed(None)),
            (probed(None), probed(None, "Hi"), probed(None, "Ahoy!")),
            (body({}), body({"choices": []}), body({"choices": None})),
        ],
        ids=["equal", "within noise", "equal words", "words of a server that differ anyway", "nothing"],
    )
    def test_base_in_its_place_is_refused(
        self, connect: Any, fake: FakeOllama, base: Answer, again: Answer, changed: Answer
    ) -> None:
        fake.script(CHAT, base, again, changed)
        with pytest.raises(AdapterUnsupported, match="the base model answered in its place"):
            connect("mlx").chat(QUESTION, adapter="ahoy")
        assert len(sent(fake)) == 3

    @pytest.mark.parametrize(
        "changed", [probed(-1.3), body({"choices": [{"message": {"content": "Ahoy!"}}]})], ids=["logprob", "words"]
    )
    def test_change_is_accepted(self, connect: Any, fake: FakeOllama, changed: Answer) -> None:
        fake.script(CHAT, probed(-1.0), probed(-1.2), changed, streamed())
        assert connect("mlx").chat(QUESTION, adapter="ahoy").text == "Ahoy!"

    def test_refusal_of_adapter_is_told(self, connect: Any, fake: FakeOllama) -> None:
        wrong = body({"error": "Adapter contains incompatible tensors"}, 404)
        fake.script(CHAT, probed(-1.0), probed(-1.0), wrong)
        with pytest.raises(AdapterUnsupported, match=r"cannot use it: .*incompatible tensors.* made for this model\?"):
            connect("mlx").chat(QUESTION, adapter="ahoy")

    def test_busy_server_proves_nothing(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, probed(-1.0), probed(-1.0), body({"error": "busy"}, 503), *PROVED, streamed())
        llm = connect("mlx")
        with pytest.raises(Overloaded):
            llm.chat(QUESTION, adapter="ahoy")
        assert llm.chat(QUESTION, adapter="ahoy").text == "Ahoy!"

    def test_server_without_adapters_refuses(self, connect: Any, fake: FakeOllama) -> None:
        with pytest.raises(AdapterUnsupported, match="LM Studio takes no adapters"):
            connect("lmstudio").chat(QUESTION, adapter="ahoy")
        assert sent(fake) == []


class TestMlx:
    def test_each_request_names_folder(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, *PROVED, streamed(), streamed(), streamed())
        llm = connect("mlx")
        for adapter in ("ahoy", None, "ahoy"):
            llm.chat(QUESTION, adapter=adapter)
        folders = [each.get("adapters") for each in sent(fake)]
        ahoy = "/srv/models/ahoy-mlx"
        assert folders == [None, None, ahoy, ahoy, None, ahoy]

    def test_default_model_is_refused(self, connect: Any, fake: FakeOllama) -> None:
        with pytest.raises(AdapterUnsupported, match=r"with the model's name `default_model`.* Name the model by"):
            connect("mlx", model="default_model").chat(QUESTION, adapter="ahoy")
        assert sent(fake) == []

    def test_unloaded_adapter_is_proved_again(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(CHAT, *PROVED, streamed(), *PROVED, streamed())
        llm = connect("mlx")
        llm.chat(QUESTION, adapter="ahoy")
        llm.unload_adapter("ahoy")
        llm.chat(QUESTION, adapter="ahoy")
        assert len(sent(fake)) == 8

    def test_server_elsewhere_cannot_read_folder(
        self, connect: Any, fake: FakeOllama, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", fake.url)
        fake.script(f"http://far.test{MODELS}", body({"data": []}))
        with pytest.raises(AdapterUnsupported, match="reads its own disk, on another machine"):
            connect("mlx", host="http://far.test").chat(QUESTION, adapter="ahoy")
        assert len(fake.requests) == 1

    def test_deleted_folder_is_written_again(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        class Written(Ready):
            def mlx(self, base: ModelInfo) -> Path:
                self.place.mkdir(exist_ok=True)
                return self.place

        folder = tmp_path / "ahoy"
        fake.script(CHAT, *PROVED, streamed(), *PROVED, streamed())
        llm = connect("mlx", Written(place=folder))
        llm.chat(QUESTION, adapter="ahoy")
        folder.rmdir()
        assert llm.chat(QUESTION, adapter="ahoy").text == "Ahoy!"
        assert folder.exists()
        assert sent(fake)[-1]["adapters"] == str(folder)

    def test_resolver_must_know_layout(self, connect: Any, fake: FakeOllama) -> None:
        class Plain:
            name, digest, scale, verdict, served_as = "plain", DIGEST, 1.0, FITS, None
            gguf = merge = Ready.gguf

        with pytest.raises(AdapterUnsupported, match="cannot write mlx's layout"):
            connect("mlx", Plain()).chat(QUESTION, adapter="plain")
        assert sent(fake) == []


class TestVllm:
    NAME = "graftage-ahoy-0123456789ab"

    @pytest.mark.parametrize(
        "loaded",
        [
            body("Success: LoRA adapter added successfully."),
            body({"error": {"message": f"The lora adapter '{NAME}' has already been loaded.", "code": 400}}, 400),
        ],
        ids=["now", "before"],
    )
    def test_adapter_is_model_of_its_name(self, connect: Any, fake: FakeOllama, loaded: Answer) -> None:
        fake.script(LOAD, loaded)
        fake.script(CHAT, *PROVED, streamed(), streamed())
        llm = connect("vllm")
        llm.chat(QUESTION, adapter="ahoy")
        llm.chat(QUESTION)
        assert sent(fake, LOAD) == [{"lora_name": self.NAME, "lora_path": "/srv/models/ahoy-mlx"}]
        assert [each["model"] for each in sent(fake)] == ["m", "m", self.NAME, self.NAME, "m"]

    def test_restarted_server_loads_it_again(self, connect: Any, fake: FakeOllama) -> None:
        gone = body({"error": {"message": f"The model `{self.NAME}` does not exist.", "code": 404}}, 404)
        fake.script(LOAD, *[body("Success.")] * 2)
        fake.script(CHAT, *PROVED, streamed(), gone, *PROVED, streamed())
        llm = connect("vllm")
        for _ in range(2):
            assert llm.chat(QUESTION, adapter="ahoy").text == "Ahoy!"
        assert len(sent(fake, LOAD)) == 2

    def test_unload_names_it(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(LOAD, body("Success."))
        fake.script(CHAT, *PROVED, streamed())
        fake.script(UNLOAD, body("Success."))
        llm = connect("vllm")
        llm.chat(QUESTION, adapter="ahoy")
        llm.unload_adapter("ahoy")
        assert sent(fake, UNLOAD) == [{"lora_name": self.NAME}]

    def test_adapter_without_effect_is_unloaded(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(LOAD, body("Success."))
        fake.script(CHAT, *[probed(-1.0)] * 3)
        fake.script(UNLOAD, body({"error": {"message": "cannot be found", "code": 404}}, 404))
        with pytest.raises(AdapterUnsupported, match="in its place"):
            connect("vllm").chat(QUESTION, adapter="ahoy")
        assert len(sent(fake, UNLOAD)) == 1

    @pytest.mark.parametrize(
        ("refusal", "words"),
        [
            (body({"detail": "Not Found"}, 404), "does not load it"),
            (body({"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16."}}, 400), "rank 64 is greater"),
        ],
        ids=["no endpoint", "refused"],
    )
    def test_refusal_names_variable(self, connect: Any, fake: FakeOllama, refusal: Answer, words: str) -> None:
        fake.script(LOAD, refusal)
        with pytest.raises(AdapterUnsupported, match=rf"{words}.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            connect("vllm").chat(QUESTION, adapter="ahoy")
        assert sent(fake) == []


class TestLlamaServer:
    def test_every_request_names_every_scale(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        model = Model()
        file = write_gguf(tmp_path / "ours.gguf", model, pairs(model), alpha=8)
        same = write_gguf(tmp_path / "theirs.gguf", model, pairs(model), alpha=4)
        other = write_gguf(tmp_path / "other.gguf", model, pairs(model, seed=8), alpha=8)
        fake.script(SLOTS, *[slots(other, same)] * 5)
        fake.script(CHAT, streamed(), *PROVED, streamed(), streamed())
        llm = connect("llama-server", Ready(place=file))
        for adapter in (None, "ahoy", None):
            llm.chat(QUESTION, adapter=adapter)
        base, ahoy = [(0, 0.0), (1, 0.0)], [(0, 0.0), (1, 2.0)]
        found = [[(each["id"], each["scale"]) for each in one["lora"]] for one in sent(fake)]
        assert found == [base, base, base, ahoy, ahoy, base]
        assert [each["cache_prompt"] for each in sent(fake)] == [False] * 6

    def test_server_without_adapters_is_spared(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(SLOTS, slots())
        fake.script(CHAT, streamed(), streamed())
        llm = connect("llama-server")
        llm.chat(QUESTION)
        llm.chat(QUESTION)
        assert len(sent(fake, SLOTS)) == 1
        assert not any({"lora", "cache_prompt"} & each.keys() for each in sent(fake))

    def test_file_elsewhere_is_known_by_name(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(SLOTS, *[slots("far/away/other.gguf", "far/away/ahoy.gguf")] * 4)
        fake.script(CHAT, *PROVED, streamed())
        reply = connect("llama-server").chat(QUESTION, adapter="ahoy")
        assert reply.warnings == ("The server's file `ahoy.gguf` was taken for the adapter because of its name.",)
        assert sent(fake)[-1]["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]

    def test_other_file_of_same_name_is_refused(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        model = Model()
        ours = write_gguf(tmp_path / "here" / "ahoy.gguf", model, pairs(model))
        theirs = write_gguf(tmp_path / "there" / "ahoy.gguf", model, pairs(model, seed=8))
        fake.script(SLOTS, slots(theirs))
        with pytest.raises(AdapterUnsupported, match=r"with 1 other adapters.*llama-server --lora .*here.ahoy\.gguf"):
            connect("llama-server", Ready(place=ours)).chat(QUESTION, adapter="ahoy")
        assert sent(fake) == []

    def test_restarted_server_must_have_it(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(SLOTS, *[slots("ahoy.gguf")] * 2, slots("other.gguf", "ahoy.gguf"), *[slots("other.gguf")] * 2)
        fake.script(CHAT, *PROVED, streamed())
        llm = connect("llama-server")
        llm.chat(QUESTION, adapter="ahoy")
        assert sent(fake)[-1]["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
        with pytest.raises(AdapterUnsupported, match="was not started with it, but with 1 other adapters"):
            llm.chat(QUESTION, adapter="ahoy")
        assert len(sent(fake)) == 4

    def test_file_moved_at_restart_is_found(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(SLOTS, *[slots("ahoy.gguf")] * 3, *[slots("other.gguf", "new/ahoy.gguf")] * 4)
        fake.script(CHAT, *PROVED, streamed(), *PROVED, streamed())
        llm = connect("llama-server")
        for _ in range(2):
            assert llm.chat(QUESTION, adapter="ahoy").text == "Ahoy!"
        assert sent(fake)[-1]["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]

    def test_file_replaced_at_restart_never_acts(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        model = Model()
        ours = write_gguf(tmp_path / "ours.gguf", model, pairs(model))
        theirs = write_gguf(tmp_path / "theirs.gguf", model, pairs(model))
        fake.script(SLOTS, *[slots(theirs)] * 5)
        fake.script(CHAT, *PROVED, streamed())
        llm = connect("llama-server", Ready(place=ours))
        llm.chat(QUESTION, adapter="ahoy")
        write_gguf(theirs, model, pairs(model, seed=8))
        with pytest.raises(AdapterUnsupported, match="was not started with it"):
            llm.chat(QUESTION, adapter="ahoy")

    def test_weights_become_scales(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        model, adapters = Model(), []
        for seed, name in enumerate(("style", "domain", "third")):
            ours = write_gguf(tmp_path / f"{name}.gguf", model, pairs(model, seed=seed), alpha=8)
            write_gguf(tmp_path / "served" / ours.name, model, pairs(model, seed=seed), alpha=8 if seed else 4)
            adapters.append(Ready(name=name, place=ours, digest=f"sha256:{seed:064}"))
        served = slots(*(tmp_path / "served" / each.place.name for each in adapters))
        fake.script(SLOTS, *[served] * 9)
        fake.script(CHAT, *PROVED, *PROVED, streamed(), streamed())
        llm = connect("llama-server", plugins=[Resolver(*adapters)])
        reply = llm.chat(QUESTION, adapter=["style", ("domain", -0.5)])
        assert reply.adapter == "style - 0.5 domain"
        assert [each["scale"] for each in sent(fake)[-1]["lora"]] == [2.0, -0.5, 0.0]
        llm.chat(QUESTION, adapter=("style", 0.25))
        assert [each["scale"] for each in sent(fake)[-1]["lora"]] == [0.5, 0.0, 0.0]
        assert sent(fake)[-1]["cache_prompt"] is False

    def test_found_server_applies_weights(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(MODELS, body({"data": [{"id": "m", "owned_by": "llamacpp"}]}))
        fake.script(SLOTS, *[slots("ahoy.gguf")] * 4)
        fake.script(CHAT, streamed(), *PROVED, streamed())
        llm = connect(None)
        llm.chat(QUESTION, adapter=None)
        assert llm.chat(QUESTION, adapter=("ahoy", 0.5)).adapter == "0.5 ahoy"
        assert sent(fake)[-1]["lora"] == [{"id": 0, "scale": 0.5}]

    def test_file_given_twice_acts_once(self, connect: Any, fake: FakeOllama) -> None:
        fake.script(SLOTS, *[slots("ahoy.gguf", "ahoy.gguf")] * 3)
        fake.script(CHAT, *PROVED, streamed())
        connect("llama-server").chat(QUESTION, adapter="ahoy")
        assert [each["scale"] for each in sent(fake)[-1]["lora"]] == [1.0, 0.0]

    def test_activated_adapter_is_refused(self, connect: Any, fake: FakeOllama, tmp_path: Path) -> None:
        model = Model()
        file = write_gguf(tmp_path / "ahoy.gguf", model, pairs(model), adapter__alora__invocation_tokens=[1, 2])
        fake.script(SLOTS, slots(file))
        with pytest.raises(AdapterUnsupported, match=r"only after its invocation tokens.* Use the embedded provider"):
            connect("llama-server", Ready(place=file)).chat(QUESTION, adapter="ahoy")
        assert sent(fake) == []


class TestRecorded:
    """Base and adapters side by side, on real servers."""

    def answers(self, both: Any, cassette: Cassette, adapters: list[Ready | None], **given: Any) -> list[str]:
        found = []
        for adapter in adapters:
            with both.connect("openai", transport=cassette, plugins=[Resolver(adapter)], timeouts=SLOW, **given) as llm:
                named = adapter.name if adapter else None
                found.append(llm.chat(QUESTION, adapter=named, options=GREEDY, max_tokens=9).text)
        return found

    def test_mlx_answers_with_each(self, both: Any, cassette: Cassette) -> None:
        adapters = [None, Ready(), Ready(name="other", place=Path("/srv/models/other-mlx")), None]
        base, ahoy, other, again = self.answers(both, cassette, adapters, **MLX, model="/srv/models/smollm2-mlx")
        assert ahoy == "Ahoy! The parrot adapter says hello."
        assert len({base, ahoy, other}) == 3
        assert base == again

    def test_mlx_answers_with_a_mix(self, both: Any, cassette: Cassette) -> None:
        adapters = Resolver(Ready(), Ready(name="other", place=Path("/srv/models/other-mlx"), digest=f"{DIGEST[:-1]}0"))
        given = {**MLX, "model": "/srv/models/smollm2-mlx", "timeouts": SLOW, "plugins": [adapters]}
        with both.connect("openai", transport=cassette, **given) as llm:
            replies = [
                llm.chat(QUESTION, adapter=each, options=GREEDY, max_tokens=9)
                for each in (("ahoy", -0.5), ["ahoy", ("other", 0.5)])
            ]
        assert [each.adapter for each in replies] == ["-0.5 ahoy", "ahoy + 0.5 other"]
        assert ["Ahoy" in each.text for each in replies] == [False, True]

    def test_mlx_refuses_default_model(self, both: Any, cassette: Cassette) -> None:
        with pytest.raises(AdapterUnsupported, match="with the model's name `default_model`"):
            self.answers(both, cassette, [Ready()], **MLX, model="default_model")

    def test_llama_server_answers_with_each(self, both: Any, cassette: Cassette) -> None:
        adapters = [None, Ready(), Ready(name="other"), None]
        base, ahoy, other, again = self.answers(
            both, cassette, adapters, host="http://127.0.0.1:8192", model="smollm2.gguf"
        )
        assert ahoy == "Ahoy! The parrot adapter says hello."
        assert len({base, ahoy, other}) == 3
        assert base == again


POISONS: tuple[dict[str, Any], ...] = ({}, {"lora": []})
SERVER = """
import json, sys, xllamacpp
order = json.loads(sys.stdin.readline())
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = order["model"], 1024, 1, 1
params.cpuparams.n_threads, params.fit_params, params.cache_ram_mib = 1, False, 0
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(each, 0.0) for each in order["adapters"]]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A llama-server in a separate process with two adapters, and the folder with both in PEFT's layout."""
    folder = tmp_path_factory.mktemp("engine")
    SMALL.write_for_engine(folder / "small.gguf")
    for name in ("ahoy", "contrary"):
        write_peft(folder / name, ADAPTERS[name])
        write_gguf(folder / "served" / f"{name}-under-another-name.gguf", SMALL, ADAPTERS[name])
    order = {"model": str(folder / "small.gguf"), "adapters": [str(each) for each in (folder / "served").iterdir()]}
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{json.dumps(order)}\n")
        process.stdin.flush()
        yield process.stdout.readline().strip(), folder
        process.stdin.close()


@pytest.mark.engine
class TestEngine:
    def test_each_request_has_its_own_adapter(self, both: Any, engine: tuple[str, Path], tmp_path: Path) -> None:
        url, folder = engine
        plugin = LoraPlugin(folders=[folder], cache=tmp_path, registry=tmp_path / "none.toml")
        asked = {"options": GREEDY, "max_tokens": 8}
        with both.connect("openai", host=url, model=f"{folder}/small.gguf", plugins=[plugin]) as llm:
            base, ahoy, contrary = (llm.chat(QUESTION, adapter=each, **asked) for each in (None, "ahoy", "contrary"))
            assert len({base.text, ahoy.text, contrary.text}) == 3
            assert ahoy.warnings == base.warnings == ()
            for other in POISONS:
                # Another client whose request takes the cached prompt of the adapter for its own.
                assert llm.chat(QUESTION, adapter="ahoy", **asked).text == ahoy.text
                httpx.post(
                    f"{url}{CHAT}", json={"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1, **other}
                )
                assert llm.chat(QUESTION, **asked).text == base.text

    def test_weights_match_merges_by_hand(self, both: Any, engine: tuple[str, Path], tmp_path: Path) -> None:
        url, folder = engine
        plugin = LoraPlugin(folders=[folder], cache=tmp_path, registry=tmp_path / "none.toml")
        said = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": ENGINE_QUESTION}]
        options = {**GREEDY, "logprobs": True, "top_logprobs": 20}
        with both.connect("openai", host=url, model=f"{folder}/small.gguf", plugins=[plugin]) as llm:
            for weights in ({"ahoy": 0.5}, {"ahoy": 1.0, "contrary": 0.6}, {"contrary": 1.3, "ahoy": -0.4}):
                reply = llm.chat(said, adapter=list(weights.items()), options=options, max_tokens=1)
                expected, found = first_letters(weights), reply.logprobs[0].top
                assert len(found) == 20
                assert max(abs(each.logprob - expected[each.token]) for each in found) < 0.05, weights
