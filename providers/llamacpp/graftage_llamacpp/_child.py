"""A child process that ends when its parent does, however that went: the engine, or a command.

Started as a script, isolated (`-I -S`) and with nothing of Graftage imported. The parent holds the other end of
standard input: it ends with the parent, and so does this. With arguments they are a command to run, whose exit code it
has. Without any it is one llama.cpp server on loopback: it reads its order as one line of JSON from standard input, so
that the key is in no argument list, and answers with one line on standard output.
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
"""Seconds between two looks at the parent: a process it forked may hold the pipe open after its death."""
LOG_WAIT = 2.0
LOG_STEP = 0.1


def run_command() -> None:
    """Run a command to its end, or to that of the parent."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603 - its caller has chosen it

    def end_with_stdin() -> None:
        _wait_for_stdin_end()
        child.kill()

    threading.Thread(target=end_with_stdin, daemon=True).start()
    # Ctrl-C goes to the whole foreground: the parent says what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(child.wait())


def run_engine() -> None:
    """Serve until the parent is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host: it may want to go on.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever native code prints must not mix with the answer.
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_stdin, daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=_exit_with_parent, args=(order["parent"],), daemon=True).start()
    try:
        answer = _serve(order)
    except ImportError as error:
        answer = {"error": "import", "message": str(error)}
    except Exception as error:  # noqa: BLE001 - the bindings raise several kinds, and all of them mean the same
        answer = {"error": "load", "message": f"{type(error).__name__}: {error}"}
        _wait_for_log()
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    if "address" not in answer:
        os._exit(1)
    while True:
        time.sleep(3600)


def _wait_for_log() -> None:
    """Wait until standard error, a file, grows no more: a thread of the engine writes there what was wrong."""
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
    # PR_SET_PDEATHSIG would not do: it follows the thread that started this process, not the parent as a whole.
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
    params.api_keys = [order["key"]]
    params.cors_origins = ""
    params.endpoint_slots = params.ui = False
    params.cache_ram_mib = 0  # Otherwise the prompts of finished requests pile up to 8 GB.
    params.fit_params = False  # The window is the one that was asked for, or an error.
    params.verbosity = 1  # Errors only: they go to standard error, which the parent keeps for its own errors.
    server = xllamacpp.Server(params)
    _servers.append(server)
    return {"address": server.listening_address, "version": xllamacpp.__version__}


if __name__ == "__main__":
    run_command() if sys.argv[1:] else run_engine()
