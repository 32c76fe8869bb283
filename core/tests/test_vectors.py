"""Embeddings: which inputs a client accepts, and which vectors."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from array import array
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from giving import Giving

from graftage.exceptions import (
    ConnectionFailed,
    InferenceFailed,
    ProtocolError,
    ProviderError,
    RequestRejected,
)
from graftage.hookspecs import hookimpl
from graftage.testing import Echo
from graftage.types import (
    Chunk,
    Embeddings,
    Health,
    Usage,
    Vectors,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "m:1"


class VectorsConnection:
    """A connection that returns the same vectors for every `embed`."""

    address = "nowhere"

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    @hookimpl
    def chat(self, request: Any) -> Any:
        return iter([Chunk(finish_reason="stop")])

    @hookimpl
    def embed(self, request: Any) -> Embeddings:
        return Embeddings(vectors=self.vectors, usage=Usage(input_tokens=7))

    @hookimpl
    def health(self, request: Any) -> Health:
        return Health(level=request.level, reachable=True, api=True)


WRONG_VECTORS: dict[str, tuple[Any, str]] = {
    "too few": (((1.0, 2.0),), "1 for 2"),
    "too many": (((1.0,), (2.0,), (3.0,)), "3 for 2"),
    "no vectors": ((), "0 for 2"),
    "one empty vector": (((1.0,), ()), "empty"),
    "all empty": (((), ()), "empty"),
    "two lengths": (((1.0, 2.0), (1.0,)), "from 1 to 2"),
    "not a number": (((1.0,), (math.nan,)), "finite"),
    "infinite": (((1.0,), (-math.inf,)), "finite"),
    "beyond any float": (((1.0,), (10**400,)), "finite"),
    "a bool": (((1.0,), (True,)), "finite"),
    "a text": (((1.0,), ("1.0",)), "finite"),
    "a null": (((1.0,), (None,)), "finite"),
    "texts for vectors": (("1", "2"), "finite"),
    "numbers for vectors": ((1.0, 2.0), "sequence"),
    "nulls for vectors": ((None, None), "sequence"),
    "null": (None, "sequence"),
}


def embedded(both: Any, vectors: Any) -> Vectors:
    """Return a provider's vectors as the client reads them."""
    result = both.connect(Giving(lambda _: VectorsConnection(vectors), "vectors"), model=MODEL).embed(["a", "b"])
    assert isinstance(result.vectors, Vectors)
    return result.vectors


RIGHT_VECTORS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: ((1, 0.5), (0, 2)),
    "lists": lambda: [[1, 0.5], [0, 2]],
    "arrays": lambda: [array("f", each) for each in ((1, 0.5), (0, 2))],
    "a generator": lambda: (iter(each) for each in ((1, 0.5), (0, 2))),
    "fractions": lambda: [[Fraction(1), Fraction(1, 2)], [0, 2.0]],
    "an array of NumPy": lambda: pytest.importorskip("numpy").array([[1, 0.5], [0, 2]], "float32"),
    "numbers of NumPy": lambda: [[pytest.importorskip("numpy").float64(1), 0.5], [0, 2]],
}


class Embedding:
    """A connection that returns a number of vectors, or raises an error."""

    def __init__(self, result: Any) -> None:
        self._result = result

    @hookimpl
    def chat(self, request: Any) -> Any: ...

    @hookimpl
    async def embed(self, request: Any) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return Embeddings(vectors=((1.0,),) * self._result)


class TestEmbeddings:
    def test_come_in_order(self, both: Any) -> None:
        echo = Echo()
        llm = both.connect(echo, model=MODEL)
        several = llm.embed(["a b", "c"], dimensions=3, truncate=False, options={"seed": 1})
        assert [len(each) for each in several.vectors] == [3, 3]
        assert several.vectors[1] == llm.embed("c", dimensions=3).vectors[0]
        assert (several.model, several.provider, several.usage.input_tokens) == (MODEL, "echo", 3)
        assert several.timings.wall >= 0
        first = echo.requests[0]
        assert (first.inputs, first.dimensions, first.truncate, first.options) == (("a b", "c"), 3, False, {"seed": 1})

    @pytest.mark.parametrize(("vectors", "complaint"), WRONG_VECTORS.values(), ids=WRONG_VECTORS)
    def test_wrong_vectors_are_protocol_errors(self, both: Any, vectors: Any, complaint: str) -> None:
        llm = both.connect(Giving(lambda _: VectorsConnection(vectors), "vectors"), model=MODEL)
        with pytest.raises(ProtocolError, match=complaint) as caught:
            llm.embed(["a", "b"])
        assert (caught.value.provider, caught.value.operation, caught.value.model) == ("vectors", "embed", MODEL)
        assert caught.value.hint
        assert (llm.stats().failures, llm.stats().running, llm.stats().input_tokens) == (1, 0, 0)

    @pytest.mark.parametrize("given", RIGHT_VECTORS.values(), ids=RIGHT_VECTORS)
    def test_numbers_become_floats(self, both: Any, given: Callable[[], Any]) -> None:
        found = embedded(both, given())
        assert found == ((1.0, 0.5), (0.0, 2.0))
        assert {type(number) for vector in found for number in vector} == {float}

    def test_sum_may_be_infinite(self, both: Any) -> None:
        assert embedded(both, [[1e308, 1e308], [-1e308, 0.0]]) == ((1e308, 1e308), (-1e308, 0.0))

    @pytest.mark.parametrize("inputs", [[], [1], ["a", None], b"ab", None, 5])
    def test_invalid_inputs_are_refused(self, both: Any, inputs: Any) -> None:
        echo = Echo()
        with pytest.raises(RequestRejected, match="inputs"):
            both.connect(echo, model=MODEL).embed(inputs)
        assert echo.requests == []

    @pytest.mark.parametrize(
        ("result", "inputs", "named"),
        [
            (RequestRejected("no"), ["a", ""], "number 2 of 2"),
            (InferenceFailed("no"), ["", "a", " \n", "b"], "number 1, 3 of 4"),
            (1, ["a", ""], "number 2 of 2"),
            (RequestRejected("no"), "", "number 1 of 1"),
            (RequestRejected("no"), [""] * 99, "number 1, 2, 3, 4, 5, 6, 7, 8, 9 of 99"),
            (RequestRejected("no"), ["a", "b"], None),
            (ConnectionFailed("no"), ["a", ""], None),
        ],
    )
    def test_errors_name_empty_inputs(self, both: Any, result: Any, inputs: Any, named: str | None) -> None:
        with pytest.raises(ProviderError) as caught:
            both.connect(Giving(lambda _: Embedding(result)), model=MODEL, attempts=1).embed(inputs)
        assert (f"Empty inputs: {named}." in str(caught.value)) == (named is not None)
        assert ("mpty" in str(caught.value)) == (named is not None)

    def test_empty_inputs_are_sent(self, both: Any) -> None:
        assert len(both.connect(Giving(lambda _: Embedding(2)), model=MODEL).embed(["a", ""]).vectors) == 2


class TestVectors:
    def test_behave_like_tuples(self, both: Any) -> None:
        found = embedded(both, [[0.1, 0.2], [3, 4]])
        assert (found[0][1], len(found), [list(each) for each in found]) == (0.2, 2, [[0.1, 0.2], [3.0, 4.0]])
        for again in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found)), Vectors(list(found))):
            assert type(again) is Vectors
            assert again == found
            assert hash(again) == hash(found)
        assert json.loads(json.dumps(found)) == [[0.1, 0.2], [3.0, 4.0]]
        assert repr(found) == "<Vectors 2 x 2>"

    @pytest.mark.parametrize(("vectors", "complaint"), list(WRONG_VECTORS.values())[3:], ids=list(WRONG_VECTORS)[3:])
    def test_invalid_values_are_refused(self, vectors: Any, complaint: str) -> None:
        with pytest.raises((TypeError, ValueError), match=complaint):
            Vectors(vectors)

    def test_become_one_numpy_array(self, both: Any) -> None:
        np = pytest.importorskip("numpy")
        found = embedded(both, [[0.5, 0.1, 2.0], [3, 4, 5]])
        single, double = found.numpy(), found.numpy("float64")
        assert (single.shape, single.dtype, double.dtype) == ((2, 3), np.float32, np.float64)
        assert double.tolist() == [[0.5, 0.1, 2.0], [3.0, 4.0, 5.0]]
        assert single[0, 1] == np.float32(0.1)
        single[0] = 0.0  # The array is a copy.
        assert found[0] == (0.5, 0.1, 2.0)
        assert Vectors().numpy().shape == (0, 0)

    def test_missing_numpy_is_an_import_error(self, both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)
        with pytest.raises(ImportError, match="pip install numpy") as caught:
            embedded(both, [[0.5], [1.0]]).numpy()
        assert caught.value.name == "numpy"
