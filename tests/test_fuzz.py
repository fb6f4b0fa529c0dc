"""Bad input by the hundred between good requests: no 5xx, no worker restarts, and no good answer changes.

`make soak` runs the long forms: 10,000 bad and 1,000 good requests, and 15 minutes of load with a bound on memory.
"""

import base64
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import hypothesis
import psutil
import pytest
from conftest import bomb, draw_photo, encoded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PREDICT = "/predictions/fastunet"
PHOTOS = [
    encoded(draw_photo(1, (60, 40))),
    encoded(draw_photo(1, (60, 40)), "JPEG"),
    encoded(draw_photo(1, (60, 40)), "JPEG", progressive=True),
    encoded(draw_photo(1, (60, 40)), "WEBP"),
    encoded(draw_photo(1, (60, 40)), "BMP"),
    encoded(draw_photo(1, (60, 40)), "TIFF"),
    encoded(draw_photo(1, (60, 40)), "TIFF", compression="tiff_lzw"),
    encoded(draw_photo(1, (60, 40)), "GIF"),
    encoded(draw_photo(1, (60, 40)).convert("I;16")),
]


def mutate(data: bytes, seed: int) -> bytes:
    """`data` with some bytes changed, cut away or put in; a few photos can still be decoded afterwards."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 6)):
        where = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[where] = rng.randrange(256)
            case 1:
                data[where:where] = rng.randbytes(rng.randrange(40))
            case 2:
                del data[where : where + rng.randint(1, 200)]
            case 3:
                data[where : where + 4] = bytes(4)
        data = data or bytearray(1)
    return bytes(data[: rng.randint(len(data) // 2, len(data))] if rng.random() < 0.5 else data)


mutated = st.builds(mutate, st.sampled_from(PHOTOS), st.integers(0, 2**32))
texts = st.text(max_size=50)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
instances = st.one_of(
    values,
    st.builds(lambda data: {"b64": base64.b64encode(data).decode()}, mutated | st.binary(max_size=100)),
    st.builds(lambda text: {"b64": text}, values),
    st.builds(lambda text: {"data": {"b64": text}}, values),
    st.builds(lambda data: {"b64": base64.b64encode(data).decode()[:-1] + "?"}, st.sampled_from(PHOTOS)),
)
parameters = values | st.fixed_dictionaries({}, optional={"format": values, "size": values, "top": values})
prediction_json = st.fixed_dictionaries({}, optional={"instances": st.lists(instances, max_size=3) | values}).flatmap(
    lambda body: st.builds(lambda p: body | {"parameters": p}, parameters) | st.just(body)
)
content_types = st.sampled_from(
    ["application/json", "image/png", "image/jpeg", "text/plain", "application/octet-stream", "multipart/form-data", ""]
)
raw = st.builds(
    lambda body, kind, accept: {"content": body, "headers": {"content-type": kind, "accept": accept}},
    st.one_of(
        mutated,
        st.binary(max_size=300),
        st.text().map(str.encode),
        st.builds(bomb, st.just(20_000), st.just(20_000)),
        st.sampled_from([b"", b"{", b"[]", b"<html></html>", b'{"instances": NaN}', b"GIF89a", b"\xff\xd8\xff", b"BM"]),
        values.map(json.dumps).map(str.encode),
        prediction_json.map(json.dumps).map(str.encode),
        st.builds(lambda data, n: data[:n], prediction_json.map(json.dumps).map(str.encode), st.integers(1, 200)),
    ),
    content_types,
    st.sampled_from(["*/*", "image/png", "image/jpeg", "application/json", "a/b;q=x,,;", "text/html"]),
)
multipart = st.builds(
    lambda name, data, fields: {"files": {name: data}, "data": fields},
    st.sampled_from(["data", "image", "format", "body", "x"]),
    mutated | st.binary(max_size=100) | st.sampled_from(PHOTOS),
    st.dictionaries(st.sampled_from(["format", "size", "b64", "instances"]), texts.filter(str.isprintable), min_size=1),
)
bad_requests = st.one_of(raw, raw, raw, multipart)


def fuzz(server: str, computing, predict, n: int, seed: int) -> Counter:
    """Send `n` bad requests and a tenth as many good ones, mixed, eight at a time; returns how many got which status.

    Raises:
        AssertionError: a status 5xx, a worker that restarted, or a good answer that is not the mask of `predict`.
    """
    good = [encoded(draw_photo(400 + i)) for i in range(4)]
    expected = [base64.b64encode(predict(data).tobytes()).decode() for data in good]
    before, statuses, at_once = computing(), Counter(), 10

    with httpx.Client(base_url=server, timeout=60) as client, ThreadPoolExecutor(8) as pool:

        def send(request: dict | int) -> None:
            if isinstance(request, int):
                answer = client.post(PREDICT, content=good[request])
                assert answer.status_code == 200 and answer.json()["base64_prediction"] == expected[request]
                statuses["good"] += 1
                return
            answer = client.post(PREDICT, **request)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (answer.status_code, answer.text[:500], request)
            if answer.status_code >= 400:
                assert {"code", "type", "message"} <= set(answer.json()) and "Traceback" not in answer.text

        @settings(
            max_examples=-(-n // at_once),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(bad_requests, min_size=at_once, max_size=at_once))
        def rounds(bad: list[dict]) -> None:
            mixed = [*bad, *(random.randrange(len(good)) for _ in range(at_once // 10))]
            random.shuffle(mixed)
            list(pool.map(send, mixed))

        random.seed(seed)
        hypothesis.seed(seed)(rounds)()
    assert computing() == before, "a worker restarted"
    assert statuses.total() - statuses["good"] >= n and statuses["good"] >= n // 10
    return statuses


def test_hundreds_of_bad_requests(server, computing, predict):
    statuses = fuzz(server, computing, predict, 600, seed=0)
    assert statuses[400] > 300, statuses


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_bad_requests(server, computing, predict):
    start = time.monotonic()
    statuses = fuzz(server, computing, predict, 10_000, seed=1)
    print(f"\n10,000 bad and 1,000 good requests in {time.monotonic() - start:.0f} s: {dict(statuses)}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_stays_within_two_percent(server, computing, predict):
    """15 minutes of load from 8 clients: photos of many sizes and kinds, good and bad, in all formats.

    A process has more and less as requests come and go: what it has at least in minutes 2 to 4, and in the last three,
    is compared.
    """
    photos = [
        encoded(draw_photo(i, (200 + 97 * i % 900, 150 + 61 * i % 700)), f) for i in range(12) for f in ("PNG", "JPEG")
    ]
    fields = [
        {},
        {"format": "png"},
        {"format": "overlay"},
        {"format": "overlay", "size": "original"},
        {"size": "original"},
    ]
    before, statuses, start = computing(), Counter(), time.monotonic()
    photo = photos[0]
    expected = base64.b64encode(predict(photo).tobytes()).decode()
    processes = {pid: psutil.Process(pid) for pid in before}
    processes |= {p.pid: p for p in (processes[min(before)].parent(),) if p.name() == "java"}

    def ask(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=server, timeout=60) as client:
            while time.monotonic() - start < 15 * 60:
                answer = client.post(PREDICT, files={"data": rng.choice(photos)}, data=rng.choice(fields))
                statuses[answer.status_code] += 1
                statuses[client.post(PREDICT, content=rng.choice(photos)[: rng.randrange(3000)]).status_code] += 1
                answer = client.post(PREDICT, content=photo)
                assert answer.status_code == 200 and answer.json()["base64_prediction"] == expected
                statuses[200] += 1

    def resident() -> dict[int, float]:
        return {pid: process.memory_info().rss / 2**20 for pid, process in processes.items()}

    samples = []  # seconds, requests, and MiB by process
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, number) for number in range(8)]
        while not all(client.done() for client in running):
            samples.append((time.monotonic() - start, statuses.total(), resident()))
            time.sleep(2)
        for client in running:
            client.result()
    print(f"\n{dict(statuses)}\nMiB of {', '.join(f'{p.name()} {pid}' for pid, p in processes.items())}, by requests")
    for _, requests, memory in samples[::30] + samples[-1:]:
        print(f"{requests:6}:", *(f"{memory[pid]:7.1f}" for pid in processes))

    def least(pid: int, begin: float, end: float) -> float:
        return min(memory[pid] for seconds, _, memory in samples if begin <= seconds < end)

    early, late = ({pid: least(pid, *minutes) for pid in processes} for minutes in ((60, 240), (720, 900)))
    growth = {pid: late[pid] / early[pid] - 1 for pid in before}
    for pid in processes:
        print(f"{processes[pid].name()}: {early[pid]:.0f} MiB in minutes 2 to 4, {late[pid]:.0f} in the last 3")
    assert set(statuses) <= {200, 400} and computing() == before
    assert max(growth.values()) <= 0.02, growth
