"""Downloads adapters from the Hugging Face hub, by its own library into its own cache, and binds them to names.

Only the files of the adapter are downloaded, and only up to the size that the hub states. What is bound is the commit
and the digest, not the branch or tag: a name means the same until someone binds it again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from graftage.exceptions import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnsupported, GraftageError
from graftage.types import AdapterInfo, PullProgress
from graftage_lora._files import CONFIG, MORE, WEIGHTS, Refused
from graftage_lora._resolve import Resolver, is_lasting, is_plain, refused_adapter
from graftage_lora._sources import (
    COMMIT,
    HUB,
    PICKLES,
    USERS,
    NotKnown,
    is_outside,
    name_problem,
    parse,
    refusal,
    split_repository,
)
from graftage_lora._write import atomic_file

if TYPE_CHECKING:
    from graftage.calls import Call, PullAdapterRequest
    from graftage_lora._settings import LoraSettings

__all__ = ["pull"]

EXTRA: Final = "pip install 'graftage-lora[hub]'"
LOGIN: Final = "log in with `hf auth login` or set HF_TOKEN"
SHOWN: Final = 5
"""Files of a repository that an error names."""


def pull(request: PullAdapterRequest, resolver: Resolver) -> AdapterInfo | None:
    """Download the adapter of a repository and bind it to a name; return `None` if the reference is not a repository.

    Raises:
        AdapterNotFound: the hub does not have it.
        AdapterInvalid: it is no adapter, too large, or cannot be used.
        AdapterUnsupported: `huggingface_hub` is not installed.
        AdapterError: the hub cannot be reached or denies access, the name means something else, or the disk is full.
    """
    reference = request.reference
    try:
        owner, repository, revision = split_repository(reference)
    except NotKnown as reason:
        if not reference.startswith(HUB):
            return None
        raise AdapterNotFound(f"The adapter `{ascii(reference)[1:-1][:200]}` was not found: {reason}.") from None
    tagged = f"{repository}@{revision}" if revision else repository
    name = request.name or (tagged if name_problem(tagged) is None and is_plain(tagged) else repository)
    if problem := name_problem(name) or (None if is_plain(name) else "its end looks like a digest"):
        raise AdapterInvalid(f"`{ascii(name)[1:-1][:200]}` cannot be a name: {problem}.", hint="Give another `name`.")
    label = f"{owner}/{repository}"
    try:
        commit = _Download(label, revision, resolver.settings, request.call).run()
        found = _bind(resolver, request, name, f"{HUB}{label}@{commit}", revision)
    except Refused as error:
        raise refused_adapter(reference, error, AdapterInvalid) from None
    request.call.emit("progress", progress=PullProgress(status="success", digest=found.digest))
    return found


# --- Downloading -----------------------------------------------------------------------------------------------------


class _Download:
    """One download."""

    def __init__(self, label: str, revision: str, settings: LoraSettings, call: Call) -> None:
        self.label = label
        self.revision = revision
        self._settings = settings
        self._call = call
        self._hub = _library()
        # The library reads the variable once, when it is imported.
        self._endpoint = os.environ.get("HF_ENDPOINT") or None

    def run(self) -> str:
        """Download the files into the library's cache, and return their commit."""
        try:
            commit, sizes = self._inspect()
            files = needed(list(sizes))
            total = sum(sizes[each] for each in files)
            if total > self._settings.max_bytes:
                reason = f"it has {total:,} bytes; at most {self._settings.max_bytes:,} are allowed"
                raise Refused(reason, MORE)
            done = 0
            for each in files:
                self._fetch(each, commit, done, sizes[each], total)
                done += sizes[each]
        except (GraftageError, Refused):
            raise
        except Exception as error:  # noqa: BLE001 - the library has those of several HTTP libraries
            # Their words may contain addresses with a signature.
            late = time.monotonic() >= self._call.deadline
            raise (self._call.timed_out() if late else self._error(error)) from None
        return commit

    def _inspect(self) -> tuple[str, dict[str, int]]:
        """Ask for the commit, and the sizes of its files."""
        self._report(f"asking for {self.label}")
        api = self._hub.HfApi(endpoint=self._endpoint)
        info = api.model_info(self.label, revision=self.revision or None, files_metadata=True, timeout=self._patience)
        if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
            raise Refused("the hub does not name its commit", "Check HF_ENDPOINT.")
        return info.sha, {each.rfilename: each.size for each in info.siblings or () if isinstance(each.size, int)}

    def _fetch(self, file: str, commit: str, done: int, size: int, total: int) -> None:
        self._report(f"downloading {file}", total, done)
        report, check, base = self._report, self._check_time, self._hub.utils.tqdm

        class Progress(base):  # type: ignore[misc, valid-type]
            """The library's progress bar, which shows nothing itself."""

            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **{**named, "disable": True})
                self.so_far = named.get("initial") or 0

            def update(self, count: float | None = 1) -> None:
                check()
                self.so_far += int(count or 0)
                if self.so_far > size:
                    raise Refused(f"`{file}` has more than the {size:,} bytes that the hub states", "Pull it again.")
                report(f"downloading {file}", total, done + self.so_far)

        # With the revision instead of the commit, the library notes what the branch or tag means.
        path = self._hub.hf_hub_download(
            self.label,
            file,
            revision=self.revision or None,
            cache_dir=self._settings.hub,
            endpoint=self._endpoint,
            etag_timeout=self._patience,
            tqdm_class=Progress,
        )
        if Path(path).parent.name != commit:
            raise Refused("it changed while it was downloaded", "Pull it again.")
        self._check_time()

    @property
    def _patience(self) -> float:
        """Seconds to wait for an answer."""
        self._check_time()
        return min(self._call.timeouts.idle, self._call.deadline - time.monotonic())

    def _check_time(self) -> None:
        if time.monotonic() >= self._call.deadline:
            raise self._call.timed_out()

    def _report(self, status: str, total: int | None = None, completed: int | None = None) -> None:
        self._call.emit("progress", progress=PullProgress(status=status, total=total, completed=completed))

    def _error(self, error: Exception) -> AdapterError:
        """Return the typed error for one of the library's, which also raises those of its HTTP library."""
        kinds, where = self._hub.errors, f"`{self.label}`"
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind, words = AdapterError, f"The download of {where} failed ({type(error).__name__})."
        hint = "Check the network and HF_ENDPOINT."
        if isinstance(error, kinds.GatedRepoError):
            host = "$HF_ENDPOINT" if self._endpoint else "https://huggingface.co"  # It may contain a password.
            words, hint = f"{where} is gated.", f"Ask for access at {host}/{self.label}, then {LOGIN}."
        elif isinstance(error, (kinds.RepositoryNotFoundError, kinds.HFValidationError)):
            kind, words = AdapterNotFound, f"The hub has no repository {where}, or it is private."
            hint = f"Check its name. If it is private, {LOGIN}."
        elif isinstance(error, kinds.RevisionNotFoundError):
            kind, words = AdapterNotFound, f"{where} has no revision `{self.revision}`."
            hint = "Check the branch, tag or commit; without one, `main` is downloaded."
        elif isinstance(error, kinds.OfflineModeIsEnabled):
            words, hint = "The library of the hub is offline.", "Unset HF_HUB_OFFLINE to download."
        elif status in (401, 403):
            words, hint = f"The hub denies access to {where} ({status}).", f"Check access, or {LOGIN}."
        elif status is not None:
            words, hint = f"The hub answered {status} for {where}.", f"Try again later, or {LOGIN}."
        elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            words, hint = f"{where} cannot be written to {self._settings.hub}: {error.strerror}.", ""
        return kind(words, hint=hint or None)


def _library() -> Any:
    """Import what the extra installs, or say so."""
    try:
        import huggingface_hub  # isort: skip - an error names the first that is missing
        import filelock  # noqa: F401
        import tomlkit  # noqa: F401
    except ImportError as error:
        raise AdapterUnsupported(
            f"Downloads from the Hugging Face hub need the package `{error.name}`.", hint=f"Run `{EXTRA}`."
        ) from None
    return huggingface_hub


def needed(names: list[str]) -> tuple[str, ...]:
    """Return the files of a repository that its only adapter consists of."""
    weights = [each for each in WEIGHTS.values() if each in names]
    if CONFIG in names and weights:
        return CONFIG, weights[0]
    files = sorted(each for each in names if re.fullmatch(r"[\w][\w.+ -]*\.gguf", each))
    if len(files) == 1:
        return (files[0],)
    if files:
        hint = "Download one of them with `hf download`, and give its path."
        raise Refused(f"the repository has several GGUF files: {_shown(files)}", hint)
    if pickles := [each for each in PICKLES if each in names]:
        raise Refused(f"it is a pickle (`{pickles[0]}`), which can run code when it is read")
    raise Refused(f"the repository contains no adapter, only {_shown(sorted(names)) or 'nothing'}")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# --- Binding ---------------------------------------------------------------------------------------------------------


def _bind(resolver: Resolver, request: PullAdapterRequest, name: str, reference: str, revision: str) -> AdapterInfo:
    """Check what was downloaded, and bind the name to it in the user's registry."""
    from filelock import FileLock, Timeout

    (found,), _ = resolver.candidates(parse(reference))
    facts, digest = resolver.facts(found, None)
    pin = digest if is_lasting(facts, None) else f"sha256:{facts.sha256}"
    entry = {"path": reference, "digest": pin}
    if revision and not COMMIT.fullmatch(revision):
        entry["revision"] = revision
    registry = resolver.settings.registry.resolve()
    try:
        registry.parent.mkdir(parents=True, exist_ok=True)
        left = max(0.0, request.call.deadline - time.monotonic())
        with FileLock(registry.with_name(f".{registry.name}.lock"), timeout=left):
            if not request.overwrite and not _is_free(resolver, name, digest):
                raise AdapterError(
                    f"The name `{name}` means something else already.",
                    reference=request.reference,
                    hint="Give another `name`, or `overwrite`; `graftage adapters list` shows it.",
                )
            _write(registry, name, entry, overwrite=request.overwrite)
    except Timeout:
        raise request.call.timed_out() from None
    except (OSError, ValueError) as error:
        reason = f"{registry} cannot be read and written: {refusal(error)}."
        raise AdapterError(reason, hint="Fix it or move it away.") from None
    (found,), _ = resolver.candidates(parse(name))
    return replace(resolver.info(found, None, settled=True), verdict=None)


def _is_free(resolver: Resolver, name: str, digest: str) -> bool:
    """Return whether a name means nothing yet, or has been pulled and means the adapter with this digest.

    Raises:
        Refused: a registry cannot be read.
    """
    found, _ = resolver.candidates(parse(name))
    for each in found:
        if not each.name:
            each.usable()
        if each.source == USERS and is_outside(each.path, resolver.settings.hub):
            return False
    try:
        return all(resolver.facts(each, None)[1] == digest for each in found)
    except Refused:
        return False


def _write(registry: Path, name: str, entry: Mapping[str, str], *, overwrite: bool) -> None:
    """Write one table of a registry, and leave all else as it is; also other keys of the table, or replace it."""
    import tomlkit

    document = tomlkit.parse(registry.read_bytes().decode("utf-8-sig") if registry.exists() else "")
    if overwrite or name not in document:
        document[name] = tomlkit.table()
    table: Any = document[name]
    table.pop("revision", None)
    table.update(entry)
    with atomic_file(registry) as file:
        file.write(tomlkit.dumps(document).encode())
