"""Errors of providers, and what providers or models cannot do."""

from __future__ import annotations

from typing import Any

import pytest
from giving import Giving
from operations import OPERATIONS

from graftage.exceptions import (
    CapabilityUnsupported,
    ConnectionFailed,
    GraftageError,
    ProviderError,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import (
    Capabilities,
    Chunk,
    ModelInfo,
)

MODEL = "m:1"
TOOL = {"name": "f"}
GONE = ConnectionFailed("gone")


class MuteConnection:
    """A connection whose hooks return nothing."""

    @hookimpl
    def chat(self, request: Any) -> Any:
        return None

    @hookimpl
    def health(self, request: Any) -> Any:
        return None

    @hookimpl
    def embed(self, request: Any) -> Any:
        return None

    @hookimpl
    def list_models(self, request: Any) -> Any:
        return None

    @hookimpl
    def loaded_models(self, request: Any) -> Any:
        return None

    @hookimpl
    def show_model(self, request: Any) -> Any:
        return None

    @hookimpl
    def pull_model(self, request: Any) -> Any:
        return None


class TestProviderErrors:
    def test_errors_name_the_call(self, both: Any) -> None:
        llm = both.connect(Echo([ConnectionFailed("gone")]), model=MODEL)
        with pytest.raises(ConnectionFailed) as caught:
            llm.chat("x")
        assert (caught.value.provider, caught.value.model, caught.value.operation) == ("echo", MODEL, "chat")

    @pytest.mark.parametrize(
        "raised", [KeyError("k"), ValueError("v"), OSError("o"), StopIteration(), RuntimeError("r")]
    )
    @pytest.mark.parametrize("place", ["call", "first chunk", "later chunk"])
    def test_foreign_exceptions_are_wrapped(self, both: Any, raised: Exception, place: str) -> None:
        steps: dict[str, Any] = {
            "call": raised,
            "first chunk": [raised],
            "later chunk": [Chunk(text="so far"), raised],
        }
        llm = both.connect(Echo([steps[place]]), model=MODEL)
        with pytest.raises(ProviderError) as caught:
            llm.chat("x")
        error = caught.value
        assert (error.provider, error.model, error.operation, error.retryable) == ("echo", MODEL, "chat", False)
        assert "fault of the provider" in str(error)
        assert isinstance(error.__cause__, type(raised) | RuntimeError)
        assert (error.partial.text if error.partial else None) == ("so far" if place == "later chunk" else None)

    def test_own_line_is_named(self, both: Any) -> None:
        library: dict[str, Any] = {}
        exec(compile("def read():\n    raise KeyError", "/elsewhere/library.py", "exec"), library)

        def ask(_: Any) -> str:
            return str(library["read"]())

        with pytest.raises(ProviderError, match=r"KeyError in `ask` \(test_provider_errors\.py, line \d+\)"):
            both.connect(Echo([ask]), model=MODEL).chat("x")

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_every_operation_wraps_them(self, both: Any, operation: str) -> None:
        llm = both.connect(Echo(errors={operation: KeyError("k")}), model=MODEL)
        with pytest.raises(ProviderError) as caught:
            OPERATIONS[operation](llm)
        assert isinstance(caught.value.__cause__, KeyError)
        assert caught.value.operation == operation
        assert llm.stats().running == 0

    @pytest.mark.parametrize(
        "operation", ["chat", "embed", "list_models", "loaded_models", "show_model", "pull_model", "health"]
    )
    def test_hook_must_return_a_result(self, both: Any, operation: str) -> None:
        llm = both.connect(Giving(lambda _: MuteConnection()), model=MODEL)
        with pytest.raises(GraftageError):
            llm.health(timeout=1).raise_for_error() if operation == "health" else OPERATIONS[operation](llm)
        assert llm.stats().running == 0

    @pytest.mark.parametrize(
        ("chunk", "words"),
        [
            ("text", "`echo` gave str instead of a Chunk"),
            (5, "gave int"),
            ({"text": "x"}, "gave dict"),
            (Chunk(text=5), "Chunk whose `text` or `thinking`"),  # type: ignore[arg-type]
            (Chunk(thinking=b"x"), "Chunk whose `text` or `thinking`"),  # type: ignore[arg-type]
        ],
    )
    def test_invalid_chunks_are_errors(self, both: Any, chunk: Any, words: str) -> None:
        llm = both.connect(Echo([[chunk]]), model=MODEL)
        with pytest.raises(ProviderError, match=words):
            llm.chat("x")
        assert llm.stats().running == 0

    def test_dead_server_is_asked_once(self, both: Any) -> None:
        echo = Echo([GONE])
        with pytest.raises(ConnectionFailed):
            both.connect(echo, model=MODEL).chat("x")
        assert len(echo.requests) == 1


class TestCapabilities:
    def test_missing_hooks_are_refused(self, both: Any) -> None:
        echo = Echo(without=["load_adapter", *(hook for hook in OPERATIONS if hook != "chat")])
        llm = both.connect(echo, model=MODEL)
        for operation, act in OPERATIONS.items():
            if operation != "chat":
                with pytest.raises(CapabilityUnsupported, match=f"`{operation}`") as caught:
                    act(llm)
                assert (caught.value.provider, caught.value.retryable) == ("echo", False)
        with pytest.raises(CapabilityUnsupported, match="load_adapter"):
            llm.use_adapter("x")
        assert echo.requests == []

    @pytest.mark.parametrize(
        ("feature", "arguments"),
        [
            ("tools", {"tools": [TOOL]}),
            ("structured_output", {"format": "json"}),
            ("thinking", {"think": True}),
            ("images", {"images": [b"x"]}),
        ],
    )
    def test_missing_features_are_refused(self, both: Any, feature: str, arguments: dict[str, Any]) -> None:
        echo = Echo(without=["capabilities"])
        with pytest.raises(CapabilityUnsupported, match=feature):
            both.connect(echo, model=MODEL).chat("x", **arguments)
        assert echo.requests == []

    def test_known_model_facts_refuse(self, both: Any) -> None:
        plain = ModelInfo(name="plain:1", features=frozenset({"chat"}))
        echo = Echo(["ok"], models=[plain])
        llm = both.connect(echo, model="plain:1")
        assert llm.chat("x", tools=[TOOL]).text == "ok"
        llm.show()
        asked = len(echo.requests)
        with pytest.raises(CapabilityUnsupported, match=r"`tools` with `plain:1`"):
            llm.chat("x", tools=[TOOL])
        assert len(echo.requests) == asked

    def test_default_to_implemented_hooks(self, both: Any) -> None:
        llm = both.opened(Echo(without=["capabilities", "embed"]), model=MODEL)
        features = llm.capabilities().features
        assert {"chat", "generate", "pull_model"} <= features
        assert "embed" not in features
        assert both.opened(Echo(), model=MODEL).capabilities().options >= {"temperature", "seed"}

    def test_default_names_only_features(self, both: Any) -> None:
        declared = both.opened(Echo(), model=MODEL).capabilities().features
        found = both.opened(Echo(without=["capabilities"]), model=MODEL).capabilities().features
        assert sorted(found - declared) == []

    def test_need_no_io(self, both: Any) -> None:
        echo = Echo()
        assert isinstance(both.opened(echo, model=MODEL).capabilities(), Capabilities)
        assert echo.requests == []
