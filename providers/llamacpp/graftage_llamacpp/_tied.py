"""Runs a command that ends when its parent does, however that went: the parent holds the other end of standard input.

Started as a script, isolated (`-I -S`), with the command as its arguments; its exit code is the command's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command to its end, or to that of the parent."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)  # noqa: S603 - its caller has chosen it
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    # Ctrl-C goes to the whole foreground: the parent says what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return child.wait()


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    child.kill()


if __name__ == "__main__":
    sys.exit(main())
