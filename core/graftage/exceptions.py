"""Every error Graftage raises.

    GraftageError
    ├── SettingsError               a setting is unknown or wrong, and where it came from
    ├── PluginError
    │   ├── ProviderNotFound        nothing of that name is installed
    │   ├── PluginConflict          two distributions claim one name
    │   └── PluginLoadError         import, signature or version is wrong; cause attached
    ├── ProviderError               .provider .model .operation .status .retryable .attempts .suggestions .partial
    │   │                           .details
    │   ├── ConnectionFailed        nothing answered at that address
    │   ├── ProviderTimeout         .phase: connect, first_token, idle, total
    │   ├── AuthenticationFailed
    │   ├── ModelNotFound           close names in .suggestions
    │   ├── ModelLoadFailed         .reason: memory, incompatible, crashed, timeout
    │   ├── RequestRejected         the request is wrong, says the server or Graftage before sending
    │   ├── CapabilityUnsupported   refused before sending where it can be known
    │   ├── ContextOverflow         the prompt does not fit, or was cut
    │   ├── Overloaded              queue full or rate limited; .retry_after
    │   ├── QuotaExceeded           a plan's limit is used up, or does not cover it; .retry_after
    │   ├── InferenceFailed         the model or its runner failed, or what the model wrote cannot be read
    │   ├── StreamInterrupted       the stream ended before it was done; .partial
    │   └── ProtocolError           the answer is not what the API promises
    ├── AdapterError
    │   ├── AdapterNotFound         what each resolver said
    │   ├── AdapterInvalid          malformed, unsafe or unsupported file
    │   ├── AdapterIncompatible     reasons
    │   └── AdapterUnsupported      this provider or server version cannot load it; what can
    └── ResourceLimitExceeded       .limit .value .plugin .reason

Building an error writes no log line and keeps no reference to the mappings it was given.
All of them pickle and copy. Their text never holds a prompt or an answer; `GraftageError.partial` does.
Wrong use of an object, such as a client after `close`, is a `RuntimeError` and not in this tree.
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
    """The one class to catch around everything Graftage does. A chain does not fall back unless a class says so."""

    default_falls_back: ClassVar[bool] = False
    partial: Reply | None = None
    """What had been received when it failed: text, thinking and tool calls."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        """What went wrong, in one sentence."""
        self.hint = hint
        """The way out, where one is known."""

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    @property
    def falls_back(self) -> bool:
        """Whether a chain asks its next provider after this error: it could not begin to answer, and another may."""
        return self.default_falls_back

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ would call the class with its positional arguments alone.
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, for a log or a web answer; without `partial`, which holds model output."""
        fields = {name: value for name, value in vars(self).items() if name != "partial"}
        return {"error": type(self).__name__, **fields}


def _rebuild(kind: type[GraftageError], args: tuple[Any, ...], state: dict[str, Any]) -> GraftageError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(GraftageError):
    """A setting is unknown or its value is wrong."""

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
        """The distributions it came from, each as `name version`."""


class ProviderNotFound(PluginError):
    """No provider of that name is installed; the message lists those that are."""


class PluginConflict(PluginError):
    """Two distributions claim one plugin name; uninstall or disable one of those in `distributions`."""


class PluginLoadError(PluginError):
    """A plugin could not be imported, has a wrong hook, or needs another Graftage; the cause is attached."""


class ProviderError(GraftageError):
    """A provider, or the server behind it, could not do what was asked.

    Each class says whether a retry is safe; `retryable` says it of the instance.
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
        """The model that was asked for."""
        self.operation = operation
        """The operation, such as `chat`."""
        self.status = status
        """The HTTP status, where there was one."""
        self.retryable = self.default_retryable if retryable is None else retryable
        """Whether the same request may succeed if it is sent again; not where a part of the answer has come."""
        self.attempts = 1
        """How often it was tried."""
        self.suggestions = tuple(suggestions)
        """Names that were probably meant."""
        self.partial = partial
        self.details = dict(details or {})
        """Facts for a program, such as the server's own words under `server_message`."""


class ConnectionFailed(ProviderError):
    """Nothing answered at that address, or the connection broke before an answer. Retrying is safe.

    A chain falls back.
    """

    default_retryable = True
    default_falls_back = True


class ProviderTimeout(ProviderError):
    """A time limit passed. Retrying is safe only for `connect`: the server may still be working on the rest.

    A chain falls back where `phase` is `connect` or `first_token`.
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
    """The server wants a key, a sign-in, or another host name. Retrying does not help. A chain falls back."""

    default_falls_back = True


class ModelNotFound(ProviderError):
    """The server does not have the model; close names are in `suggestions`. Pull it, then retry. A chain falls back."""

    default_falls_back = True


class ModelLoadFailed(ProviderError):
    """The model could not be brought into memory. Retrying is safe only where `reason` is `crashed`.

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
    """The request is wrong: says the server, or Graftage before sending it. Retrying does not help.

    A chain never falls back: the next provider would be sent the same mistake.
    """


class CapabilityUnsupported(ProviderError):
    """The provider or the model cannot do that. Retrying does not help. A chain falls back."""

    default_falls_back = True


class ContextOverflow(ProviderError):
    """The prompt does not fit into the context window. Retrying does not help; a larger window may.

    A chain falls back: the next model may have one.
    """

    default_falls_back = True


class Overloaded(ProviderError):
    """The queue is full or a rate limit was reached. Retrying is safe after `retry_after`. A chain falls back."""

    default_retryable = True
    default_falls_back = True

    def __init__(self, message: str, *, retry_after: float | None = None, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after = retry_after
        """Seconds to wait, where the server named them."""


class QuotaExceeded(ProviderError):
    """A plan's limit is used up, or the plan does not cover the model. Retrying does not help before `retry_after`.

    A chain falls back.
    """

    default_falls_back = True

    def __init__(self, message: str, *, retry_after: float | None = None, **attributes: Any) -> None:
        super().__init__(message, **attributes)
        self.retry_after = retry_after
        """Seconds until it is renewed, where the server named them."""


class InferenceFailed(ProviderError):
    """The model or its runner failed while answering, or what the model wrote cannot be read: a call of a tool, JSON.

    Retrying is safe where `retryable` says so. A chain falls back where `retryable` says so, too.
    """

    @property
    def falls_back(self) -> bool:
        """Whether a chain asks its next provider after this error."""
        return self.retryable


class StreamInterrupted(ProviderError):
    """The answer ended before it was done; what came is in `partial`. Retrying is safe where nothing came."""


class ProtocolError(ProviderError):
    """The answer is not what the API promises: another service, a proxy, or a broken server."""


class AdapterError(GraftageError):
    """A LoRA adapter could not be found, read, proven or applied."""

    def __init__(
        self,
        message: str,
        *,
        reference: str | None = None,
        reasons: Iterable[str] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.reference = reference
        """The adapter as it was asked for."""
        self.reasons = tuple(reasons)
        """Every reason found, not only the first."""


class AdapterNotFound(AdapterError):
    """No resolver knows the reference; `reasons` tells what each one said."""


class AdapterInvalid(AdapterError):
    """The file is malformed, unsafe, or of a kind that is not supported."""


class AdapterIncompatible(AdapterError):
    """The adapter does not fit the base model; `reasons` lists every contradiction."""


class AdapterUnsupported(AdapterError):
    """This provider, or this version of its server, cannot load the adapter; `reasons` tells what was tried.

    A chain falls back.
    """

    default_falls_back = True


class ResourceLimitExceeded(GraftageError):
    """A policy refused the request because the machine cannot take it.

    A chain falls back: the next provider may be elsewhere, or its model smaller.
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
        """The largest value that would have been admitted, where there is one."""
        self.plugin = plugin
        """The policy that refused."""
        self.reason = reason
        """Why, with figures."""
        self.details = dict(details or {})
        """The figures for a program, such as `required` and `available` in bytes."""
