"""Which recorded request is found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import vcr.matchers  # type: ignore[import-untyped] # it has no types
from recording import ELSEWHERE, exchange

from graftage.testing import Cassette, CassetteMiss
from graftage.testing.files import CassetteFile
from graftage.testing.interactions import HeaderDict, Interaction, RecordedRequest, address_of
from graftage.testing.matching import Matching, blur
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from pathlib import Path

UUIDS = ("8a6e0804-2bd0-4672-b79d-d97027f9071a", "8A6E0804-2BD0-4672-B79D-D97027F9071B")


def asked(body: Any = None, uri: str = "http://localhost/api/chat", **headers: str) -> RecordedRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return RecordedRequest(method="POST", uri=address_of(uri), headers=HeaderDict(headers), body=data)


def difference(recorded: RecordedRequest, now: RecordedRequest) -> list[str]:
    return list(Matching().differences(recorded, now))


class TestBodies:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (b"", {}),
            (b"", None),
            (b"", ""),
            ({"a": 1, "b": None}, {"a": 1}),
            ({"a": 1, "options": {"x": None}, "system": ""}, {"a": 1}),
            ({"n": 1.0}, {"n": 1}),
            ({"stream": True}, {}),
            ({"request_id": "a", "a": 1}, {"request_id": "b", "a": 1}),
            ({"created_at": "2026-01-01T00:00:00Z"}, {}),
            ({"x": UUIDS[0], "y": [UUIDS[0]]}, {"x": UUIDS[1], "y": [UUIDS[1]]}),
            ({"tool_use_id": "a"}, {"tool_use_id": "b"}),
        ],
        ids=str,
    )
    def test_say_the_same(self, one: Any, other: Any) -> None:
        assert difference(asked(one), asked(other)) == []

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"a": 0}, {}),
            ({"a": False}, {}),
            ({"a": []}, {}),
            ({"a": 1}, {"a": True}),
            ({"stream": False}, {}),
            ({"x": UUIDS[0], "y": UUIDS[0]}, {"x": UUIDS[0], "y": UUIDS[1]}),
            ({"prompt": f"See {UUIDS[0]}"}, {"prompt": f"See {UUIDS[1]}"}),
            ({"prompt": "Today is 2026-01-01"}, {"prompt": "Today is 2026-01-02"}),
            ({"messages": [{}]}, {"messages": [{}, {}]}),
        ],
        ids=str,
    )
    def test_say_something_else(self, one: Any, other: Any) -> None:
        assert len(difference(asked(one), asked(other))) == 1

    def test_unsaid_stream_is_false_outside_ollama(self) -> None:
        bodies = [asked(each, "https://api.test/v1/chat") for each in ({"stream": False}, {}, {"stream": True})]
        assert difference(bodies[0], bodies[1]) == []
        assert difference(bodies[1], bodies[2]) == ["`stream` (recorded nothing, now true)"]

    def test_own_normaliser_comes_first(self) -> None:
        matching = Matching(normalise=blur)
        texts = "Today is 2026-01-01, see " + UUIDS[0], "Today is 2026-11-28T10:00:00Z, see " + UUIDS[1]
        one, other = (asked({"messages": [{"content": each}]}) for each in texts)
        assert matching.key(one) == matching.key(other)
        assert matching.key(one) != matching.key(asked({"messages": [{"content": "Today"}]}))

    def test_long_texts_show_where_they_differ(self) -> None:
        (words,) = difference(asked({"p": "x" * 300 + " red"}), asked({"p": "x" * 300 + " blue"}))
        assert "red" in words
        assert "blue" in words
        assert len(words) < 200


class TestAddresses:
    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "user:word@localhost"])
    def test_names_of_the_loopback_are_one(self, host: str) -> None:
        assert difference(asked(uri="http://localhost:1/a"), asked(uri=f"http://{host}:2/a#b")) == []

    def test_hosts_differ(self) -> None:
        differences = difference(asked(uri="http://a.test/x"), asked(uri="http://b.test/x"))
        assert differences == ["the host (recorded a.test, now b.test)"]

    def test_query_counts_in_any_order(self) -> None:
        one, same, other = (asked(uri=f"http://a/x{each}") for each in ("?a=1&b=", "?b=&a=1", "?a=1"))
        assert difference(one, same) == []
        assert difference(one, other) == ["the query (recorded a=1, b=, now a=1)"]

    def test_two_servers_never_swap_answers(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        with FakeOllama() as one, FakeOllama() as two, Cassette(path, mode="once") as cassette:
            urls = [one.url, two.url]
            for n, server in enumerate((one, two)):
                server.script("/api/chat", Answer([{"n": n}]))
                exchange("sync", cassette, f"{server.url}/api/chat")
        cassette = Cassette(path)
        for n in (1, 0):
            assert exchange("sync", cassette, f"{urls[n]}/api/chat")[1] == [b'{"n":%d}\n' % n]
        with pytest.raises(CassetteMiss, match=r"the host \(recorded localhost:\d+, now localhost:1\)"):
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat")

    def test_true_origin_is_kept(self, tmp_path: Path, fake: FakeOllama) -> None:
        with Cassette(tmp_path / "a.yaml", mode="once") as cassette:
            exchange("sync", cassette, f"{fake.url}/a?b=1#c")
        assert [each.request.uri for each in cassette.interactions] == [f"{fake.url}/a?b=1"]


NAMES = {
    "method": RecordedRequest(method="GET", uri="http://a/x"),
    "scheme": RecordedRequest(method="POST", uri="https://a:80/x"),
    "port": RecordedRequest(method="POST", uri="http://a:81/x"),
    "host": RecordedRequest(method="POST", uri="http://b/x"),
    "path": RecordedRequest(method="POST", uri="http://a/y"),
    "query": RecordedRequest(method="POST", uri="http://a/x?y"),
    "uri": RecordedRequest(method="POST", uri="http://a/x?"),
    "headers": RecordedRequest(method="POST", uri="http://a/x", headers=HeaderDict({"X-A": "1"})),
    "body": RecordedRequest(method="POST", uri="http://a/x", body=b'{"a":1}'),
    "raw_body": RecordedRequest(method="POST", uri="http://a/x", body=b" "),
}


class TestMatchOn:
    @pytest.mark.parametrize("name", NAMES)
    def test_name_of_vcrpy(self, name: str) -> None:
        base = RecordedRequest(method="POST", uri="http://a/x")
        matching = Matching([name], headers=["x-a"])
        assert matching.key(base) != matching.key(NAMES[name])
        others = [each for each in ("method", "host", "path") if each != name]
        assert Matching(others).key(base) == Matching(others).key(NAMES[name])

    @pytest.mark.parametrize("name", ["method", "scheme", "host", "port", "path", "query", "uri", "body", "headers"])
    def test_functions_of_vcrpy_work(self, name: str) -> None:
        base = RecordedRequest(method="POST", uri="http://a/x")
        matching = Matching([getattr(vcr.matchers, name)])
        assert matching.agree(base, base)
        assert not matching.agree(NAMES[name], base) or name == "uri"

    @pytest.mark.parametrize("mode", [["nowhere"], [1], "body"])
    def test_unknown_matcher_is_refused(self, tmp_path: Path, mode: Any) -> None:
        with pytest.raises(ValueError, match="`match_on` must hold"):
            Cassette(tmp_path / "a.yaml", mode="all", match_on=mode)

    def test_own_function_chooses(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        fake.script("/api/chat", Answer([{"n": 0}]), Answer([{"n": 1}]))
        with Cassette(path, mode="once") as cassette:
            for word in ("Hello", "Goodbye"):
                exchange("sync", cassette, f"{fake.url}/api/chat", body={"prompt": word})

        def initial(asked: RecordedRequest, recorded: RecordedRequest) -> bool | None:
            assert asked.body[:12] == recorded.body[:12], "other initial"
            return None

        cassette = Cassette(path, match_on=["method", initial])
        assert exchange("sync", cassette, f"{ELSEWHERE}/x", body={"prompt": "Good"})[1] == [b'{"n":1}\n']
        with pytest.raises(CassetteMiss, match=r"`initial` \(other initial"):
            exchange("sync", cassette, f"{ELSEWHERE}/x", body={"prompt": "Tschüss"})
        assert cassette.unplayed == ("POST /api/chat",)


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
IMAGE = "iVBORw0KGgo="
OLLAMA: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look", "images": [IMAGE]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]},
        {"role": "tool", "content": "11 degrees", "tool_name": "f"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "Old words", "parameters": CITY}}],
    "options": {"temperature": 0, "num_predict": 20, "stop": ["#"]},
    "format": CITY,
    "keep_alive": 300,
    "stream": False,
}
OPENAI: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"city":"Rome"}'}}],
        },
        {"role": "tool", "content": "11 degrees", "tool_call_id": "x"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "New words", "parameters": CITY}}],
    "temperature": 0.0,
    "max_completion_tokens": 20,
    "stop": "#",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": CITY}},
}
OURS: dict[str, Any] = {
    "model": "m",
    "messages": OLLAMA["messages"],
    "tools": [{"name": "f", "description": "", "parameters": CITY}],
    "options": {"temperature": 0, "stop": ["#"]},
    "max_tokens": 20,
    "format": CITY,
}


def in_chat(body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    return Matching(["chat"]).key(asked(body, f"http://a{path}"))


class TestChat:
    def test_three_forms_are_equal(self) -> None:
        openai = in_chat(OPENAI)
        assert in_chat({**OPENAI, "stream": False}) == openai
        assert in_chat({each: value for each, value in OLLAMA.items() if each != "stream"}) == openai
        assert in_chat(OURS) == openai

    @pytest.mark.parametrize(
        "other",
        [
            {"model": "n"},
            {"messages": OPENAI["messages"][1:]},
            {"messages": [{"role": "user", "content": "Look"}]},
            {"messages": [*OPENAI["messages"][:1], {"role": "user", "content": "Look"}, *OPENAI["messages"][2:]]},
            {"tools": [{"type": "function", "function": {"name": "g", "parameters": CITY}}]},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            {"temperature": 1},
            {"max_completion_tokens": 21},
            {"seed": 1},
            {"response_format": {"type": "json_object"}},
            {"stream": True},
        ],
        ids=str,
    )
    def test_other_meaning_differs(self, other: dict[str, Any]) -> None:
        assert in_chat({**OPENAI, **other}) != in_chat(OPENAI)

    def test_order_of_tools_is_free(self) -> None:
        tools = [{"type": "function", "function": {"name": each, "parameters": CITY}} for each in "ab"]
        assert in_chat({**OPENAI, "tools": tools}) == in_chat({**OPENAI, "tools": tools[::-1]})

    @pytest.mark.parametrize("odd", [{"messages": 1}, {"messages": [1]}, [1], {"prompt": "x"}], ids=str)
    def test_other_bodies_compare_as_they_are(self, odd: Any) -> None:
        assert in_chat(odd) == (json.dumps(odd, separators=(",", ":")),)

    @pytest.mark.parametrize("odd", [1, "x", [1], {"a": 1}, {"function": 1}, {"function": {"arguments": "{"}}], ids=str)
    def test_odd_parts_are_kept_apart(self, odd: Any) -> None:
        bodies = [
            {"messages": [{"role": "user", "content": [odd], "tool_calls": [odd]}], "tools": [odd]},
            {"messages": [{"role": "user", "content": ["y"], "tool_calls": [odd]}], "tools": [odd]},
        ]
        assert in_chat(bodies[0]) != in_chat(bodies[1])

    def test_cassette_finds_a_chat_by_meaning(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        fake.script("/api/chat", Answer([{"n": 0}]))
        with Cassette(path, mode="once") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/chat", body=OLLAMA)
        cassette = Cassette(path, match_on=["chat"])
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={**OLLAMA, "keep_alive": 1})[0] == 200


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300 requests, of which two are always equal."""
    path = tmp_path_factory.mktemp("large") / "a.yaml"
    path.write_bytes(
        CassetteFile().with_more(
            Interaction(
                request=asked({"prompt": f"Tale number{n // 2:04d} of Österreich"}), status=200, chunks=(b"%d" % n,)
            )
            for n in range(300)
        )
    )
    return path


class TestLargeFiles:
    @pytest.mark.parametrize(
        "order",
        [range(300), range(299, -1, -1), [*range(1, 300, 2), *range(0, 300, 2)]],
        ids=["kept", "turned", "mixed"],
    )
    def test_play_in_any_order(self, large: Path, order: Any) -> None:
        cassette = Cassette(large)
        given: dict[int, list[bytes]] = {}
        for n in order:
            body = {"prompt": f"Tale number{n // 2:04d} of Österreich"}
            given.setdefault(n // 2, []).extend(exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=body)[1])
        assert given == {n: [b"%d" % (2 * n), b"%d" % (2 * n + 1)] for n in range(150)}
        assert (cassette.unplayed, len(cassette)) == ((), 300)

    def test_own_normaliser_sees_every_body(self, large: Path) -> None:
        cassette = Cassette(large, normalise=lambda body: {"prompt": body["prompt"][:11]})
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"prompt": "Tale number of none"})[0] == 200
        cassette = Cassette(large, normalise=lambda _: {"prompt": "the same"})
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"prompt": "another"})[0] == 200

    def test_generated_ids_are_not_searched(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_bytes(CassetteFile().with_more([Interaction(request=asked({"tool_use_id": "a"}), status=200)]))
        cassette = Cassette(path)
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"tool_use_id": "b"})[0] == 200

    def test_first_of_equal_ones_comes_first(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        bodies = [{"prompt": "alpha"}, {"prompt": "alpha", "created": "omega"}, {"prompt": "alpha omega"}]
        path.write_bytes(
            CassetteFile().with_more(
                Interaction(request=asked(each), status=200, chunks=(b"%d" % n,)) for n, each in enumerate(bodies)
            )
        )
        cassette = Cassette(path)
        # To find the last, the first is passed over unread, but not the second, which has both words.
        assert [
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body=each)[1]
            for each in (bodies[2], bodies[0], bodies[0])
        ] == [[b"2"], [b"0"], [b"1"]]

    def test_parse_only_what_is_played(self, large: Path) -> None:
        file = CassetteFile.read(large)
        assert len(file) == 300
        assert file._parsed == {}
        cassette = Cassette(large)
        exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"prompt": "Tale number0149 of Österreich"})
        assert [*cassette._file._parsed] == [298]
        assert len(cassette.unplayed) == 299
        with pytest.raises(CassetteMiss, match=r"`prompt` \(recorded"):
            exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"prompt": "Something else"})
