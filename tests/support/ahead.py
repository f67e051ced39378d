"""Work of other processes that begins before the tests that wait for it: the tests themselves keep one core busy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
TESTS = Path(__file__).parents[1]

# Whatever a test has put into its own when a job begins.
ENVIRONMENT = dict(os.environ)


def _step_back() -> None:
    """The tests have the cores that they use. On Linux a thread has a priority, which its processes inherit."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


_pool = ThreadPoolExecutor(1, initializer=_step_back)
_begun: list[Future[object]] = []


class Ahead(Generic[T]):
    """A job whose result tests share, as a decorator of the function that does it; jobs run one after the other.

    `@pytest.mark.ahead(job)` begins it once all tests are collected, in their order; without that, `result` does. A job
    may not wait for another.
    """

    def __init__(self, job: Callable[[], T]) -> None:
        self._job = job
        self._future: Future[T] | None = None

    def begin(self) -> None:
        if self._future is None:
            self._future = _pool.submit(self._job)
            _begun.append(self._future)

    def result(self) -> T:
        """What the job returned; what it raised is raised again, a skip too."""
        self.begin()
        assert self._future is not None
        return self._future.result()


def in_a_process(*words: str, cwd: Path) -> None:
    """Runs `python words` with one thread, and with the tests' own modules. Asserts that it succeeds."""
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    run = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def wait() -> None:
    """Until nothing runs that a test has not asked for: it would count as the test's own."""
    for future in _begun:
        future.exception()


def stop() -> None:
    """Nothing begins any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
