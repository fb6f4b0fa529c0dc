"""The budget for images: who waits, who overtakes, who is refused; and how much memory there is."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT

from deployment import memory
from deployment.memory import MemoryBudget, groups_that_fit, memory_limit, memory_used
from deployment.protocol import Rejected


def test_who_does_not_fit_into_the_budget_waits():
    budget, first, second = MemoryBudget(100), threading.Event(), threading.Event()
    entered = []

    def hold(pixels: int, until: threading.Event) -> None:
        with budget.hold(pixels):
            entered.append(pixels)
            assert until.wait(20)

    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(hold, 60, first), pool.submit(hold, 40, second)]
        wait_until(lambda: len(entered) == 2)  # exactly the limit
        waiting = pool.submit(hold, 50, second)
        time.sleep(0.05)
        assert sorted(entered) == [40, 60]
        first.set()
        wait_until(lambda: len(entered) == 3)
        second.set()
        for future in (*held, waiting):
            future.result()
    assert budget.used == 0


def test_what_will_never_fit_into_the_budget_is_refused_and_what_does_not_in_time_is_told_to_come_again():
    budget = MemoryBudget(100, seconds=0.05)
    with pytest.raises(Rejected) as error, budget.hold(101):
        pass
    assert error.value.status == 507
    with budget.hold(60), pytest.raises(Rejected) as error, budget.hold(41):
        pass
    assert error.value.status == 503 and error.value.headers == {"Retry-After": "1"}
    with budget.hold(100):
        assert budget.used == 100


def test_a_large_image_has_its_turn_before_small_ones_that_came_later():
    budget, entered = MemoryBudget(100), []

    def hold(size: int) -> None:
        with budget.hold(size):
            entered.append(size)

    with ThreadPoolExecutor(2) as pool:
        with budget.hold(50):
            large = pool.submit(hold, 90)
            wait_until(lambda: len(budget.waiting) == 1)
            small = pool.submit(hold, 10)
            wait_until(lambda: len(budget.waiting) == 2)
            assert entered == []
        large.result(), small.result()
    assert entered == [90, 10]


def test_an_error_gives_its_place_in_the_budget_back():
    budget = MemoryBudget(100)
    with pytest.raises(ValueError), budget.hold(80):
        raise ValueError
    with budget.hold(100):
        assert budget.used == 100


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_small_image_overtakes_large_ones_that_wait_until_they_lose_patience(monkeypatch):
    budget, entered = MemoryBudget(100), []

    def hold(size: int) -> None:
        with budget.hold(size):
            entered.append(size)

    for patience, expected in ((60, [5, 90]), (-1, [90, 5])):
        monkeypatch.setattr(memory, "PATIENCE", patience)
        with ThreadPoolExecutor(2) as pool:
            with budget.hold(50):
                large = pool.submit(hold, 90)
                wait_until(lambda: len(budget.waiting) == 1)
                small = pool.submit(hold, 5)
                wait_until(lambda: len(budget.waiting) == 2 or entered)
                time.sleep(0.05)
            large.result(), small.result()
        assert entered == expected
        entered.clear()


def test_requests_that_do_not_fit_together_are_answered_in_groups():
    def groups(*needs: tuple[int, int]) -> list[list[tuple[int, int]]]:
        jobs = [SimpleNamespace(kept=kept, largest=largest) for kept, largest in needs]
        return [[(job.kept, job.largest) for job in group] for group in groups_that_fit(jobs, limit=100)]

    assert groups((0, 60), (0, 60)) == [[(0, 60), (0, 60)]]  # one is decoded after the other
    assert groups((60, 0), (40, 0)) == [[(60, 0), (40, 0)]]
    assert groups((60, 0), (0, 41), (40, 0)) == [[(60, 0)], [(0, 41), (40, 0)]]
    assert groups((0, 60), (30, 0), (20, 0)) == [[(0, 60), (30, 0)], [(20, 0)]]
    assert groups((200, 0), (1, 0)) == [[(200, 0)], [(1, 0)]]  # the first is refused, and it alone


def test_the_memory_limit_is_the_container_s(tmp_path, monkeypatch):
    monkeypatch.delenv("MEMORY_LIMIT", raising=False)
    half = memory_limit(tmp_path)
    assert half == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == half
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")  # none, in version 1
    assert memory_limit(tmp_path) == half
    (tmp_path / "memory/memory.limit_in_bytes").write_text("3000000\n")
    assert memory_limit(tmp_path) == 3_000_000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert memory_limit(tmp_path) == 2_000_000
    for given, limit in (("1000000", 1_000_000), ("4000000", 2_000_000), ("0", 2_000_000), ("1Gi", 2_000_000)):
        monkeypatch.setenv("MEMORY_LIMIT", given)
        assert memory_limit(tmp_path) == limit
    assert 1e6 < memory_used() < 1e11


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_what_is_free_between_blocks_in_use_goes_back_to_the_system():
    script = """
from deployment.memory import give_free_memory_back, memory_used
blocks = [b"x" * 50_000 for _ in range(2000)]
del blocks[::2]
before = memory_used()
give_free_memory_back()
print(before - memory_used())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 30_000_000  # of 50,000,000
