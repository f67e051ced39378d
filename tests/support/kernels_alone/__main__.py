"""Renews the golden values that tools/aarch64.sh reads: `cd tests && python -m support.kernels_alone`."""

from __future__ import annotations

from support.kernels_alone.values import FILE, text

if __name__ == "__main__":
    FILE.write_text(text())
