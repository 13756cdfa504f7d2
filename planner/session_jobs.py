"""Computations that many callers may wait for: one worker, one computation per question."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from planner.errors import RefusalError
from planner.session_cache import Recent

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

P = TypeVar("P")


@dataclass
class Job(Generic[P]):
    """A computation that callers wait for, and the best that it has come to so far."""

    future: Future[Any] = field(default_factory=Future)
    so_far: P | None = None
    waiting: int = 0


class Jobs(Generic[P]):
    """Answers by question: remembered, or computed once for all who ask.

    Parameters
    ----------
    max_answers
        Answers to remember, least recently used forgotten first.

    """

    def __init__(self, max_answers: int) -> None:
        self.answers: Recent[Hashable, Any] = Recent(max_answers)
        self._jobs: dict[Hashable, Job[P]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="planner-session")

    def close(self) -> None:
        """End the worker once it has finished what it computes; waiting callers get an error."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def join(self, key: Hashable, compute: Callable[[Job[P]], Any]) -> Job[P]:
        """The computation of ``key``: the one under way, one that has just ended, or a new one.

        Raises
        ------
        RefusalError
            When the jobs were closed.

        """
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                job = Job()
                known = self.answers.get(key)
                if known is not None:
                    job.future.set_result(known)
                    return job
                try:
                    job.future = self._pool.submit(self._compute, key, job, compute)
                except RuntimeError:  # the pool's word for it
                    raise RefusalError("the session is closed") from None
                self._jobs[key] = job
            job.waiting += 1
            return job

    def wait(self, key: Hashable, job: Job[P], timeout_s: float | None) -> Any:
        """The job's answer; a job that nobody waits for and that has not begun is dropped.

        Raises
        ------
        concurrent.futures.TimeoutError
            When it is not there in time.
        RefusalError
            When the jobs were closed.

        """
        try:
            return job.future.result(timeout_s)
        except CancelledError:
            raise RefusalError("the session is closed") from None
        finally:
            with self._lock:
                job.waiting -= 1
                if job.waiting == 0 and job.future.cancel() and self._jobs.get(key) is job:
                    del self._jobs[key]

    def known_or(self, key: Hashable, compute: Callable[[Job[P]], Any]) -> Any:
        """The answer to ``key``, however long it takes."""
        known = self.answers.get(key)
        return self.wait(key, self.join(key, compute), None) if known is None else known

    def _compute(self, key: Hashable, job: Job[P], compute: Callable[[Job[P]], Any]) -> Any:
        """Run in the worker: the answer is remembered before anyone can ask anew."""
        try:
            answer = compute(job)
            self.answers.put(key, answer)
            return answer
        finally:
            with self._lock:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
