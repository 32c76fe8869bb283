"""The prefixes for queries and documents that embedding models were trained with, from their model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

__all__ = ["Purpose", "prefix_for"]

Purpose: TypeAlias = Literal["query", "document"]


class Prefixes(NamedTuple):
    """The prefixes of one model."""

    query: str
    document: str = ""


NONE: Final = Prefixes("")
PASSAGES: Final = Prefixes("Represent this sentence for searching relevant passages: ")
CHINESE: Final = Prefixes("为这个句子生成表示以用于检索相关文章：")  # noqa: RUF001 - the colon is the card's
_TASK: Final = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

MODELS: Final[Mapping[str, Prefixes]] = {
    "all-minilm": NONE,  # sentence-transformers/all-MiniLM-L6-v2
    "bge-base": PASSAGES,  # BAAI/bge-base-en-v1.5, as its sisters
    "bge-base-zh": CHINESE,  # BAAI/bge-base-zh-v1.5, as its sisters
    "bge-large": PASSAGES,
    "bge-large-zh": CHINESE,
    "bge-m3": NONE,  # BAAI/bge-m3: "no longer requires adding instructions to the queries"
    "bge-small": PASSAGES,
    "bge-small-zh": CHINESE,
    "e5-base": Prefixes("query: ", "passage: "),  # intfloat/e5-base-v2, as its sisters
    "e5-large": Prefixes("query: ", "passage: "),
    "e5-mistral-7b-instruct": Prefixes(f"{_TASK} "),  # intfloat/e5-mistral-7b-instruct
    "e5-small": Prefixes("query: ", "passage: "),
    "embeddinggemma": Prefixes("task: search result | query: ", "title: none | text: "),  # google/embeddinggemma-300m
    "multilingual-e5": Prefixes("query: ", "passage: "),  # intfloat/multilingual-e5-large, as its sisters
    "multilingual-e5-large-instruct": Prefixes(f"{_TASK} "),  # intfloat/multilingual-e5-large-instruct
    "mxbai-embed-large": PASSAGES,  # mixedbread-ai/mxbai-embed-large-v1
    "nomic-embed-text": Prefixes("search_query: ", "search_document: "),  # nomic-ai/nomic-embed-text-v1.5, -v2-moe
    "qwen3-embedding": Prefixes(_TASK),  # Qwen/Qwen3-Embedding-0.6B: no space after the last colon
    "snowflake-arctic-embed": PASSAGES,  # Snowflake/snowflake-arctic-embed-l, m-v1.5, s, xs
    "snowflake-arctic-embed-l-v2.0": Prefixes("query: "),  # Snowflake/snowflake-arctic-embed-l-v2.0
    "snowflake-arctic-embed-m-v2.0": Prefixes("query: "),
    "snowflake-arctic-embed2": Prefixes("query: "),  # the same two, as Ollama names them
}
"""By the beginning of a model's name, without owner and tag; the longest match counts."""


def prefix_for(model: str, purpose: Purpose) -> str | None:
    """Return the prefix for each input; None if the model is unknown.

    Owners, registries, tags and file endings are ignored: `hf.co/nomic-ai/nomic-embed-text-v1.5-GGUF:Q4_K_M` is a
    `nomic-embed-text`.
    """
    name = model.strip().lower().replace("\\", "/").rpartition("/")[2].replace("_", "-")
    found = [each for each in MODELS if name.startswith(each) and not name[len(each) : len(each) + 1].isalnum()]
    return getattr(MODELS[max(found, key=len)], purpose) if found else None
