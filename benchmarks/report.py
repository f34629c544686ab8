"""Runs the scripts that docs/benchmarks.md names and puts what they print in its place there.

A block of the page stands between two comments, the first of which is the command:

    <!-- bench: path.py --data {GRAPHS} -->
    ...
    <!-- end -->

{NAME} is the value of that environment variable; a block whose variable is not set keeps what it has, and so
do all others where names of scripts are given: `python benchmarks/report.py [attention.py ...]`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- bench: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled_in(command):
    """The command's words with the values of its variables, or the name of the first that is not set."""
    for name in re.findall(r"\{(\w+)\}", command):
        if name not in os.environ:
            return None, name
        command = command.replace(f"{{{name}}}", shlex.quote(os.environ[name]))
    return shlex.split(command), None


def main():
    wanted = set(sys.argv[1:])
    page = PAGE.read_text()
    for opening, command, _ in BLOCK.findall(page):
        if wanted and command.split()[0] not in wanted:
            continue
        words, missing = filled_in(command)
        if missing:
            print(f"{command}: left as it is, {missing} is not set", flush=True)
            continue
        print(f"{command} ...", flush=True)
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / words[0], *words[1:]], stdout=subprocess.PIPE
        )
        if done.returncode:
            raise SystemExit(f"{command} failed; its block is left as it is")
        printed = done.stdout.decode().strip()
        # After every script, so that a later failure loses nothing.
        page = re.sub(
            re.escape(opening) + ".*?(?=<!-- end -->)",
            lambda _, text=f"{opening}{printed}\n": text,
            page,
            flags=re.DOTALL,
        )
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
