"""A child process that ends when its parent ends, even if that is killed: the engine, or a command.

It runs as an isolated script (`-I -S`) and imports nothing of Graftage. The parent holds the other end of standard
input, which closes when the parent ends; then this process ends, too. With arguments, it runs them as a command and
returns its exit code. Without, it is one llama.cpp server on loopback: it reads its order as one line of JSON from
standard input, so that no argument list shows the key, and answers with one line on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

PARENT_CHECK = 1.0
"""Seconds between two checks of the parent: after its end, a fork of it may hold the pipe open."""
LOG_WAIT = 2.0
LOG_STEP = 0.1


def run_command() -> None:
    """Run a command until it ends, or until the parent ends."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603 - the caller's command

    def end_with_stdin() -> None:
        _wait_for_stdin_end()
        child.kill()

    threading.Thread(target=end_with_stdin, daemon=True).start()
    # Ctrl-C reaches the whole foreground: the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(child.wait())


def run_engine() -> None:
    """Serve until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may continue.
    os.umask(0o077)  # A saved prompt is private.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Output of native code must not mix with the answer.
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_stdin, daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=_exit_with_parent, args=(order["parent"],), daemon=True).start()
    try:
        answer = _serve(order)
    except ImportError as error:
        answer = {"error": "import", "message": str(error)}
    except Exception as error:  # noqa: BLE001 - the bindings raise several kinds for one cause
        answer = {"error": "load", "message": f"{type(error).__name__}: {error}"}
        _wait_for_log()
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    if "address" not in answer:
        os._exit(1)
    while True:
        time.sleep(3600)


def _wait_for_log() -> None:
    """Wait until standard error, a file, stops growing: a thread of the engine writes the cause there."""
    end = time.monotonic() + LOG_WAIT
    size = 0
    while time.monotonic() < end:
        before, size = size, os.fstat(2).st_size
        if size and size == before:
            return
        time.sleep(LOG_STEP)


def _wait_for_stdin_end() -> None:
    while os.read(0, 4096):
        pass


def _exit_with_stdin() -> None:
    _wait_for_stdin_end()
    os._exit(0)


def _exit_with_parent(parent: int) -> None:
    # PR_SET_PDEATHSIG follows only the thread that started this process, not the whole parent.
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(0)


_servers: list[Any] = []
"""Keeps the server alive."""


def _serve(order: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, order["location"])
    import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore]

    if order["model"] is None:
        return {"version": xllamacpp.__version__, "error": None}
    params = xllamacpp.CommonParams()
    params.model.path = order["model"]
    params.n_ctx = order["window"] * order["slots"]
    params.n_parallel = order["slots"]
    params.n_batch = params.n_ubatch = order["batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    if order["gpu_layers"] is not None:
        params.n_gpu_layers = order["gpu_layers"]
    params.embedding = True
    if order["pooling"]:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{order['pooling']}")
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in order["adapters"]]
    if order["prompts"]:
        params.slot_save_path = order["prompts"] + os.sep
    params.api_keys = [order["key"]]
    params.cors_origins = ""
    params.endpoint_slots = params.ui = False
    params.cache_ram_mib = 0  # By default, it keeps up to 8 GB of finished prompts.
    params.fit_params = False  # Fail rather than change the requested window.
    params.verbosity = 1  # Errors only: the parent reads standard error for its messages.
    server = xllamacpp.Server(params)
    _servers.append(server)
    return {"address": server.listening_address, "version": xllamacpp.__version__}


if __name__ == "__main__":
    run_command() if sys.argv[1:] else run_engine()
