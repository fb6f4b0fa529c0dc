"""What a long call shows in the terminal."""

import contextlib
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def progress(what: str, every: float = 15) -> Iterator[None]:
    """Prints `what`, the seconds gone every now and then, and the time it took."""
    start, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(every):
            print(f"  … {time.monotonic() - start:.0f} s", flush=True)

    print(what, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
    print(f"  done in {time.monotonic() - start:.1f} s", flush=True)
