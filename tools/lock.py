"""Renews constraints.txt, the versions that the tests ran with: `python tools/lock.py`, needs Python 3.11 and uv.

Pins stay as they are where pyproject.toml still allows them; `--upgrade`, or any other option, goes to uv.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
# What .ci/run installs to build the wheel, and the release of torch that kernels and tables were checked with.
EXTRA = "build\ntorch==2.13.0\n"
# A CUDA build of torch pins its own, exactly; other builds need none.
LEFT_OUT = re.compile(r"(nvidia|cuda)-")
HEADER = """\
# Every package that the extras install, for every Python and platform. Made by `python tools/lock.py`: do not edit.
"""


def main() -> None:
    """Writes the lock, or ends with uv's reason."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    uv = f"-m uv pip compile --quiet --universal --python-version {oldest} --no-python-downloads --all-extras"
    # uv reads the pins to keep from the file that it writes.
    command = [sys.executable, *uv.split(), "--no-header", "--no-annotate", "--output-file", str(LOCK), *sys.argv[1:]]
    done = subprocess.run([*command, "pyproject.toml", "-"], cwd=ROOT, input=EXTRA, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    pins = [line for line in LOCK.read_text().splitlines() if not LEFT_OUT.match(line)]
    LOCK.write_text(HEADER + "".join(f"{pin}\n" for pin in pins))


if __name__ == "__main__":
    main()
