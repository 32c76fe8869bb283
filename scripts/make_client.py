"""Make the sync client from the async one.

    python scripts/make_client.py [--check]

Each `await` becomes a call of `drive`, except for methods of the client itself, which block in the sync client. Names
change as in the table below. With `--check` nothing is written: the exit code is 1 if the file is not up to date.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent / "core" / "graftage" / "_client"
SOURCE, TARGET = CLIENT / "async_client.py", CLIENT / "sync_client.py"
HEAD = '"""The client for threads. Made from `async_client.py` by `python scripts/make_client.py`: change that file."""'
WORDS = {
    r"A connection to a provider, for asyncio\.": "A connection to a provider.",
    r"It opens at `async with` or at its first call; use": "Use",
    r"Tasks may share it, and event loops may use it in turn\.": "Threads may share it.",
    r"Coroutine\[Any, Any, Reply\]": "Reply",
    r"connect_async": "connect",
    r"translate_errors_async": "translate_errors",
    r"_AwaitingClient": "_BlockingClient",
    r"AsyncClient": "Client",
    r"AsyncStream": "Stream",
    r"__aenter__": "__enter__",
    r"__aexit__": "__exit__",
    r"async def": "def",
    r"(from graftage\._client\.streams import Stream)": r"\1\nfrom graftage._engine.driving import drive",
    r"An? (Stream)": r"A \1",
    r"an (`Stream`)": r"a \1",
}
"""Replacements for names, and for sentences that are true of one client only."""
RUFF = [sys.executable, "-m", "ruff"]


def sync_source() -> str:
    """Return the source of the sync client."""
    text = SOURCE.read_text(encoding="utf-8")
    text = HEAD + _without_await(text)[len(ast.get_docstring(ast.parse(text), clean=False) or "") + 6 :]
    for old, new in WORDS.items():
        text = re.sub(old, new, text)
    for command in (["check", "--fix-only", "--select=F401,I"], ["format"]):
        done = subprocess.run(
            [*RUFF, *command, "--quiet", f"--stdin-filename={TARGET}", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        text = done.stdout
    return text


def _without_await(text: str) -> str:
    """Replace `await …` with `drive(…)`, from the end, so that earlier positions stay valid."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Await)]
    last = len(text)
    for node in sorted(found, key=lambda each: (each.lineno, each.col_offset), reverse=True):
        work = ast.get_source_segment(text, node.value) or ""
        begin = starts[node.lineno - 1] + node.col_offset
        end = begin + len("await ") + len(work)
        assert end <= last, f"line {node.lineno}: an `await` cannot contain another"
        last = begin
        text = text[:begin] + (work if work.startswith("self.") else f"drive({work})") + text[end:]
    return text


def main() -> int:
    """Write the client, or check that it is up to date."""
    new = sync_source()
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != new:
            print(f"{TARGET.name} is not up to date: run `python scripts/make_client.py`.")
            return 1
        return 0
    TARGET.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
