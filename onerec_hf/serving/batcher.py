"""Micro-batches: requests that wait at the same time are searched together, in one worker thread."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .errors import Refused
from .limits import Limits
from .questions import Question


@dataclass(eq=False)
class _Waiting:
    question: Question
    answer: asyncio.Future
    arrived: float


@dataclass(frozen=True)
class Answer:
    """The lists of a question's users, and how they came about: seconds in the queue and in the search, and the rows
    that were searched together.
    """

    lists: list
    waited: float
    searched: float
    batch_rows: int


class MicroBatcher:
    """
    Collects questions while the worker searches, and gives it what may be searched together.

    A batch is the oldest question and others of its kind (`Question.kind`), of similar length first. It starts when
    the worker is free and `max_rows` are there, or the oldest question has waited for `max_wait_ms`.

    Args:
        search: Answers questions of one kind; runs in the worker thread, where all of torch runs.
        limits: `max_rows`, `max_wait_ms`, `max_queue`.
    """

    def __init__(self, search: Callable[[Sequence[Question]], list], limits: Limits):
        self.search, self.limits = search, limits
        self.rows = 0  # that wait
        self.busy_since: float | None = None  # loop time at which the worker began
        self._waiting: dict[int, _Waiting] = {}  # in the order of arrival
        self._changed = asyncio.Event()
        self._closing = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onerec-search")
        self._task: asyncio.Task | None = None

    async def ask(self, question: Question) -> Answer:
        """
        The answer; a caller that is cancelled leaves the queue.

        Raises:
            Refused: 429 where the queue is full, 503 while the service stops. What `search` raises.
        """
        if self._closing:
            raise Refused(503, "draining", "the service is stopping: ask another replica.", retry_after=1)
        if self.rows + question.rows > self.limits.max_queue:
            raise Refused(
                429,
                "queue_full",
                f"{self.rows} histories wait, at most {self.limits.max_queue} may: send the same request again later.",
                retry_after=1,
            )
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():  # or it ended with the event loop of an earlier start
            self._changed = asyncio.Event()
            self._task = loop.create_task(self._run())
        one = _Waiting(question, loop.create_future(), loop.time())
        self._waiting[id(one)] = one
        self.rows += question.rows
        self._changed.set()
        try:
            return await one.answer
        finally:
            self._leave(one)

    def _leave(self, one: _Waiting) -> None:
        if self._waiting.pop(id(one), None) is not None:
            self.rows -= one.question.rows

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or not self._closing:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._company()
            if not (batch := self._take()):
                await asyncio.sleep(0)  # all of them were cancelled, and have yet to leave
                continue
            self.busy_since = start = loop.time()
            questions = [one.question for one in batch]
            answers = await loop.run_in_executor(self._worker, _each, self.search, questions)
            self.busy_since, end = None, loop.time()
            rows = sum(question.rows for question in questions)
            for one, found in zip(batch, answers):
                if one.answer.done():
                    continue  # the client did not wait
                if isinstance(found, Exception):
                    one.answer.set_exception(found)
                else:
                    one.answer.set_result(Answer(found, start - one.arrived, end - start, rows))

    async def _company(self) -> None:
        """Until enough rows wait, or the oldest question has waited long enough."""
        loop = asyncio.get_running_loop()
        while self._waiting and self.rows < self.limits.max_rows and not self._closing:
            oldest = next(iter(self._waiting.values()))
            left = oldest.arrived + self.limits.max_wait_ms / 1000 - loop.time()
            if left <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        """The next batch leaves the queue."""
        waiting = [one for one in self._waiting.values() if not one.answer.done()]
        if not waiting:
            return []
        oldest = waiting[0].question
        fitting = [one for one in waiting if one.question.kind == oldest.kind]
        fitting.sort(key=lambda one: (one.question is not oldest, self._distance(one.question, oldest)))
        batch: list[_Waiting] = []
        rows = 0
        for one in fitting:
            if batch and rows + one.question.rows > self.limits.max_rows:
                continue
            batch.append(one)
            rows += one.question.rows
        for one in batch:
            self._leave(one)
        return batch

    @staticmethod
    def _distance(one: Question, other: Question) -> int:
        return abs(one.length_bucket - other.length_bucket)

    async def close(self) -> None:
        """Answers what waits, then ends."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._worker.shutdown()


def _each(search: Callable[[Sequence[Question]], list], questions: Sequence[Question]) -> list[Any]:
    """Of each question its answer, or the exception: a question that cannot be answered takes no other with it."""
    try:
        return search(questions)
    except Exception as error:
        if len(questions) == 1:
            return [error]
        return [_each(search, [question])[0] for question in questions]


__all__ = ["Answer", "MicroBatcher"]
