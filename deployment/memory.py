"""The memory that images may take, and in what order they get it.

Limits on a single request bound nobody who sends many. So what images take is counted, by their headers, against one
budget of the process, and who does not fit waits.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from .protocol import Rejected, busy

M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
LARGE_BLOCK = 12 * 2**20  # bytes; Pillow has an image in blocks of 16 MB
LEAST_MEMORY = 128 * 2**20  # for images, in bytes: enough for one of 12 megapixels, however little there is
SMALL_PART = 16  # of the memory for images: what takes less of it is small
PATIENCE = 2  # seconds


class MemoryBudget:
    """The memory for images of one process: what does not fit waits for its turn.

    What is small, `is_small`, overtakes what is large, until that has been the first in line for PATIENCE seconds.

    Args:
        limit: in bytes.
        seconds: that one may wait; None: as long as it takes.
    """

    def __init__(self, limit: int, seconds: float | None = 60):
        self.limit, self.seconds, self.used = limit, seconds, 0
        self.waiting: deque[object] = deque()
        self.impatient_at = 0.0  # when nothing overtakes the first any more
        self.changed = threading.Condition()

    def is_small(self, size: int) -> bool:
        return size <= self.limit // SMALL_PART

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Take `size` bytes of the budget until the block ends.

        Raises:
            Rejected: 507 for more than there is at all, 503 where it takes longer than `seconds` to get them.
        """
        if not size:
            yield
            return
        if size > self.limit:
            raise Rejected(HTTPStatus.INSUFFICIENT_STORAGE, "OutOfMemory", "not enough memory for this photo")
        self.take(size)
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()

    def take(self, size: int) -> None:
        turn = object()

        def may_enter() -> bool:
            overtakes = self.is_small(size) and time.monotonic() < self.impatient_at
            return self.used + size <= self.limit and (self.waiting[0] is turn or overtakes)

        with self.changed:
            self.waiting.append(turn)
            self.first_changed(len(self.waiting) == 1)
            try:
                if not self.changed.wait_for(may_enter, self.seconds):
                    raise busy("no memory for this photo at the moment: try again in a second")
                self.used += size
            finally:
                self.first_changed(self.waiting[0] is turn)
                self.waiting.remove(turn)
                self.changed.notify_all()

    def first_changed(self, changed: bool) -> None:
        if changed:
            self.impatient_at = time.monotonic() + PATIENCE


def groups_that_fit(jobs: list, limit: int) -> list[list]:
    """`jobs` in their order, in groups that can be answered together within `limit` bytes: most often one.

    Each says what it takes: `kept` bytes until it is answered, and beside them, for one image after the other, at most
    `largest`.
    """
    groups, kept, largest = [[]], 0, 0
    for job in jobs:
        kept, largest = kept + job.kept, max(largest, job.largest)
        if groups[-1] and kept + largest > limit:
            groups.append([])
            kept, largest = job.kept, job.largest
        groups[-1].append(job)
    return groups


def budget_for_images(share: float) -> MemoryBudget:
    """What is left for images of the `share` of all memory that this process has, beside what it holds already.

    An eighth is for requests that are not read yet.
    """
    left = int(share * memory_limit() * 7 / 8) - memory_used()
    return MemoryBudget(max(left, LEAST_MEMORY))


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes that this process and its children may use.

    That is the container's limit (cgroup v2 or v1), or MEMORY_LIMIT where the system does not show it, the lesser of
    both. Where there is neither, it is half of the machine's memory.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * 2**30
    limits = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            limits.append(int((cgroup / name).read_text()))
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get("MEMORY_LIMIT", "")))
    return min((limit for limit in limits if 0 < limit <= machine), default=machine // 2)


def memory_used() -> int:
    """The resident memory of this process, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_large_blocks_back() -> None:
    """Let the C library return large blocks to the system when they are freed.

    Otherwise it soon keeps blocks of up to 32 MB, an image's among them, for the thread that had them, and at last one
    image for each thread. Smaller blocks it may keep: a network allocates those again and again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def give_free_memory_back() -> None:
    """Let the C library return all memory that is free to the system, which takes a millisecond.

    What lies free between blocks in use it keeps otherwise, and that becomes more with each kind of request.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
