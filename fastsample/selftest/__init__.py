"""Every op on every backend that is here, against float64, with times beside it: `fastsample selftest`.

targets         the backends that are here, each with the device that it is tried on
cases           the list of all checks: step_cases, op_cases and sampler_cases make them, case says what one is
results         a check carried out: error, bits, time
table           how it is printed
"""

from __future__ import annotations

import sys

from fastsample.selftest import table
from fastsample.selftest.cases import cases
from fastsample.selftest.results import Result, results_of
from fastsample.selftest.targets import targets_on


def run(device: str | None = None, backend: str | None = None, quick: bool = False) -> int:
    """Prints the table.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None for a GPU where torch sees one.
        backend: one alone (and the first compiled one here, for the bits); None for all.
        quick: whether to try small shapes only.

    Returns:
        0 where every check passed, 1 where one failed, 2 where there is no such device or backend.
    """
    try:
        targets, absent = targets_on(device, backend)
    except (ValueError, RuntimeError) as error:
        print(f"fastsample selftest: {error}", file=sys.stderr)
        return 2
    print(f"{table.heading(targets, absent)}\n\n{table.NOTES}\n\n{table.TITLES}")
    results: list[Result] = []
    has: dict[str, frozenset[str]] = {}
    for case in cases(quick):
        has.setdefault(case.op, case.backends)
        for result in results_of(case, targets):
            print(table.row(result), flush=True)
            results.append(result)
    print(f"\n{table.summary(results, has, targets, absent)}")
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(table.row(result), *([f"  {result.failure}"] if result.failure else []), sep="\n")
    return 1 if failed or not results else 0
