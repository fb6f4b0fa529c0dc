"""Closed-loop load: each client sends its next request when it has the answer to the one before.

One thread and one kept-alive connection per client. Together with a trivial server they take 0.1 to 0.2 ms of a core
per request (`python -m benchmark.load` measures it).
"""

import socket
import statistics
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import SplitResult, urlsplit

import httptools


def run(
    url: str,
    photos: list[bytes],
    clients: int,
    seconds: float,
    check: Callable[[int, bytes], bool],
    *,
    warm_up: float = 1.0,
    rounds: int = 2,
) -> dict:
    """Load on `url` by `clients` clients that post `photos` in turn: what `summary` makes of the answers.

    Measures for `seconds` after `warm_up`, or longer until every client has had `rounds` answers on average (a slow
    server with many clients), but at most ten times as long. Each photo begins at another place with each client.
    A client that is told to come again (503) does so after as many seconds as `Retry-After` says.
    `check(i, body)` says whether `body` answers photo `i`; equal bodies are checked once.
    """
    done: list[tuple[float, float, int, int, bytes]] = []  # end, duration, photo, status, body
    stop = threading.Event()
    barrier = threading.Barrier(clients + 1)
    threads = [
        threading.Thread(
            target=client, args=(url, photos, n * len(photos) // clients, done, stop, barrier), daemon=True
        )
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    barrier.wait()
    time.sleep(warm_up)
    start, before = time.perf_counter(), len(done)
    while True:
        time.sleep(0.05)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds and (len(done) - before >= rounds * clients or elapsed >= 10 * seconds):
            break
    end = time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    return summary([d for d in done if start <= d[0] < end], end - start, check)


def client(url, photos, first, done, stop, barrier) -> None:
    """One client: posts until `stop`, and writes every answer down in `done`. Status 0 is a broken connection."""
    address = urlsplit(url)
    # TorchServe parses curl's default type as a form
    head = f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/octet-stream\r\n"
    requests = [f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo for photo in photos]
    barrier.wait()
    connection, i = None, first
    while not stop.is_set():
        begin = time.perf_counter()
        try:
            connection = connection or connect(address)
            connection.sendall(requests[i % len(photos)])
            answer = receive(connection)
            status, body, again = answer.status, b"".join(answer.body), answer.again if answer.status == 503 else 0
        except (OSError, httptools.HttpParserError) as error:
            status, body, again = 0, repr(error).encode(), 0.05
        if connection and (not status or answer.closes):
            connection.close()
            connection = None
        end = time.perf_counter()
        done.append((end, end - begin, i % len(photos), status, body))
        i += 1
        stop.wait(again)
    if connection:
        connection.close()


def connect(address: SplitResult) -> socket.socket:
    connection = socket.create_connection((address.hostname, address.port), timeout=120)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Answer:
    """One HTTP response, as its parser tells it: `again` is the number of seconds in `Retry-After`."""

    def __init__(self):
        self.parser, self.body, self.again, self.complete = httptools.HttpResponseParser(self), [], 0.0, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.again = float(value)

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.complete, self.status = True, self.parser.get_status_code()
        self.closes = not self.parser.should_keep_alive()


def receive(connection: socket.socket) -> Answer:
    """The next response on `connection`."""
    answer = Answer()
    while not answer.complete:
        data = connection.recv(2**16)
        if not data:
            raise ConnectionError("the server closed the connection")
        answer.parser.feed_data(data)
    return answer


def summary(answers: list[tuple], seconds: float, check: Callable[[int, bytes], bool]) -> dict:
    """Good answers per second, percentiles of their latency in ms, and how many were refused, errors or wrong masks."""
    verdicts: dict[tuple[int, bytes], bool] = {}
    good, refused, errors, wrong = [], 0, 0, 0
    for _, duration, photo, status, body in answers:
        if status != 200:
            refused, errors = refused + (status == 503), errors + (status != 503)
            continue
        if (photo, body) not in verdicts:
            verdicts[photo, body] = check(photo, body)
        wrong += not verdicts[photo, body]
        good.append(1000 * duration)
    # statistics.quantiles needs two values; a lone answer is all its percentiles
    q = statistics.quantiles(good, n=100, method="inclusive") if len(good) > 1 else (good or [float("nan")]) * 99
    return {
        "rps": round(len(good) / seconds, 3),
        "p50_ms": round(q[49], 2),
        "p95_ms": round(q[94], 2),
        "p99_ms": round(q[98], 2),
        "refused": refused,
        "errors": errors,
        "wrong_masks": wrong,
    }


class Echo(BaseHTTPRequestHandler):
    """Answers every POST at once: what is left to measure is the generator."""

    protocol_version = "HTTP/1.1"
    body = b"x" * 17000  # about the size of an answer for 96 × 128

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.body) + self.body)

    def log_message(self, *args) -> None:
        pass


def main() -> None:
    """Print the rate at which the generator, and this trivial server in the same process, reach their own limit."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    for clients in (1, 8, 32):
        cpu = time.process_time()
        result = run(url, [bytes(40000)] * 8, clients, 3, lambda i, body: body == Echo.body)
        used = (time.process_time() - cpu) / (4 * result["rps"])
        print(f"{clients} clients: {result['rps']:.0f} answers/s, {1e3 * used:.2f} ms of CPU each, server included")
    server.shutdown()


if __name__ == "__main__":
    main()
