"""The contract as tests: each claims one thing, and its documentation says what to do if it fails.

`llm` is a client on the test's cassette. `server` is a stand-in that answers as recorded, and `ask` sends it a chat;
`spy` also has what the hooks gave. See `adoption.py`.
"""

from __future__ import annotations

import base64
import logging
import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, get_args

import pytest
from loguru import logger

from graftage.exceptions import (
    AuthenticationFailed,
    CapabilityUnsupported,
    ConnectionFailed,
    ContextOverflow,
    GraftageError,
    InferenceFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
    SettingsError,
    StreamInterrupted,
)
from graftage.hookspecs import CONNECTION_SPECS, AnswersRequest
from graftage.settings import Settings
from graftage.testing.both import Both
from graftage.testing.cassettes import Cassette
from graftage.testing.conformance.adoption import PROMPT, RECORDED_CHATS, Adoption, not_applicable, not_offered
from graftage.testing.conformance.spy import Spy
from graftage.testing.conformance.standin import PATIENCE, Answer, Probe, Redirect, dead_address
from graftage.types import HEALTH_LEVELS, Chunk, Feature, Image, Timeouts, Usage, canonical_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftage.testing.conformance.standin import StandIn

    Ask = Callable[..., Any]

__all__ = ["ProviderSuite"]

KEY: Final = "sesame-0123456789-abcdef"
NOBODY: Final = "graftage-no-such-model:1b"
OPERATIONS: Final = {name for spec in CONNECTION_SPECS for name in vars(spec) if not name.startswith("_")}
CITY: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Final = {"name": "get_weather", "description": "The weather in a city", "parameters": CITY}
PICTURE: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
PARAMETERS: Final[dict[str, Any]] = {"max_tokens": 7, "context_window": 4096, "keep_alive": 77}
OPTIONS: Final[dict[str, Any]] = {
    "frequency_penalty": 0.5,
    "logprobs": True,
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "repeat_penalty": 1.5,
    "seed": 11,
    "stop": ["|"],
    "temperature": 0.25,
    "top_k": 5,
    "top_p": 0.75,
}
"""A value for each option whose meaning the core knows."""


class ProviderSuite(Adoption):
    """What every provider must do."""

    # --- Connecting ------------------------------------------------------------------------------------------------

    def test_connects(self, connect: Any) -> None:
        """A client opens: the plugin and its connection have valid hooks, and `chat` is one of them.

        If it fails: the error names the hook. Put `@hookimpl` above it, and give it the parameters of the contract.
        """
        assert "chat" in connect().capabilities().features

    def test_connecting_opens_nothing(self, connect: Any, quiet: list[str]) -> None:
        """To connect is cheap: no connection, no look-up of a name, no program.

        If it fails: move what `connect` opens into the hooks that need it.
        """
        connect()
        assert quiet == []

    def test_address_is_the_same_for_equal_settings(self, connect: Any) -> None:
        """Connections to one server have one address, as text: they share its limits.

        If it fails: set `address` on the connection, from the settings alone.
        """
        provider = self.provider
        addresses = [connect(provider).address for _ in range(2)]
        assert addresses[0] == addresses[1]
        assert addresses[0] or not self._uses_http()

    def test_default_model_is_a_name(self, connect: Any) -> None:
        """If the connection has a `default_model`, that is the name of a model.

        If it fails: make it a string, or leave it out.
        """
        model = connect(model=None).model
        if model is None:
            not_offered("default_model")
        assert isinstance(model, str)
        assert model

    def test_clients_keep_their_own_settings(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Two clients with different settings do not affect each other.

        If it fails: keep settings in the connection, never in the plugin object or its module.
        """
        server.answer_chats(reply)
        names = ["one", "two"]
        clients = {each: connect(transport=Redirect(server.url), headers={"x-client": each}) for each in names}
        for each in (*names, *names):
            clients[each].chat(PROMPT, stream=True).close()
            assert server.requests[-1].headers["x-client"] == each

    def test_unusable_host_is_a_settings_error(self, connect: Any, server: StandIn) -> None:
        """A setting that cannot be used is refused as one, before anything is sent.

        If it fails: raise `SettingsError` in `connect`; `request.http` does it for addresses.
        """
        if "host" not in self.settings:
            not_offered("a setting `host`")
        with pytest.raises(SettingsError):
            connect(host="ftp://graftage.invalid", transport=Redirect(server.url)).chat("Hi")
        assert server.requests == []

    def test_settings_have_the_common_ones(self) -> None:
        """The class of the settings is a subclass of `Settings`, so users find the names they know.

        If it fails: derive the class that `settings_model` returns from `graftage.settings.Settings`.
        """
        assert issubclass(self._settings_model(), Settings)

    def test_answers_sends_nothing(self, quiet: list[str]) -> None:
        """`answers` returns a rank or None, and asks nobody.

        If it fails: look at the settings alone; the core asks `health` afterwards.
        """
        rank = self._rank(given=frozenset())
        assert rank is None or type(rank) is int
        assert quiet == []

    def test_remote_address_needs_consent(self) -> None:
        """Without the user's word, no prompt goes to another machine.

        If it fails: return None from `answers` for a remote address, unless `host` is in `request.given`.
        """
        if "host" not in self.settings:
            not_offered("a setting `host`")
        assert self._rank(given=frozenset(), host="https://graftage.invalid/v1") is None

    def _settings_model(self) -> type[Settings]:
        provider = self.provider
        kind: type[Settings] = provider.settings_model() if hasattr(provider, "settings_model") else Settings
        return kind

    def _rank(self, *, given: frozenset[str], **settings: Any) -> Any:
        provider = self.provider
        if not hasattr(provider, "answers"):
            not_offered("answers")
        settled = self._settings_model()(**{**self.settings, **settings})
        return provider.answers(AnswersRequest(name="suite", settings=settled, given=given))

    # --- What it declares ------------------------------------------------------------------------------------------

    def test_capabilities_are_known_without_a_server(self, connect: Any, quiet: list[str]) -> None:
        """`capabilities` needs no server, gives the same each time, and uses the contract's words.

        If it fails: return a constant. The features are listed in `graftage.types.Feature`.
        """
        provider = self.provider
        first, second = (connect(provider).capabilities() for _ in range(2))
        assert quiet == []
        assert first == second
        assert first.features <= {*get_args(Feature)}
        assert (first.parameters or frozenset()) <= PARAMETERS.keys()

    def test_declared_operations_have_hooks(self, connect: Any) -> None:
        """An operation that is declared is there.

        If it fails: implement the hook, or leave its name out of `features`: the core adds those that there are.
        """
        spy = Spy(self.provider)
        declared = connect(spy).capabilities().features & OPERATIONS
        assert declared <= spy.hooks

    def test_missing_operations_are_refused_unsent(self, connect: Any) -> None:
        """What is not declared is refused before anything is sent.

        If it fails: do not declare a feature in `capabilities` that the provider ignores.
        """
        probe, spy = Probe(), Spy(self.provider)
        llm = connect(spy, transport=probe)
        calls: dict[str, Callable[[], Any]] = {
            "generate": lambda: llm.generate("Hi"),
            "embed": lambda: llm.embed("Hi"),
            "rerank": lambda: llm.rerank("Hi", ["one"]),
            "count_tokens": lambda: llm.count_tokens("Hi"),
            "tools": lambda: llm.chat("Hi", tools=[TOOL]),
            "tool_choice": lambda: llm.chat("Hi", tools=[TOOL], tool_choice="required"),
            "structured_output": lambda: llm.chat("Hi", format="json"),
            "thinking": lambda: llm.chat("Hi", think=True),
            "images": lambda: llm.chat("Hi", images=[PICTURE]),
        }
        for feature in calls.keys() - llm.capabilities().features:
            with pytest.raises(CapabilityUnsupported):
                calls[feature]()
        assert (probe.requests, spy.calls("chat")) == ([], [])

    def test_undeclared_option_is_refused(self, connect: Any) -> None:
        """An option that is not declared is refused before anything is sent.

        If it fails: list in `Capabilities.options` exactly what the provider reads.
        """
        spy = Spy(self.provider)
        with pytest.raises(RequestRejected):
            connect(spy, transport=Probe()).chat("Hi", options={"no_such_option": 1})
        assert spy.calls("chat") == []

    def test_declared_options_reach_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Each option that is declared changes what is sent.

        If it fails: send `request.options`, or do not declare the option.
        """
        self._changes_what_is_sent(
            connect, server, reply, {name: {"options": {name: OPTIONS[name]}} for name in OPTIONS}
        )

    def test_declared_parameters_reach_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Each of `max_tokens`, `context_window` and `keep_alive` that is declared changes what is sent.

        If it fails: send the field of the request, or do not declare it in `Capabilities.parameters`.
        """
        calls = {name: {name: value} for name, value in PARAMETERS.items()}
        self._changes_what_is_sent(connect, server, reply, calls)

    def _changes_what_is_sent(self, connect: Any, server: StandIn, reply: Answer, calls: dict[str, Any]) -> None:
        llm = connect(transport=Redirect(server.url))
        server.answer_chats(reply)
        llm.chat(PROMPT, stream=True).close()
        able = llm.capabilities()
        for name in calls.keys() & (able.options | (able.parameters or frozenset())):
            llm.chat(PROMPT, stream=True, **calls[name]).close()
            assert server.chats[-1] != server.chats[0], name

    def test_ignored_parameter_is_a_warning(self, steady: Any) -> None:
        """Each of `max_tokens`, `context_window` and `keep_alive` that is not used leaves a warning on the reply.

        If it fails: list in `Capabilities.parameters` which of them the provider uses, even if none.
        """
        for name in PARAMETERS.keys() - (steady.capabilities().parameters or frozenset()):
            warnings = steady.chat(PROMPT, **{**self.short(steady), name: PARAMETERS[name]}).warnings
            assert any(f"`{name}`" in each for each in warnings), f"`{name}` is ignored without a word"

    # --- Replies ---------------------------------------------------------------------------------------------------

    def test_chat_gives_text(self, llm: Any) -> None:
        """A chat gives text, and the reason for its end.

        If it fails: yield a `Chunk` with `text` for each piece, and give the last one a `finish_reason`.
        """
        reply = llm.chat(PROMPT, **self.short(llm))
        assert reply.text
        assert reply.finish_reason

    def test_stream_gives_chunks(self, llm: Any) -> None:
        """A stream gives chunks, whose texts together are the text of its reply.

        If it fails: yield each piece as it comes, and nothing twice.
        """
        with llm.chat(PROMPT, stream=True, **self.short(llm)) as stream:
            chunks = list(stream)
        assert all(isinstance(each, Chunk) for each in chunks)
        assert "".join(each.text for each in chunks) == stream.reply.text
        assert stream.reply.finish_reason

    def test_only_the_last_chunk_has_a_reason(self, spy: tuple[Any, Spy]) -> None:
        """The chunk with a `finish_reason` is the last: none comes after it, and none before it has one.

        If it fails: hold the reason back until everything else was yielded, then return.
        """
        llm, seen = spy
        llm.chat(PROMPT, **self.short(llm))
        reasons = [each.finish_reason for each in seen.calls("chat")[0].items]
        assert [each is not None for each in reasons] == [False] * (len(reasons) - 1) + [True]

    def test_reply_equals_its_stream(self, steady: Any) -> None:
        """The same reply comes whole and as a stream.

        If it fails: use one way to read both. `request.call.whole` allows to merge chunks, no more.
        """
        whole = steady.chat(PROMPT, **self.short(steady))
        with steady.chat(PROMPT, stream=True, **self.short(steady)) as stream:
            texts = [each.text for each in stream]
        folded = stream.reply
        assert whole.text == folded.text == "".join(texts)
        assert (whole.finish_reason, whole.model) == (folded.finish_reason, folded.model)
        # The second prompt may come from the server's cache.
        first, second = (replace(each.usage, cached_tokens=None) for each in (whole, folded))
        assert first == second

    def test_unknown_usage_is_none(self, spy: tuple[Any, Spy]) -> None:
        """A count of tokens is what the server counted, or None: a text of no tokens cannot be.

        If it fails: leave out what the server did not say. Never write 0 for it, and never estimate.
        """
        llm, seen = spy
        llm.chat(PROMPT, **self.short(llm))
        usage = seen.calls("chat")[0].items[-1].usage or Usage()
        for count in (usage.input_tokens, usage.output_tokens):
            assert count is None or (type(count) is int and count > 0)

    def test_conversation_reaches_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Each message of a conversation is sent, in order.

        If it fails: send every one of `request.messages`, with its role.
        """
        llm = connect(transport=Redirect(server.url))
        server.answer_chats(reply)
        texts = {"first-word": "system", "second-word": "user", "third-word": "assistant", "fourth-word": "user"}
        llm.chat([{"role": role, "content": text} for text, role in texts.items()], stream=True).close()
        places = [server.chats[-1].find(each.encode()) for each in texts]
        assert -1 not in places
        assert places == sorted(places)

    def test_generate_follows_the_rules_of_chat(self, spy: tuple[Any, Spy]) -> None:
        """A completion gives text, and a reason in its last chunk only.

        If it fails: see the tests of `chat`; the same rules apply.
        """
        llm, seen = spy
        model = self.model_with(llm, "generate")
        reply = llm.generate(PROMPT, model=model, **self.short(llm))
        reasons = [each.finish_reason for each in seen.calls("generate")[0].items]
        assert reply.text
        assert [each is not None for each in reasons] == [False] * (len(reasons) - 1) + [True]

    def test_calls_run_at_the_same_time(self, steady: Any) -> None:
        """A call does not wait for another one that is open.

        If it fails: hold no lock while a reply is read, and share no connection between calls.
        """
        with steady.chat(PROMPT, stream=True, **self.short(steady)) as first:
            next(first)
            assert steady.chat(PROMPT, timeout=3 * PATIENCE, **self.short(steady)).text

    def test_streams_do_not_mix(self, steady: Any) -> None:
        """Two streams that are read in turns give their own chunks.

        If it fails: keep what belongs to a call in local names, not in the connection.
        """
        whole = steady.chat(PROMPT, **self.short(steady)).text
        with (
            steady.chat(PROMPT, stream=True, **self.short(steady)) as first,
            steady.chat(PROMPT, stream=True, **self.short(steady)) as second,
        ):
            for _ in zip(first, second, strict=False):
                pass
            for stream in first, second:
                list(stream)
        assert (first.reply.text, second.reply.text) == (whole, whole)

    def test_threads_get_equal_replies(self, both: Both, steady: Any) -> None:
        """Several threads, or tasks, use one client.

        If it fails: as for `test_streams_do_not_mix`; guard what calls share.
        """
        whole = steady.chat(PROMPT, **self.short(steady)).text
        replies = both.together([lambda: steady.chat(PROMPT, **self.short(steady))] * 4)
        assert [getattr(each, "text", each) for each in replies] == [whole] * 4

    # --- Features of a chat ----------------------------------------------------------------------------------------

    def test_tools_reach_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Tools are sent, and so are the model's calls and their results.

        If it fails: send `request.tools`, and `tool_calls` and `tool_call_id` of the messages.
        """
        llm = connect(transport=Redirect(server.url))
        model = self.model_with(llm, "tools")
        server.answer_chats(reply)
        call = {"id": "call_7", "name": TOOL["name"], "arguments": {"city": "Paris-sur-Mer"}}
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_7", "content": "sunny-spells"},
        ]
        llm.chat(messages, tools=[TOOL], model=model, stream=True).close()
        for text in (str(TOOL["description"]), "Paris-sur-Mer", "sunny-spells"):
            assert text.encode() in server.chats[-1]

    def test_tool_choice_reaches_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """A call that is required changes what is sent.

        If it fails: send `request.tool_choice`, or do not declare it.
        """
        llm = connect(transport=Redirect(server.url))
        model = self.model_with(llm, "tool_choice")
        server.answer_chats(reply)
        for choice in (None, "required"):
            llm.chat("Hi", tools=[TOOL], tool_choice=choice, model=model, stream=True).close()
        assert server.chats[-1] != server.chats[-2]

    def test_tool_calls_can_be_read(self, llm: Any) -> None:
        """A model with tools replies with text, or with calls that have a name, arguments and an id.

        If it fails: make each `ToolCall` with `graftage.http.read_tool_call`.
        """
        model = self.model_with(llm, "tools")
        reply = llm.chat("What is the weather in Paris?", tools=[TOOL], model=model, **self.short(llm))
        assert reply.text or reply.tool_calls
        for call in reply.tool_calls:
            assert call.name == TOOL["name"]
            assert isinstance(call.arguments, dict)
            assert call.id

    def test_format_gives_data(self, llm: Any) -> None:
        """A reply with a `format` is JSON that fits it.

        If it fails: send `request.format` to the server, which must enforce it.
        """
        model = self.model_with(llm, "structured_output")
        reply = llm.chat("The weather in a city, as JSON.", format=CITY, model=model, **self.short(llm))
        assert list(reply.parsed) == ["city"]

    def test_images_reach_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """An image is sent with its message.

        If it fails: send `data` of each of `message.images`, as the server wants it.
        """
        llm = connect(transport=Redirect(server.url))
        model = self.model_with(llm, "images")
        server.answer_chats(reply)
        llm.chat("What is this?", images=[Image(data=PICTURE)], model=model, stream=True).close()
        assert base64.b64encode(PICTURE) in server.chats[-1]

    def test_thinking_is_asked_for(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """`think` changes what is sent, and so does each of its values.

        If it fails: send `request.think`; None, True and False are three things.
        """
        llm = connect(transport=Redirect(server.url))
        model = self.model_with(llm, "thinking")
        server.answer_chats(reply)
        for think in (None, True, False):
            llm.chat(PROMPT, think=think, model=model, stream=True).close()
        assert len({*server.chats}) == len(server.chats)

    # --- Errors ----------------------------------------------------------------------------------------------------

    def test_unknown_model_is_not_found(self, llm: Any) -> None:
        """A model that the server does not have is a `ModelNotFound`.

        If it fails: map the server's words in the function `refusal` that you give to `request.http`.
        """
        with pytest.raises(ModelNotFound) as caught:
            llm.chat("Hi", model=NOBODY)
        assert caught.value.model == NOBODY

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, AuthenticationFailed),
            (404, ModelNotFound),
            (429, Overloaded),
            (500, InferenceFailed),
            (503, Overloaded),
        ],
    )
    def test_status_has_its_class(self, ask: Ask, server: StandIn, status: int, kind: type[ProviderError]) -> None:
        """Each status of a server becomes the error of that meaning.

        If it fails: let the toolkit's errors pass, or raise the class of `graftage.exceptions` that fits best.
        """
        server.answer_all(Answer((b'{"error": {"message": "No."}}',), status))
        with pytest.raises(kind) as caught:
            ask()
        assert caught.value.status == status

    def test_wait_of_a_busy_server_is_kept(self, ask: Ask, server: StandIn) -> None:
        """An `Overloaded` says how long the server wants to be left alone.

        If it fails: read the header `retry-after` into `retry_after`, in seconds.
        """
        server.answer_all(Answer((b'{"error": {"message": "No."}}',), 429, {"retry-after": "7"}))
        with pytest.raises(Overloaded) as caught:
            ask()
        assert caught.value.retry_after == 7

    @pytest.mark.parametrize("body", [b"<html><body>Welcome</body></html>", b'{"half": ', b"\xff\xfe", b"[1, 2]"])
    def test_other_answers_are_protocol_errors(self, ask: Ask, server: StandIn, body: bytes) -> None:
        """What is not the server's API is a `ProtocolError`: a web page, broken JSON, another shape.

        If it fails: read bodies inside `read=` of the toolkit, which makes that error of any other exception.
        """
        kind = "text/html" if body.startswith(b"<") else "application/json"
        server.answer_all(Answer((body,), headers={"content-type": kind}))
        with pytest.raises(ProviderError) as caught:
            ask()
        assert type(caught.value) in (ProtocolError, StreamInterrupted)

    @pytest.mark.parametrize("ending", ["cut", "end"])
    def test_cut_reply_is_interrupted(self, ask: Ask, server: StandIn, reply: Answer, ending: Any) -> None:
        """A reply that ends without its reason is a `StreamInterrupted`, which has the text so far.

        If it fails: never invent a `finish_reason`; just end, and the core raises.
        """
        server.answer_chats(reply.begun(ending))
        with pytest.raises((StreamInterrupted, ProtocolError)) as caught:
            ask(stream=True)
        assert isinstance(caught.value, StreamInterrupted) or not reply.is_stream

    def test_begun_reply_is_not_asked_for_again(self, ask: Ask, server: StandIn, reply: Answer) -> None:
        """After its first chunk a request is never sent again: its reader would get a part twice.

        If it fails: retry with `graftage.retry`, and only the opening.
        """
        if not reply.is_stream:
            not_applicable("replies come in one piece")
        server.answer_chats(reply.begun("cut"))
        with pytest.raises(StreamInterrupted) as caught:
            ask(stream=True, attempts=3)
        assert len(server.chats) == 1
        assert not caught.value.retryable

    def test_refusal_is_not_repeated(self, ask: Ask, server: StandIn) -> None:
        """What cannot succeed is sent once.

        If it fails: retry only errors that say `retryable`, as `graftage.retry` does.
        """
        server.answer_all(Answer((b'{"error": {"message": "No."}}',), 401))
        with pytest.raises(AuthenticationFailed):
            ask(attempts=3)
        targets = [each.target for each in server.requests]
        assert len(targets) == len({*targets})

    @pytest.mark.usefixtures("server")  # Only for providers that use HTTP.
    def test_dead_port_fails_within_a_second(self, connect: Any) -> None:
        """If nothing listens, that is a `ConnectionFailed`, after all attempts within a second.

        If it fails: retry a refused connection a few times at most, with short waits.
        """
        limits = Timeouts(connect=1, first_token=1, idle=1, total=1)  # Whatever is slower is a ProviderTimeout.
        with pytest.raises(ConnectionFailed):
            connect(transport=Redirect(dead_address()), timeouts=limits).chat("Hi")

    def test_errors_are_those_of_the_contract(self, ask: Ask, server: StandIn) -> None:
        """Whatever a server sends, the error has a class and comes from the provider, not from a bug in it.

        If it fails: the message names the place in the provider's code.
        """
        for body in (b"", b"{}", b"null", b"data: {}\n\n", b'{"message": 5, "choices": [], "error": null}'):
            server.answer_all(Answer((body,)))
            with pytest.raises(ProviderError) as caught:
                ask()
            assert type(caught.value) is not ProviderError

    # --- Time ------------------------------------------------------------------------------------------------------

    def test_silent_server_times_out(self, ask: Ask, server: StandIn) -> None:
        """A server that accepts a request and says nothing costs `timeouts.first_token`.

        If it fails: give `request.call` to the toolkit, or keep its `timeouts` yourself.
        """
        server.answer_all(Answer(ending="stall", silent=True))
        self._times_out("first_token", lambda: ask(attempts=1, timeouts=Timeouts(first_token=0.2)))

    def test_stalled_stream_times_out(self, ask: Ask, server: StandIn, reply: Answer) -> None:
        """A stream that stops in the middle costs `timeouts.idle`.

        If it fails: as for the silent server.
        """
        server.answer_chats(reply.begun("stall"))
        phase = "idle" if reply.is_stream else "first_token"
        self._times_out(phase, lambda: ask(stream=True, attempts=1, timeouts=Timeouts(first_token=0.5, idle=0.2)))

    def test_deadline_of_a_call_is_kept(self, ask: Ask, server: StandIn) -> None:
        """A call ends at `request.call.deadline`, whatever it waits for.

        If it fails: as for the silent server.
        """
        server.answer_all(Answer(ending="stall", silent=True))
        self._times_out("total", lambda: ask(attempts=1, timeouts=Timeouts(total=0.2)))

    def _times_out(self, phase: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ProviderTimeout) as caught:
            call()
        assert caught.value.phase == phase

    def test_closed_stream_is_seen_at_the_server(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """If its reader closes a stream, the server stops its work.

        If it fails: close the response in a `finally` of the hook; `aclosing` does it for an iterator.
        """
        if not reply.is_stream:
            not_applicable("replies come in one piece")
        llm = connect(transport=Redirect(server.url))
        server.answer_chats(reply.begun("stall"))
        with llm.chat(PROMPT, stream=True, **self.short(llm)) as stream:
            next(stream)
        assert server.left.wait(PATIENCE)

    def test_cancelled_call_is_seen_at_the_server(
        self, both: Both, connect: Any, server: StandIn, reply: Answer
    ) -> None:
        """If a task is cancelled, the server stops its work.

        If it fails: let `asyncio.CancelledError` pass, and close the response in a `finally`.
        """
        if both.mode == "sync":
            not_applicable("only a task can be cancelled")
        llm = connect(transport=Redirect(server.url))
        server.answer_chats(reply.begun("stall"))
        task = both.task(llm, "chat", PROMPT)
        assert server.stalled.wait(PATIENCE)
        task.cancel()
        assert server.left.wait(PATIENCE)

    def test_closed_client_ends_its_calls(self, both: Both, connect: Any, server: StandIn, reply: Answer) -> None:
        """To close a client ends the calls that still run.

        If it fails: let the core close the toolkit's clients, or close your own in the hook `close`.
        """
        llm = connect(transport=Redirect(server.url))
        server.answer_chats(reply.begun("stall"))
        call = both.start(llm.chat, PROMPT, timeout=2 * PATIENCE)
        assert server.stalled.wait(PATIENCE)
        llm.close()
        assert isinstance(call.exception(PATIENCE), GraftageError)
        assert server.left.wait(PATIENCE)

    def test_closing_twice_does_nothing(self, connect: Any) -> None:
        """A second `close` does nothing.

        If it fails: note that the connection is closed, and return at once.
        """
        spy = Spy(self.provider)
        llm = connect(spy, transport=Probe())
        if "close" not in spy.hooks:
            not_offered("close")
        llm.close()
        assert [each.error for each in spy.calls("close")] == [None, None]

    # --- Health ----------------------------------------------------------------------------------------------------

    def test_health_stops_at_its_level(self, spy: tuple[Any, Spy]) -> None:
        """The hook reports the levels up to the one that was asked for, and leaves the others unknown.

        If it fails: use `request.wants(level)` before each step, or build the result with `request.result`.
        """
        llm, seen = spy
        if "health" not in seen.hooks:
            not_offered("health")
        for place, level in enumerate(HEALTH_LEVELS):
            assert self._health(llm, level).reachable
            (health,) = seen.calls("health")[-1].items
            assert health.level == level
            beyond = HEALTH_LEVELS[max(place, 1) + 1 :]  # One answer shows both of the first two.
            assert {getattr(health, each) for each in beyond} <= {None}

    def test_health_sees_a_model_answer(self, llm: Any) -> None:
        """The highest level is ok if the model answers.

        If it fails: `health.error` says why.
        """
        health = self._health(llm, "answers")
        assert health.ok, health.error

    def test_health_misses_an_unknown_model(self, llm: Any) -> None:
        """A model that is not there is reported, not raised.

        If it fails: set `model_present` to False, and `error` to a `ModelNotFound`.
        """
        health = self._health(llm, "model_present", model=NOBODY)
        assert (health.ok, health.model_present) == (False, False)

    @pytest.mark.usefixtures("server")  # Only for providers that use HTTP.
    def test_health_reports_a_dead_server(self, connect: Any) -> None:
        """If nothing listens, each level says so; the hook itself does not raise.

        If it fails: catch `ProviderError` in the hook `health`, and return it in `Health.error`.
        """
        spy = Spy(self.provider)
        llm = connect(spy, transport=Redirect(dead_address()))
        for level in HEALTH_LEVELS:
            health = self._health(llm, level)
            assert not health.reachable
            assert isinstance(health.error, ConnectionFailed)
        assert [each.error for each in spy.calls("health")] == [None] * len(spy.calls("health"))

    def test_health_asks_once(self, connect: Any, server: StandIn) -> None:
        """A check sends each of its requests once: it must not add to the load of a busy server.

        If it fails: do not retry in `health`; `request.call` has one attempt.
        """
        server.answer_all(Answer((b"{}",), 503))
        assert not self._health(connect(transport=Redirect(server.url)), "model_present").ok
        targets = [each.target for each in server.requests]
        assert len(targets) == len({*targets})

    def test_health_lets_the_model_rest(self, connect: Any, server: StandIn, reply: Answer) -> None:
        """Only the level `answers` makes the model work.

        If it fails: chat only if `request.wants("answers")`.
        """
        server.answer_chats(reply)
        for level in HEALTH_LEVELS[:-1]:
            self._health(connect(transport=Redirect(server.url)), level)
        assert server.chats == []

    def _health(self, llm: Any, level: str, **more: Any) -> Any:
        with suppress(CapabilityUnsupported):
            return llm.health(level=level, **more)
        return not_offered("health")

    # --- Vectors, tokens, ranks ------------------------------------------------------------------------------------

    def test_vectors_follow_their_inputs(self, llm: Any) -> None:
        """Each input has one vector, in the order of the inputs.

        If it fails: sort by the server's index; `graftage.http.read_vectors` does.
        """
        model = self.model_with(llm, "embed")
        texts = ["The sky is blue", "A cat", "Count to ten"]
        together = llm.embed(texts, model=model).vectors
        assert len(together) == len(texts)
        for vector, text in zip(together, texts, strict=True):
            assert vector == pytest.approx(llm.embed(text, model=model).vectors[0], abs=0.02)

    def test_tokens_are_counted(self, llm: Any) -> None:
        """The count is what a chat with the same messages reports, and more text has more tokens.

        If it fails: ask the server, with the model's template; never estimate.
        """
        model = self.model_with(llm, "count_tokens")
        count = llm.count_tokens(PROMPT, model=model)
        assert count == (llm.chat(PROMPT, model=model, **self.short(llm)).usage.input_tokens or count)
        assert llm.count_tokens(PROMPT * 3, model=model) > count > 0

    def test_overlong_conversation_is_not_counted(self, llm: Any) -> None:
        """A conversation that does not fit into the window is a `ContextOverflow`, not the count of a part.

        If it fails: raise it if the server counts only what fits.
        """
        model = self.model_with(llm, "count_tokens")
        if "context_window" not in (llm.capabilities().parameters or ()):
            not_offered("context_window")
        with suppress(ContextOverflow):
            assert llm.count_tokens("many words " * 1500, model=model, context_window=1024) >= 3000

    def test_each_document_is_ranked_once(self, llm: Any) -> None:
        """A ranking has each document once, with a finite score.

        If it fails: return one `Ranked` for each of `request.documents`, with its index in the request.
        """
        model = self.model_with(llm, "rerank")
        documents = ["Cats purr.", "The sky is blue.", "The sky is grey today."]
        ranking = llm.rerank("What colour is the sky?", documents, model=model)
        assert sorted(each.index for each in ranking.results) == [0, 1, 2]
        assert all(math.isfinite(each.score) for each in ranking.results)

    # --- Models ----------------------------------------------------------------------------------------------------

    def test_models_are_listed(self, llm: Any) -> None:
        """The list has the model that chats, and no size of 0.

        If it fails: list what can be used without a download; leave out what is unknown.
        """
        self.model_with(llm, "list_models")
        models = llm.models()
        assert canonical_name(llm.model) in {canonical_name(each.name) for each in models}
        assert all(each.size is None or each.size > 0 for each in models)

    def test_model_is_described(self, llm: Any) -> None:
        """A model is described under its name; an unknown one is a `ModelNotFound`.

        If it fails: map the server's refusal to that class.
        """
        self.model_with(llm, "show_model")
        assert canonical_name(llm.show().name) == canonical_name(llm.model)
        with pytest.raises(ModelNotFound):
            llm.show(NOBODY)

    def test_model_is_loaded_and_unloaded(self, llm: Any) -> None:
        """A model is in memory after it was loaded, with its size if that is known, and not after it was unloaded.

        If it fails: return when it is done. To unload what is not loaded does nothing.
        """
        for feature in ("load_model", "unload_model", "loaded_models"):
            self.model_with(llm, feature)
        llm.load()
        loaded = {canonical_name(each.name): each for each in llm.loaded()}
        assert loaded[canonical_name(llm.model)].size != 0
        for _ in range(2):
            llm.unload()
        for _ in range(50):  # Some servers free it a moment later.
            if gone := canonical_name(llm.model) not in {canonical_name(each.name) for each in llm.loaded()}:
                break
            time.sleep(self.pause)
        assert gone

    def test_pull_ends_with_success(self, spy: tuple[Any, Spy]) -> None:
        """The last step of a download is `success`, and no other one is.

        If it fails: yield the server's steps, and `PullProgress(status="success")` only when the model can be used.
        """
        llm, seen = spy
        llm.pull(self.model_with(llm, "pull_model"))
        (pull,) = seen.calls("pull_model")
        assert [each.status == "success" for each in pull.items] == [False] * (len(pull.items) - 1) + [True]
        assert math.isinf(pull.request.call.deadline)

    def test_unknown_model_cannot_be_deleted(self, llm: Any) -> None:
        """To delete a model that is not there is a `ModelNotFound`, and deletes nothing else.

        If it fails: map the server's refusal to that class.
        """
        self.model_with(llm, "delete_model")
        before = llm.models()
        with pytest.raises(ModelNotFound):
            llm.delete(NOBODY)
        assert llm.models() == before

    # --- Adapters --------------------------------------------------------------------------------------------------

    def test_adapter_is_loaded_and_freed(self, llm: Any) -> None:
        """A loaded adapter has a slot, or a model whose name begins with `graftage-`. To unload it deletes nothing.

        If it fails: begin the name of a model that you create with `graftage-`: it then never becomes the default.
        """
        loaded = self._use_adapter(llm)
        assert loaded.slot is not None or loaded.model.startswith("graftage-")
        assert llm.chat(PROMPT, **self.short(llm)).adapter == loaded.name
        names = {each.name for each in llm.models()}
        llm.unload_adapter("any")
        assert {each.name for each in llm.models()} == names

    def test_weights_change_replies(self, spy: tuple[Any, Spy]) -> None:
        """With the feature `adapter_weights`, the same adapter acts otherwise with another weight.

        If it fails: apply each adapter of `request.adapter.weights` with its factor, which multiplies its own scale.
        """
        llm, seen = spy
        self.model_with(llm, "adapter_weights")
        loaded = self._use_adapter(llm)
        given = self.short(llm)
        if "logprobs" in llm.capabilities().options:
            given = {**given, "options": {**given.get("options", {}), "logprobs": True}}
        replies = [llm.chat(PROMPT, adapter=("any", weight), **given) for weight in (1, 0.25)]
        assert [each.adapter for each in replies] == [loaded.name, f"0.25 {loaded.name}"]
        assert [call.request.adapter.weights[0][1] for call in seen.calls("chat")] == [1, 0.25]
        whole, part = ((each.model, each.text, each.logprobs) for each in replies)
        assert whole != part

    def test_pruning_keeps_other_models(self, llm: Any) -> None:
        """`prune_adapters` shows what it would delete, and deletes only what the provider has made.

        If it fails: delete nothing with `dry_run`, and mark the models that you create.
        """
        self.model_with(llm, "prune_adapters")
        before = {each.name for each in llm.models()}
        self._use_adapter(llm)
        made = {each.name for each in llm.models()} - before
        shown = {each.name for each in llm.prune_adapters()}
        assert made <= shown
        assert {each.name for each in llm.models()} == before | made
        assert {each.name for each in llm.prune_adapters(dry_run=False)} == shown
        assert {each.name for each in llm.models()} == before - shown
        assert canonical_name(llm.model) not in {canonical_name(each) for each in shown}

    def _use_adapter(self, llm: Any) -> Any:
        self.model_with(llm, "load_adapter")
        if self.adapter is None:
            not_applicable("the class of the plugin's tests names no `adapter`")
        return llm.use_adapter("any")

    # --- The native client -----------------------------------------------------------------------------------------

    def test_native_client_has_the_colour_of_ours(self, connect: Any) -> None:
        """The server's own client is sync or async as ours is, and making it sends nothing.

        If it fails: look at the transport's `colour`, and build the client on `Http.httpx_transport()`.
        """
        probe = Probe()
        llm = connect(transport=probe)
        self.model_with(llm, "native")
        kinds = set()
        for mode in ("sync", "async"):
            both = Both(mode)
            kinds.add(type(both.opened(self.provider, **{**self.settings, "transport": probe}).native()))
            both.close()
        assert len(kinds) == 2
        assert probe.requests == []

    # --- Safety ----------------------------------------------------------------------------------------------------

    def test_nothing_goes_past_the_transport(self, connect: Any, quiet: list[str]) -> None:
        """With a cassette as its transport, a chat opens no connection, and uses the recording.

        If it fails: send everything through `request.http`, or through `Http.httpx_transport()` of an SDK.
        """
        if self.cassettes is None:
            not_applicable("there is no recording")
        cassette = Cassette(self._cassette(RECORDED_CHATS[0]))
        llm = connect(transport=cassette)
        assert llm.chat(PROMPT, **self.short(llm)).text
        assert (quiet, cassette.unplayed) == ([], ())

    def test_key_stays_out_of_errors_and_logs(
        self, connect: Any, server: StandIn, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A key is in no error, no log line and no `repr`, even if the server repeats it.

        If it fails: do not log headers or settings, and do not put them into messages.
        """
        lines: list[str] = []
        sink = logger.add(lines.append, level=0, format="{message}")
        caplog.set_level(logging.DEBUG)
        server.answer_all(Answer((f'{{"error": {{"message": "Bad key {KEY}"}}}}'.encode(),), 401))
        llm = connect(transport=Redirect(server.url), api_key=KEY)
        with pytest.raises(AuthenticationFailed) as caught:
            llm.chat("Hi")
        logger.remove(sink)
        error, printed = caught.value, capsys.readouterr()
        for text in (str(error), repr(error), str(error.to_dict()), caplog.text, printed.out, printed.err, *lines):
            assert KEY not in text

    @pytest.mark.usefixtures("server")  # Only for providers that use HTTP.
    def test_key_is_not_sent_in_clear(self, connect: Any) -> None:
        """A key goes to another machine only over https.

        If it fails: let the toolkit add `api_key`, and put no key into a URL or a body.
        """
        probe = Probe()
        with suppress(GraftageError):
            connect(transport=probe, api_key=KEY, host="http://192.0.2.1:8080").chat("Hi")
        for each in probe.requests:
            assert each.url.startswith("https://") or KEY not in f"{each.url} {each.headers} {each.body!r}"
