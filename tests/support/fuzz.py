"""Random steps against the formula in float64: `cd tests && python -m support.fuzz --examples 20000 --seed 0`."""

from __future__ import annotations

import argparse
import time

import hypothesis

from support.step_examples import Example, check, examples


def main() -> int:
    """Runs them; hypothesis shows the smallest example that fails."""
    flags = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    flags.add_argument("--examples", type=int, default=20_000, help="how many (%(default)s)")
    flags.add_argument("--seed", type=int, default=0, help="of hypothesis (%(default)s)")
    given = flags.parse_args()
    tried = 0

    @hypothesis.seed(given.seed)
    @hypothesis.settings(
        max_examples=given.examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(examples())
    def run(example: Example) -> None:
        nonlocal tried
        tried += 1
        check(example)

    start = time.perf_counter()
    run()
    print(f"{tried} examples, no mismatch, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
