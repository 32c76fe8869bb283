"""Cassettes of a host's own, made by plain vcrpy, see the calls that are made through Graftage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import vcr  # type: ignore[import-untyped] # it has no types

from graftage.exceptions import GraftageError, ModelNotFound
from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "smollm2:135m"


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    with FakeOllama() as server:
        yield server


def asked(llm: Any) -> tuple[str, list[str], int, int]:
    """A chat, a stream, vectors and a list."""
    text = llm.chat("Hello").text
    with llm.chat("Tell me more", stream=True) as stream:
        pieces = [chunk.text for chunk in stream]
    return text, pieces, len(llm.embed(["one", "two"]).vectors), len(llm.models())


def test_plain_vcrpy_records_and_replays_calls(both: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with FakeOllama() as fake, vcr.use_cassette(str(path), match_on=["method", "uri", "body"]) as cassette:
        url = fake.url
        live = asked(both.connect("ollama", model=MODEL, host=url))
    assert len(cassette) == len(fake.requests) == 4
    with vcr.use_cassette(str(path), record_mode=vcr.mode.NONE, match_on=["method", "uri", "body"]) as cassette:
        assert asked(both.connect("ollama", model=MODEL, host=url)) == live
        assert cassette.all_played


def test_an_open_client_comes_into_a_cassette_and_out_of_it(both: Any, fake: FakeOllama, tmp_path: Path) -> None:
    llm = both.connect("ollama", model=MODEL, host=fake.url)
    before = llm.chat("Hello").text
    for _ in range(2):
        with vcr.use_cassette(str(tmp_path / "a.yaml"), match_on=["method", "uri", "body"]):
            assert llm.chat("Hello").text == before
    assert len(fake.requests) == 2
    assert llm.chat("Hello").text == before
    assert len(fake.requests) == 3


def test_a_request_that_is_not_on_the_cassette_reaches_no_server(both: Any, fake: FakeOllama, tmp_path: Path) -> None:
    llm = both.connect("ollama", model=MODEL, host=fake.url, attempts=1)
    with vcr.use_cassette(str(tmp_path / "a.yaml"), record_mode=vcr.mode.NONE), pytest.raises(GraftageError):
        llm.chat("Hello")
    assert fake.requests == []


def test_a_refusal_is_recorded_and_replayed(both: Any, fake: FakeOllama, tmp_path: Path) -> None:
    for _ in range(2):
        llm = both.connect("ollama", model="nosuch", host=fake.url)
        with vcr.use_cassette(str(tmp_path / "a.yaml")), pytest.raises(ModelNotFound):
            llm.show()
    assert len(fake.requests) == 2  # The refusal, and the list that close names come from.
