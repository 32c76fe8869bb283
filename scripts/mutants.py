"""Break one line of code at a time, and check that the tests fail.

    python scripts/mutants.py [--list] [--only WORD...] [--trust] [-j 2]

Each mutant of `mutants.toml` is applied to a copy of the tree, never to the tree itself. The tests that must kill it
run there. The exit code is 1 if a mutant survives, if its line is not found exactly once, or if its tests fail anyway.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
TIME_LIMIT = 300.0
"""Seconds for the tests of one mutant. A mutant that makes them hang counts as killed."""
PACKAGES = ("core", "providers/ollama", "providers/llamacpp", "providers/openai", "plugins/lora", "plugins/m4")
PASSED, FAILED = 0, 1
"""How pytest exits if all tests pass, and if some fail."""


@dataclass(frozen=True)
class Mutant:
    """A text of the code, what replaces it, and the tests that must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Arguments of pytest."""

    def apply(self, text: str) -> str | None:
        """Return the mutated source, or None if the text is not found exactly once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 and self.old != self.new else None


def read_table() -> Iterator[Mutant]:
    """Yield the mutants of the table, in order."""
    for area, files in tomllib.loads(TABLE.read_text(encoding="utf-8")).items():
        rows = [(file, *row) for file, given in files.items() for row in given["mutants"]]
        for place, (file, old, new, *tests) in enumerate(rows, 1):
            yield Mutant(f"{area}-{place}", file, old, new, tests[0] if tests else files[file]["tests"])


def copy_to(folder: Path) -> None:
    """Copy the files that git tracks or would add, without environments and builds."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> int | None:
    """Return the exit code of pytest, or None at the time limit."""
    paths = os.pathsep.join(str(folder / each) for each in PACKAGES)
    # A mutant can have the size and time of the old byte code, which would then run instead.
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    # In a new session, the tests can be killed with all that they started.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return None


def judge(mutant: Mutant, folder: Path) -> str:
    """Test a mutant in a copy of the tree, and restore the copy."""
    file = folder / mutant.file
    source = file.read_text(encoding="utf-8") if file.exists() else ""
    mutated = mutant.apply(source)
    if mutated is None:
        return "stale"
    file.write_text(mutated, encoding="utf-8")
    try:
        ended = run_tests(folder, mutant.tests)
    finally:
        file.write_text(source, encoding="utf-8")
    return {PASSED: "survived", FAILED: "killed", None: "killed"}.get(ended, f"broken: pytest exits with {ended}")


def main(arguments: list[str] | None = None) -> int:
    """Judge the mutants, print each and a summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only mutants with one of these in their name, file or text"
    )
    parser.add_argument("--trust", action="store_true", help="do not check first that the tests pass without a mutant")
    parser.add_argument("-j", dest="workers", type=int, default=1, help="how many at the same time")
    given = parser.parse_args(arguments)
    mutants = [
        each for each in read_table() if any(word in f"{each.name} {each.file} {each.old}" for word in given.only)
    ]
    if given.list:
        print(*(f"{each.name:14} {each.file}: {each.old}  ->  {each.new}" for each in mutants), sep="\n")
        return 0
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as work, ThreadPoolExecutor(given.workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for place in range(given.workers):
            copy_to(Path(work, str(place)))
            copies.put(Path(work, str(place)))

        def report(name: str, what: str, judged: str, began: float) -> str:
            print(f"{judged:9} {name:14} {time.monotonic() - began:5.0f} s  {what}", flush=True)
            return judged.partition(":")[0]

        def judge_one(mutant: Mutant) -> str:
            folder, began = copies.get(), time.monotonic()
            judged = judge(mutant, folder)
            copies.put(folder)
            return report(mutant.name, f"{mutant.file}: {mutant.old}  ->  {mutant.new}", judged, began)

        def check_tests(tests: str) -> str:
            folder, began = copies.get(), time.monotonic()
            passed = run_tests(folder, tests) == PASSED
            copies.put(folder)
            return "" if passed else report("", f"without a mutant: {tests}", "broken", began)

        # Tests that fail without a mutant prove nothing.
        named = [] if given.trust else list(dict.fromkeys(each.tests for each in mutants))
        outcomes.update(filter(None, pool.map(check_tests, named)))
        outcomes.update(pool.map(judge_one, mutants))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return 0 if set(outcomes) <= {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
