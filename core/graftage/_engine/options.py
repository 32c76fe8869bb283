"""Read the options of a call: those that Graftage checks by type and range, and those that only the server knows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from graftage._engine.inputs import as_mapping, copy_json, copy_json_object, rejected, suggest
from graftage._values import LARGEST_COUNT
from graftage.exceptions import RequestRejected

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["SERVER", "read_options", "word_for"]

SERVER = "server"
"""The option with a mapping of options that only the server knows, if the provider passes them on."""
HUGE = 1000
"""Larger factors and penalties make no sense, and become infinite in engines with 32-bit floats."""
NUMBERS: Mapping[str, tuple[float, float]] = {
    "frequency_penalty": (-HUGE, HUGE),
    "min_p": (0, 1),
    "mirostat_eta": (0, HUGE),
    "mirostat_tau": (0, HUGE),
    "presence_penalty": (-HUGE, HUGE),
    "repeat_penalty": (0, HUGE),
    "temperature": (0, HUGE),
    "top_p": (0, 1),
    "typical_p": (0, 1),
}
"""The range of each option that is a number."""
WHOLE: Mapping[str, tuple[int, int]] = {
    "main_gpu": (0, LARGEST_COUNT),
    "mirostat": (0, 2),
    "num_batch": (1, LARGEST_COUNT),
    "num_gpu": (-1, LARGEST_COUNT),
    "num_keep": (-1, LARGEST_COUNT),
    "num_thread": (0, LARGEST_COUNT),
    "repeat_last_n": (-1, LARGEST_COUNT),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, LARGEST_COUNT),
    "top_logprobs": (0, LARGEST_COUNT),
}
"""The range of each option that is an integer. If a server accepts it, -1 means its own choice."""
SWITCHES = frozenset({"logprobs", "penalize_newline", "shift", "truncate", "use_mmap"})
PARAMETERS: Mapping[str, str] = {
    "adapter": "adapters lora lora_adapters",
    "context_window": "num_ctx n_ctx ctx_size context_length context_size max_context_length max_model_len max_seq_len",
    "format": "response_format json_schema",
    "images": "",
    "keep_alive": "ttl",
    "max_tokens": "num_predict n_predict max_new_tokens max_output_tokens max_completion_tokens",
    "messages": "",
    "model": "",
    "prompt": "",
    "raw": "",
    "stream": "stream_options",
    "suffix": "",
    "system": "system_prompt",
    "think": "thinking reasoning reasoning_effort enable_thinking",
    "tools": "functions",
}
"""The parameters of a call, with their names elsewhere. They must not be options, which would bypass the limits."""
SYNONYMS: Mapping[str, str] = {
    "main_gpu": "",
    "num_batch": "n_batch n_ubatch batch_size",
    "num_gpu": "n_gpu_layers gpu_layers num_gpu_layers",
    "num_keep": "n_keep",
    "num_thread": "n_thread n_threads num_threads threads",
    "repeat_penalty": "repetition_penalty",
    "seed": "random_seed",
    "stop": "stop_sequences",
    "temperature": "temp",
    "use_mmap": "mmap",
}
"""Some options, with their names elsewhere."""
NESTED = frozenset({"context_window", "keep_alive", "main_gpu", "max_tokens", "num_batch", "num_gpu", "num_thread"})
"""Names that decide about memory and time. They are refused at any depth of `server`."""


def _key(name: str) -> str:
    """Return a name in the form that two spellings are compared in: `num_ctx`, `numCtx` and `NUM-CTX` are equal."""
    return "".join(each for each in name.casefold() if each.isalnum())


@functools.cache
def _names_by_key() -> Mapping[str, str]:
    """Map every known name, as a key, to the name that Graftage uses."""
    words = {**dict.fromkeys([*NUMBERS, *WHOLE, *SWITCHES], ""), **SYNONYMS, **PARAMETERS}
    return {_key(name): word for word, names in words.items() for name in (word, *names.split())}


def word_for(name: str) -> str | None:
    """Return the name that Graftage uses for a parameter or an option; None if it is unknown."""
    return _names_by_key().get(_key(name))


def read_options(options: Mapping[str, Any] | BaseModel | None, known: frozenset[str]) -> dict[str, Any]:
    """Check and return the options of a call, with those under `server` next to the others.

    Args:
        options: the options.
        known: the names that the provider knows.

    Raises:
        RequestRejected: a name is unknown or is a parameter of the call; a value has a wrong type, is out of range, or
            is not JSON.
    """
    given = as_mapping(options)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise rejected("`options`", "a mapping", given)
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise _unknown(str(name)[:80], known)
        if value is not None:
            read |= _read_server_options(value, known) if name == SERVER else {name: _check_option(name, value)}
    return read


def _unknown(name: str, known: frozenset[str]) -> RequestRejected:
    if name == SERVER:
        return RequestRejected(
            "This provider does not pass on options to its server.", hint=f"Known options: {', '.join(sorted(known))}."
        )
    word = word_for(name)
    if word in PARAMETERS:
        return RequestRejected(f"`{name}` is not an option.", hint=f"Use the parameter `{word}`.")
    hint = f"Did you mean `{word}`?" if word in known else suggest(name, known - {SERVER})
    more = f" An option that only the server knows goes into `{SERVER}`, a mapping." if SERVER in known else ""
    return RequestRejected(f"The option `{name}` is unknown.", hint=hint + more)


def _check_option(name: str, value: object) -> Any:
    """Check and return the value of a known option. An option that only the provider knows may be any JSON."""
    value = copy_json(value, f"the option `{name}`")
    if name in SWITCHES:
        valid, wanted = isinstance(value, bool), "True or False"
    elif name == "stop":
        value = [value] if isinstance(value, str) else value
        valid = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
        wanted = "a string that is not empty, or a list of them"
    elif name in NUMBERS or name in WHOLE:
        least, most = NUMBERS.get(name) or WHOLE[name]
        kind = (int, float) if name in NUMBERS else int
        valid = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
        wanted = f"a {'' if name in NUMBERS else 'whole '}number from {least} to {most}"
    else:
        return value
    if not valid:
        raise RequestRejected(f"The option `{name}` is invalid.", hint=f"Give {wanted}.")
    return value


def _read_server_options(value: object, known: frozenset[str]) -> dict[str, Any]:
    """Return the options for the server. A name that Graftage knows would bypass its checks and limits."""
    given = copy_json_object(value, f"the option `{SERVER}`", "a mapping of options")
    for deep, name in _walk_names(given):
        if hint := _bypass_hint(name, known, deep=deep):
            raise RequestRejected(f"`{name}` cannot be given in `{SERVER}`.", hint=hint)
    return {name: _check_option(word_for(name) or name, each) for name, each in given.items() if each is not None}


def _bypass_hint(name: str, known: frozenset[str], *, deep: bool) -> str | None:
    """Return what to use instead of a name that would bypass something; None if it would not."""
    word = word_for(name) or next((each for each in known if _key(each) == _key(name)), None)
    if deep and word not in NESTED:
        return None
    if word in PARAMETERS:
        return f"Use the parameter `{word}`."
    if word in known:
        return f"Use the option `{word}`."
    if word in NESTED:
        return "It controls how a model is loaded. This provider has no option for it: look at its settings."
    return "Call again for another reply: each call returns one." if _key(name) == "n" else None


def _walk_names(value: object, *, deep: bool = False) -> Iterator[tuple[bool, str]]:
    """Yield all names in JSON data, each with whether it is below the top level."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    yield from ((deep, name) for name in (value if isinstance(value, dict) else ()))
    for each in inside:
        yield from _walk_names(each, deep=True)
