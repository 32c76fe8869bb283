"""Every error Graftage raises.

    GraftageError
    ├── SettingsError               a setting is unknown or wrong, and where it came from
    ├── PluginError
    │   ├── ProviderNotFound        no provider of that name is installed
    │   ├── PluginConflict          two distributions claim one name
    │   └── PluginLoadError         import, signature or version is wrong; cause attached
    ├── ProviderError               .provider .model .operation .status .retryable .attempts .suggestions .partial
    │   │                           .details
    │   ├── ConnectionFailed        nothing answered at that address
    │   ├── ProviderTimeout         .phase: connect, first_token, idle, total
    │   ├── AuthenticationFailed
    │   ├── ModelNotFound           close names in .suggestions
    │   ├── ModelLoadFailed         .reason: memory, incompatible, crashed, timeout
    │   ├── RequestRejected         the request is invalid; refused by the server, or by Graftage before sending
    │   ├── CapabilityUnsupported   the provider or model cannot do it; refused before sending if known
    │   ├── ContextOverflow         the prompt does not fit, or was cut
    │   ├── Overloaded              queue full or rate limited; .retry_after
    │   ├── QuotaExceeded           a plan's limit is used up, or the plan lacks the model; .retry_after
    │   ├── InferenceFailed         the model or its runner failed, or its output cannot be read
    │   ├── StreamInterrupted       the stream ended too early; .partial
    │   └── ProtocolError           the response is not what the API promises
    ├── AdapterError                .reference .reasons .retryable
    │   ├── AdapterNotFound         no resolver knows the reference
    │   ├── AdapterInvalid          malformed, unsafe or unsupported file
    │   ├── AdapterIncompatible     the adapter does not fit the base model
    │   └── AdapterUnsupported      this provider or server version cannot load it
    └── ResourceLimitExceeded       .limit .value .plugin .reason

Creating an error writes no log line and keeps no reference to the mappings passed to it.
All errors can be pickled and copied. Their text never holds a prompt or a reply; `GraftageError.partial` does.
Misuse of an object, such as a client after `close`, is a `RuntimeError` and not in this tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from graftage.types import Reply

__all__ = [
    "AdapterError",
    "AdapterIncompatible",
    "AdapterInvalid",
    "AdapterNotFound",
    "AdapterUnsupported",
    "AuthenticationFailed",
    "CapabilityUnsupported",
    "ConnectionFailed",
    "ContextOverflow",
    "GraftageError",
    "InferenceFailed",
    "ModelLoadFailed",
    "ModelNotFound",
    "Overloaded",
    "PluginConflict",
    "PluginError",
    "PluginLoadError",
    "ProtocolError",
    "ProviderError",
    "ProviderNotFound",
    "ProviderTimeout",
    "QuotaExceeded",
    "RequestRejected",
    "ResourceLimitExceeded",
    "SettingsError",
    "StreamInterrupted",
]


class GraftageError(Exception):
    """The base class of every error here. A chain does not fall back unless a class says so."""

    default_falls_back: ClassVar[bool] = False
    partial: Reply | None = None
    """What was received before the failure: text, thinking and tool calls."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        """What went wrong, in one sentence."""
        self.hint = hint
        """What to do about it, if known."""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    @property
    def falls_back(self) -> bool:
        """Whether a chain asks its next provider after this error: this one did not begin a reply, and another may."""
        return self.default_falls_back

    def __reduce__(self) -> tuple[Any, ...]:
        # `Exception.__reduce__` would call the class with positional arguments only.
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))

    def to_dict(self) -> dict[str, Any]:
        """Return the error as plain data for a log or an HTTP response, without `partial`, which holds model output."""
        fields = {name: value for name, value in vars(self).items() if name != "partial"}
        return {"error": type(self).__name__, **fields}


def _rebuild(kind: type[GraftageError], args: tuple[Any, ...], state: dict[str, Any]) -> GraftageError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(GraftageError):
    """A setting is unknown or its value is invalid."""

    def __init__(self, message: str, *, key: str | None = None, source: str | None = None, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.key = key
        """The setting's name."""
        self.source = source
        """Where the value came from: an argument, an environment variable, a file."""


class PluginError(GraftageError):
    """Something is wrong with a plugin, not with the model behind it."""

    def __init__(
        self,
        message: str,
        *,
        plugin: str | None = None,
        distributions: Iterable[str] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.plugin = plugin
        """The plugin's name."""
        self.distributions = tuple(distributions)
        """The distributions that it came from, each as `name version`."""


class ProviderNotFound(PluginError):
    """No provider of that name is installed; the message lists the installed ones."""


class PluginConflict(PluginError):
    """Two distributions claim one plugin name; uninstall or disable one of `distributions`."""


class PluginLoadError(PluginError):
    """A plugin could not be imported, has an invalid hook, or needs another version of Graftage."""


class ProviderError(GraftageError):
    """A provider, or the server behind it, could not do what a call asked for.

    The docstring of each class says whether a retry is safe; `retryable` says so for one error.
    """

    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        operation: str | None = None,
        status: int | None = None,
        retryable: bool | None = None,
        suggestions: Iterable[str] = (),
        partial: Reply | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.provider = provider
        """The provider's plugin name."""
        self.model = model
        """The requested model."""
        self.operation = operation
        """The operation, such as `chat`."""
        self.status = status
        """The HTTP status, if there was one."""
        self.retryable = self.default_retryable if retryable is None else retryable
        """Whether the same request may succeed if it is sent again. False once a part of the reply has arrived."""
        self.attempts = 1
        """How often the request was sent."""
        self.suggestions = tuple(suggestions)
        """Names that were probably meant."""
        self.partial = partial
        self.details = dict(details or {})
        """Facts for a program, such as the server's message under `server_message`."""


class ConnectionFailed(ProviderError):
    """Nothing answered at the address, or the connection broke before a response. Retrying is safe.

    A chain falls back.
    """

    default_retryable = True
    default_falls_back = True


class ProviderTimeout(ProviderError):
    """A time limit passed. Retrying is safe only for `connect`: otherwise the server may still be at work.

    A chain falls back if `phase` is `connect` or `first_token`.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: Literal["connect", "first_token", "idle", "total"],
        retryable: bool | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(message, retryable=phase == "connect" if retryable is None else retryable, **attributes)
        self.phase = phase
        """Which of the four limits passed."""

    @property
    def falls_back(self) -> bool:
        """Whether a chain asks its next provider after this error."""
        return self.phase in ("connect", "first_token")


class AuthenticationFailed(ProviderError):
    """The server requires a key, a sign-in, or another host name. Retrying does not help. A chain falls back."""

    default_falls_back = True


class ModelNotFound(ProviderError):
    """The server does not have the model; close names are in `suggestions`. Pull it, then retry. A chain falls back."""

    default_falls_back = True


class ModelLoadFailed(ProviderError):
    """The model could not be loaded into memory. Retrying is safe only if `reason` is `crashed`.

    A chain falls back.
    """

    default_falls_back = True

    def __init__(
        self,
        message: str,
        *,
        reason: Literal["memory", "incompatible", "crashed", "timeout"],
        retryable: bool | None = None,
        **attributes: Any,
    ) -> None:
        super().__init__(message, retryable=reason == "crashed" if retryable is None else retryable, **attributes)
        self.reason = reason
        """Why it could not be loaded."""


class RequestRejected(ProviderError):
    """The request is invalid: the server refused it, or Graftage did before sending it. Retrying does not help.

    A chain never falls back, because the next provider would receive the same mistake.
    """


class CapabilityUnsupported(ProviderError):
    """The provider or the model cannot do this. Retrying does not help. A chain falls back."""

    default_falls_back = True


class ContextOverflow(ProviderError):
    """The prompt does not fit into the context window. Retrying does not help; a larger window may.

    A chain falls back, because the next model may have one.
    """

    default_falls_back = True


class Overloaded(ProviderError):
    """The queue is full or a rate limit was reached. Retrying is safe after `retry_after`. A chain falls back."""

    default_retryable = True
    default_falls_back = True

    def __init__(self, message: str, *, retry_after: float | None = None, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after = retry_after
        """Seconds to wait, if the server gave a time."""


class QuotaExceeded(ProviderError):
    """A plan's limit is used up, or the plan does not include the model. Retrying does not help before `retry_after`.

    A chain falls back.
    """

    default_falls_back = True

    def __init__(self, message: str, *, retry_after: float | None = None, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after = retry_after
        """Seconds until the limit is renewed, if the server gave a time."""


class InferenceFailed(ProviderError):
    """The model or its runner failed during a reply, or its output cannot be read: a tool call, JSON.

    If `retryable` is true, retrying is safe, and a chain falls back.
    """

    @property
    def falls_back(self) -> bool:
        """Whether a chain asks its next provider after this error."""
        return self.retryable


class StreamInterrupted(ProviderError):
    """The reply ended too early; `partial` has what arrived. Retrying is safe if nothing arrived."""


class ProtocolError(ProviderError):
    """The response is not what the API promises: it is from another service, a proxy, or a broken server."""


class AdapterError(GraftageError):
    """A LoRA adapter could not be found, read, checked or applied."""

    def __init__(
        self,
        message: str,
        *,
        reference: str | None = None,
        reasons: Iterable[str] = (),
        retryable: bool = False,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.reference = reference
        """The reference that the caller gave."""
        self.reasons = tuple(reasons)
        """Every reason found, not only the first."""
        self.retryable = retryable
        """Whether loading the adapter again may help: the server has lost or replaced it. The core does so once."""


class AdapterNotFound(AdapterError):
    """No resolver knows the reference; `reasons` has the result of each."""


class AdapterInvalid(AdapterError):
    """The file is malformed, unsafe, or of an unsupported kind; or its name means several adapters."""


class AdapterIncompatible(AdapterError):
    """The adapter does not fit the base model; `reasons` lists every contradiction."""


class AdapterUnsupported(AdapterError):
    """This provider, or this version of its server, cannot load the adapter; `reasons` lists what was tried.

    A chain falls back.
    """

    default_falls_back = True


class ResourceLimitExceeded(GraftageError):
    """A policy refused the request because the machine cannot take it.

    A chain falls back, because the next provider may run elsewhere or have a smaller model.
    """

    default_falls_back = True

    def __init__(
        self,
        message: str,
        *,
        limit: str,
        value: float | str | None = None,
        plugin: str | None = None,
        reason: str | None = None,
        details: Mapping[str, Any] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.limit = limit
        """The limit's name, such as `context_window`."""
        self.value = value
        """The largest value that would have been admitted, if there is one."""
        self.plugin = plugin
        """The plugin whose policy refused."""
        self.reason = reason
        """The reason, with figures."""
        self.details = dict(details or {})
        """The figures for a program, such as `required` and `available` in bytes."""
