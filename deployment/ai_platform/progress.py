"""What a long call shows in the terminal, and for how long it may last.

Google's SDK sets no time limit on most of its calls: a connection that has died is waited for without end. So every
function here that calls the service has one, `limited`.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")

QUICK = 120  # seconds for calls that ask, and for those that change a field
running: list[tuple[str, str]] = []  # what goes on at Google now, and how to stop it
calling = threading.local()


@contextlib.contextmanager
def progress(what: str, stop: str = "", every: float = 15) -> Iterator[None]:
    """Prints `what`, the seconds gone every now and then, and the time it took.

    `stop` is the command that stops it at Google, where it goes on after Ctrl-C.
    """
    start, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            print(f"  … {time.monotonic() - start:.0f} s", flush=True)

    print(what, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    running.append((what, stop))
    try:
        yield
    finally:
        ended.set()
        running.remove((what, stop))
    print(f"  done in {time.monotonic() - start:.1f} s", flush=True)


def limited(seconds: float) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A decorator: the function may last `seconds`; it runs in a thread, since the SDK itself cannot be interrupted.

    Ctrl-C and the end of the time end the waiting, not what goes on at Google; both say what that is.

    Raises:
        google.api_core.exceptions.DeadlineExceeded: the time is over.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            if getattr(calling, "limited", False):  # called by a function that is limited itself
                return function(*args, **kwargs)
            outcome: list = []

            def work() -> None:
                calling.limited = True
                try:
                    outcome.append((function(*args, **kwargs), None))
                except BaseException as error:
                    outcome.append((None, error))

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            try:
                thread.join(seconds)
            except KeyboardInterrupt:
                print(f"\nno longer waited for{still_running()}", flush=True)
                raise
            if not outcome:
                from google.api_core.exceptions import DeadlineExceeded

                raise DeadlineExceeded(f"{function.__name__} took more than {seconds:g} s{still_running()}")
            result, error = outcome[0]
            if error is not None:
                raise error
            return result

        return call

    return decorate


def still_running() -> str:
    """What goes on at Google, as the end of a sentence."""
    if not running:
        return ""
    what, stop = running[-1]
    return f"; this goes on at Google: {what}" + (f"\n  to stop it: {stop}" if stop else "")
