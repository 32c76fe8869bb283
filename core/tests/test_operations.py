"""More operations: count tokens, rerank, delete models, prefix inputs, and retry replies that do not fit."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from giving import Giving
from plain import PlainEcho
from pydantic import BaseModel
from suite import Watcher

from graftage._engine.purposes import prefix_for
from graftage.exceptions import (
    CapabilityUnsupported,
    ConnectionFailed,
    InferenceFailed,
    ModelNotFound,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import Chunk, Message, Ranked, Ranking, Usage

MODEL = "echo:latest"


class City(BaseModel):
    name: str
    people: int


GOOD = '{"name": "Delft", "people": 109000}'
BAD = '{"name": "Delft", "people": "many"}'
CUT = [Chunk(text='{"name": "De'), Chunk(finish_reason="length", usage=Usage(input_tokens=1, output_tokens=1))]


def returning(both: Any, name: str, result: Any) -> Any:
    """Return a client whose provider has one result for each call of a hook."""

    async def hook(_: Any, request: Any) -> Any:
        return result

    async def chat(_: Any, request: Any) -> Any:
        yield Chunk(finish_reason="stop")

    kind = type("Connection", (), {name: hookimpl(hook), "chat": hookimpl(chat)})
    return both.connect(Giving(lambda _: kind()), model=MODEL)


class TestCountTokens:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho])
    def test_counts_what_chat_sends(self, both: Any, kind: type[Echo], watcher: Watcher) -> None:
        echo = kind()
        llm = both.connect(echo, model=MODEL, plugins=[watcher])

        def look_up(name: str) -> str:
            """Look up."""
            return name

        messages = [{"role": "system", "content": "Be brief."}, "How are you?"]
        given: dict[str, Any] = {
            "tools": [look_up],
            "images": [b"GIF89a"],
            "options": {"seed": 1},
            "context_window": 99,
        }
        assert llm.count_tokens(messages, **given) == 5
        llm.chat(messages, **given)
        counted, chatted = (request for request in echo.requests if hasattr(request, "messages"))
        fields = ("model", "messages", "tools", "options", "context_window", "keep_alive", "adapter")
        assert [getattr(counted, each) for each in fields] == [getattr(chatted, each) for each in fields]
        assert watcher.kinds("count_tokens") == ["start", "admitted", "finish"]
        event = next(each for each in watcher.events if (each.operation, each.kind) == ("count_tokens", "finish"))
        assert event.usage == Usage(input_tokens=5)
        assert llm.stats().input_tokens == 5, "only the chat counts as work"

    @pytest.mark.parametrize(
        ("count", "words"), [(0, "counted 0"), (-3, "counted -3"), (True, "counted True"), (2.0, "float")]
    )
    def test_invalid_count_is_an_error(self, both: Any, count: Any, words: str) -> None:
        llm = returning(both, "count_tokens", count)
        with pytest.raises(ProviderError, match=words):
            llm.count_tokens("Hi")
        assert (llm.stats().running, llm.stats().failures) == (0, 1)


@pytest.mark.parametrize(
    "act",
    [
        lambda llm: llm.count_tokens([]),
        lambda llm: llm.count_tokens("Hi", context_window=0),
        lambda llm: llm.rerank("Hi", "one text"),
        lambda llm: llm.rerank("Hi", []),
        lambda llm: llm.rerank("Hi", [b"x"]),
        lambda llm: llm.rerank(5, ["x"]),
        lambda llm: llm.delete(""),
        lambda llm: llm.delete(None),
        lambda llm: llm.delete(True),
        lambda llm: llm.embed("Hi", purpose="search"),
        lambda llm: llm.embed("Hi", options={"truncate": False}),
        lambda llm: llm.embed("Hi", purpose=["query"]),
        lambda llm: llm.chat("Hi", format="json", retries=-1),
        lambda llm: llm.chat("Hi", format="json", retries=True),
        lambda llm: llm.chat("Hi", format="json", retries=99),
        lambda llm: llm.chat("Hi", retries=1),
        lambda llm: llm.chat("Hi", format="json", retries=1, stream=True),
    ],
)
def test_invalid_arguments_are_refused(both: Any, act: Any) -> None:
    echo = Echo()
    llm = both.connect(echo, model=MODEL)
    with pytest.raises(RequestRejected) as caught:
        act(llm)
    assert caught.value.hint
    assert (echo.requests, llm.stats().running) == ([], 0)


@pytest.mark.parametrize("name", ["count_tokens", "rerank", "delete_model"])
def test_missing_hooks_are_refused(both: Any, name: str) -> None:
    echo = Echo(without=[name])
    llm = both.opened(echo, model=MODEL)
    acts = {
        "count_tokens": lambda: llm.count_tokens("Hi"),
        "rerank": lambda: llm.rerank("Hi", ["x"]),
        "delete_model": lambda: llm.delete("echo:latest"),
    }
    assert name not in llm.capabilities().features
    with pytest.raises(CapabilityUnsupported, match=name):
        acts[name]()
    assert echo.requests == []
    assert name in both.opened(Echo()).capabilities().features


def ranking(*pairs: tuple[Any, Any]) -> Ranking:
    return Ranking(results=tuple(Ranked(index=index, score=score) for index, score in pairs))


WRONG: dict[str, tuple[Any, str]] = {
    "one too few": (ranking((0, 1.0)), "1 for 2"),
    "one too many": (ranking((0, 1.0), (1, 1.0), (2, 1.0)), "3 for 2"),
    "no results": (ranking(), "0 for 2"),
    "one twice": (ranking((0, 1.0), (0, 2.0)), "twice"),
    "out of range": (ranking((0, 1.0), (2, 2.0)), "twice, or one"),
    "below the first": (ranking((0, 1.0), (-1, 2.0)), "twice, or one"),
    "a text as index": (ranking((0, 1.0), ("1", 2.0)), "twice, or one"),
    "a bool as index": (ranking((0, 1.0), (True, 2.0)), "twice, or one"),
    "not a number": (ranking((0, math.nan), (1, 1.0)), "finite"),
    "infinite": (ranking((0, math.inf), (1, 1.0)), "finite"),
    "a text as score": (ranking((0, "1"), (1, 1.0)), "finite"),
    "other things": (Ranking(results=("a", "b")), "not a tuple of `Ranked`"),  # type: ignore[arg-type]
    "a list": (Ranking(results=[Ranked(index=0, score=1.0)]), "not a tuple of `Ranked`"),  # type: ignore[arg-type]
    "another kind": ([0.5, 0.4], "instead of Ranking"),
}


class TestRerank:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho])
    def test_best_comes_first(self, both: Any, kind: type[Echo]) -> None:
        llm = both.connect(kind(), model=MODEL, context_window=64)
        found = llm.rerank("a red apple", ["a car", "an apple", "a red apple", "nothing"])
        assert [(each.index, each.score) for each in found.results] == [(2, 3.0), (0, 1.0), (1, 1.0), (3, 0.0)]
        assert (found.model, found.provider, found.usage.input_tokens) == (MODEL, "echo", 11)
        assert found.timings.wall is not None
        assert llm.stats().input_tokens == 11

    @pytest.mark.parametrize("fault", WRONG)
    def test_invalid_ranking_is_an_error(self, both: Any, fault: str) -> None:
        result, words = WRONG[fault]
        llm = returning(both, "rerank", result)
        with pytest.raises(ProviderError, match=words) as caught:
            llm.rerank("Hi", ["a", "b"])
        assert caught.value.hint
        assert (llm.stats().running, llm.stats().failures) == (0, 1)

    def test_chain_uses_the_first_able(self, both: Any) -> None:
        llm = both.connect([Echo(without=["rerank"]), Echo()], model=MODEL)
        found = llm.rerank("a", ["b", "a"])
        assert [each.index for each in found.results] == [1, 0]
        assert len(found.warnings) == 1
        with pytest.raises(RuntimeError, match="members"):
            llm.count_tokens("Hi")
        with pytest.raises(RuntimeError, match="members"):
            llm.delete(MODEL)


@pytest.mark.parametrize("kind", [Echo, PlainEcho])
def test_deleted_model_is_forgotten(both: Any, kind: type[Echo], watcher: Watcher) -> None:
    echo = kind(models=["a:1", "b:1"], strict=True)
    llm = both.connect(echo, model="a:1", plugins=[watcher])
    assert llm.health("model_present").ok
    assert llm.delete("a:1") is None
    assert [each.name for each in llm.models()] == ["b:1"]
    assert not llm.health("model_present").ok, "known facts must not survive"
    with pytest.raises(ModelNotFound) as caught:
        llm.delete("a:1")
    assert caught.value.operation == "delete_model"
    assert watcher.kinds("delete_model") == ["start", "finish", "start", "error"]


PREFIXES = [
    ("nomic-embed-text", "search_query: ", "search_document: "),
    ("nomic-embed-text:v1.5", "search_query: ", "search_document: "),
    ("registry.ollama.ai/library/nomic-embed-text:latest", "search_query: ", "search_document: "),
    ("hf.co/nomic-ai/nomic-embed-text-v1.5-GGUF:Q4_K_M", "search_query: ", "search_document: "),
    ("hf://nomic-ai/nomic-embed-text-v1.5-GGUF/nomic-embed-text-v1.5.Q8_0.gguf", "search_query: ", "search_document: "),
    ("/models/Nomic_Embed_Text_v1.5.gguf", "search_query: ", "search_document: "),
    ("mxbai-embed-large:335m", "Represent this sentence for searching relevant passages: ", ""),
    ("bge-large", "Represent this sentence for searching relevant passages: ", ""),
    ("BAAI/bge-small-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
    ("bge-m3", "", ""),
    ("intfloat/e5-large-v2", "query: ", "passage: "),
    ("jeffh/intfloat-multilingual-e5-large", None, None),
    ("multilingual-e5-large", "query: ", "passage: "),
    ("snowflake-arctic-embed:22m", "Represent this sentence for searching relevant passages: ", ""),
    ("snowflake-arctic-embed2", "query: ", ""),
    ("Snowflake/snowflake-arctic-embed-l-v2.0", "query: ", ""),
    ("embeddinggemma:300m", "task: search result | query: ", "title: none | text: "),
    ("all-minilm", "", ""),
    ("nomic-embed-textual", None, None),
    ("smollm2:135m", None, None),
]


class TestPurpose:
    @pytest.mark.parametrize(("model", "query", "document"), PREFIXES, ids=[each[0] for each in PREFIXES])
    def test_prefix_follows_the_model(self, model: str, query: str | None, document: str | None) -> None:
        assert (prefix_for(model, "query"), prefix_for(model, "document")) == (query, document)

    def test_instructions_match_the_model_card(self) -> None:
        task = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
        assert prefix_for("qwen3-embedding:0.6b", "query") == task
        assert prefix_for("multilingual-e5-large-instruct", "query") == f"{task} "
        assert prefix_for("qwen3-embedding:0.6b", "document") == ""

    def test_each_input_gets_its_prefix(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model="nomic-embed-text")
        for purpose in ("query", "document", None):
            assert llm.embed(["a", "b"], purpose=purpose).warnings == ()
        assert [request.inputs for request in echo.requests] == [
            ("search_query: a", "search_query: b"),
            ("search_document: a", "search_document: b"),
            ("a", "b"),
        ]

    def test_unknown_prefix_is_a_warning(self, both: Any) -> None:
        echo = Echo()
        (warning,) = both.connect(echo, model=MODEL).embed("a", purpose="query").warnings
        assert "`purpose`" in warning
        assert MODEL in warning
        assert echo.requests[-1].inputs == ("a",)

    def test_chain_member_gets_its_prefix(self, both: Any) -> None:
        first, second = Echo(errors={"embed": ConnectionFailed("gone")}), Echo()
        both.connect([(first, {"model": "bge-m3"}), (second, {"model": "nomic-embed-text"})]).embed(
            "a", purpose="query"
        )
        assert [each.requests[-1].inputs for each in (first, second)] == [("a",), ("search_query: a",)]


def _slowly(seconds: float) -> str:
    time.sleep(seconds)
    return BAD


class TestRetries:
    @pytest.mark.parametrize("kind", [Echo, PlainEcho])
    def test_misfit_is_asked_for_again(self, both: Any, kind: type[Echo], watcher: Watcher) -> None:
        echo = kind([BAD, "no JSON", GOOD])
        llm = both.connect(echo, model=MODEL, plugins=[watcher])
        reply = llm.chat("Delft?", format=City, retries=2, options={"seed": 1}, max_tokens=50)
        assert (reply.parsed, reply.attempts) == (City(name="Delft", people=109000), 3)
        first, second, third = echo.requests
        assert first.messages == (Message(role="user", content="Delft?"),)
        assert third.messages[:3] == second.messages
        assert second.messages[:2] == (*first.messages, Message(role="assistant", content=BAD))
        assert [each.role for each in third.messages] == ["user", "assistant", "user", "assistant", "user"]
        assert "people" in second.messages[2].content
        assert "valid integer" in second.messages[2].content
        assert "https://" not in second.messages[2].content
        assert [each.options for each in echo.requests] == [{"seed": 1}] * 3
        assert [each.max_tokens for each in echo.requests] == [50] * 3
        usages = [event.usage for event in watcher.events if event.kind == "finish"]
        assert (llm.stats().calls, llm.stats().failures, len(usages)) == (3, 2, 1)
        assert reply.usage.output_tokens == sum(len(each.split()) for each in (BAD, "no JSON", GOOD))

    def test_fit_is_asked_for_once(self, both: Any) -> None:
        echo = Echo([GOOD])
        assert both.connect(echo, model=MODEL).chat("Delft?", format=City, retries=2).attempts == 1
        assert len(echo.requests) == 1

    def test_last_misfit_is_raised(self, both: Any) -> None:
        echo = Echo([BAD, BAD, BAD, GOOD])
        with pytest.raises(InferenceFailed, match="does not match") as caught:
            both.connect(echo, model=MODEL).chat("Delft?", format=City, retries=2)
        assert (caught.value.attempts, len(echo.requests)) == (3, 3)
        assert caught.value.partial is not None
        assert caught.value.partial.text == BAD

    def test_later_failure_is_raised(self, both: Any) -> None:
        echo = Echo([BAD, ConnectionFailed("gone")])
        with pytest.raises(ConnectionFailed) as caught:
            both.connect(echo, model=MODEL, attempts=1).chat("Delft?", format=City, retries=2)
        assert caught.value.attempts == 2

    @pytest.mark.parametrize("retries", [0, 1])
    def test_schemas_are_asked_for_again(self, both: Any, retries: int) -> None:
        for wanted in ("json", {"type": "object"}):
            llm = both.connect(Echo(["{", "{}"]), model=MODEL)
            if retries:
                assert llm.chat("x", format=wanted, retries=retries).parsed == {}
            else:
                with pytest.raises(InferenceFailed):
                    llm.chat("x", format=wanted)

    @pytest.mark.parametrize(
        "step", [CUT, [Chunk(text="{")], ConnectionFailed("gone")], ids=["cut", "no end", "no reply"]
    )
    def test_cut_reply_is_not_repeated(self, both: Any, step: Any) -> None:
        echo = Echo([step, GOOD])
        with pytest.raises(ProviderError):
            both.connect(echo, model=MODEL, attempts=1).chat("Delft?", format=City, retries=2)
        assert len(echo.requests) == 1

    def test_share_one_deadline(self, both: Any) -> None:
        echo = Echo([lambda _: _slowly(0.1), lambda _: _slowly(0.1), GOOD])
        both.connect(echo, model=MODEL).chat("Delft?", format=City, retries=2, timeout=30)
        deadlines = [each.call.deadline for each in echo.requests]
        assert max(deadlines) - min(deadlines) < 0.09
        late = Echo([lambda _: _slowly(0.3)])
        with pytest.raises((InferenceFailed, ProviderTimeout)):
            both.connect(late, model=MODEL).chat("Delft?", format=City, retries=2, timeout=0.2)
        assert len(late.requests) == 1

    def test_chain_asks_the_same_member(self, both: Any) -> None:
        first, second = Echo([ConnectionFailed("gone")]), Echo([BAD, GOOD])
        reply = both.connect([first, second], model=MODEL).chat("Delft?", format=City, retries=1)
        assert (reply.attempts, len(reply.warnings)) == (2, 1)
        assert (len(first.requests), len(second.requests)) == (1, 2)
