"""benchmark/cost.py: sums that can be done by hand, and what it says without a GPU's figure."""

import pytest

from benchmark import cost


def test_the_sums():
    torchserve, uvicorn, _, _, bulk, batch, run, small = cost.ways(50.0, 100.0, 25.0, None, None)
    hours = 1e6 / 100 / 3600
    assert uvicorn.per_million() == pytest.approx(hours * 0.1117) == torchserve.per_million() / 2
    assert uvicorn.per_million(0.1) == pytest.approx(10 * hours * 0.1117)  # it is paid for all day
    assert batch.per_million(0.1) == batch.per_million() == pytest.approx(hours * 0.1117)
    assert bulk.per_million(0.1) == pytest.approx(4 * hours * 0.0971)
    assert run.per_million() == pytest.approx(2e4 * (2 * 0.000024 + 4 * 0.0000025) + 0.40)
    assert small.per_million() == pytest.approx(1e4 * (2 * 0.000024 + 1 * 0.0000025) + 0.40)


def test_rates_come_from_what_was_measured():
    rows = {"openvino-int8": {"1": {"rps": 40.0}, "8": {"rps": 56.0}, "12 MP": {"rps": 99.0}}, "eager": {}}
    assert cost.cpu_rate({"rows": rows}, "openvino-int8") == 56.0
    assert cost.cpu_rate({"rows": rows}, "uvicorn-int8") is None and cost.cpu_rate({}, "openvino-int8") is None
    measured = {"answers/s over HTTP": {"uvicorn": {"1": 90.0}, "torchserve": {"1": 80.0, "32": 400.0}}}
    for name, card in [("Tesla T4", "T4"), ("NVIDIA L4", "L4")]:
        assert cost.gpu_rate({name: measured}, card) == 400.0
    assert cost.gpu_rate({"NVIDIA L40": measured, "NVIDIA H100": measured}, "L4") is None


def test_what_was_not_measured_is_said():
    text = cost.table(cost.ways(50.0, 50.0, None, None, None))
    assert text.count("not measured") == 3 and "endpoint, T4" in text
