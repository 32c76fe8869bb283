"""Move the server's name in cassettes of Graftage 0.1 to where pytest-recording can read them.

    python scripts/move_cassette_server.py FOLDER...

Version 0.1 wrote it once for each file, as `metadata`, which pytest-recording 0.14 with vcrpy 9.4 cannot load. Now each
response has a key `server`. No other line changes, nor does a file that has no such `metadata`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

METADATA = re.compile(r"^metadata:\n  server: (.+)\n(?! )", re.MULTILINE)
# Bodies are indented deeper: no line of theirs looks like this one.
RESPONSE = "\n  response:\n"


def main(folders: list[str]) -> None:
    """Convert all cassettes below the folders."""
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if found := METADATA.search(text):
            text = METADATA.sub("", text).replace(RESPONSE, f"{RESPONSE}    server: {found[1]}\n")
            path.write_text(text, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
