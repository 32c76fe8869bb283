"""The contract as tests: each claims one thing, and its documentation says what to do if it fails."""

from __future__ import annotations

from typing import Any

from graftage.testing.conformance.adoption import Adoption
from graftage.types import Chunk

__all__ = ["ProviderSuite"]


class ProviderSuite(Adoption):
    """What every provider must do."""

    def test_chat_gives_text(self, llm: Any) -> None:
        """A chat gives text, and the reason for its end.

        If it fails: yield a `Chunk` with `text` for each piece, and give the last one a `finish_reason`.
        """
        reply = llm.chat("Count from one to five.", **self.short(llm))
        assert reply.text
        assert reply.finish_reason

    def test_stream_gives_chunks(self, llm: Any) -> None:
        """A stream gives chunks; their texts are the text of its reply.

        If it fails: yield each piece as it comes, and nothing twice.
        """
        with llm.chat("Count from one to five.", stream=True, **self.short(llm)) as stream:
            chunks = list(stream)
        assert all(isinstance(each, Chunk) for each in chunks)
        assert "".join(each.text for each in chunks) == stream.reply.text
        assert [each.finish_reason for each in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason
