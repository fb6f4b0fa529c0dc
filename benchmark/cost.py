"""What photos cost on Google Cloud: `python -m benchmark.cost` prints it, of measured rates and the prices below.

The rates of the CPU are the best in results.json that int8 reached on two cores, on the processor named there, and
stand for machines of two vCPUs: n2 has VNNI, n1 has not. That of bulk is in bulk_results.json. Those of the GPUs are in
gpu_results.json, where `benchmark.gpu` ran on such a card.
"""

import json
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# List prices in us-central1, in US dollars, without any discount; as copies of the price lists had them on that day,
# the newest of June 2026. Compare them with the pages named below before you count on them.
PRICES_OF = "2026-11-24"
HOURLY = {  # https://cloud.google.com/vertex-ai/pricing, custom-trained models, online and batch
    "n1-standard-2": 0.1095,
    "n1-standard-4": 0.2190,
    "n2-standard-2": 0.1117,  # Compute Engine's 0.0971, plus the 15 % that the service adds to n1 and e2 too
    "n2-standard-2, Compute Engine": 0.0971,
    "T4": 0.4025,  # on top of its machine
    "g2-standard-4": 0.8129,  # with its L4
}
# https://cloud.google.com/run/pricing, billed by request
CLOUD_RUN = {"vCPU second": 0.000024, "GiB second": 0.0000025, "million requests": 0.40}
BATCH_START = 10  # minutes that a batch job's machine runs before the first photo


@dataclass
class Way:
    """One way to serve: what an hour of it costs in dollars, and how many photos per second it answers at best."""

    name: str
    hourly: float
    rate: float | None  # None: not measured
    runs_all_day: bool = True  # and is paid for then; otherwise while it computes
    extra: float = 0.0  # dollars per million photos

    def per_million(self, use: float = 1.0) -> float:
        """Dollars for a million photos, where the machine is busy for the share `use` of the time it is paid for."""
        return 1e6 / self.rate / 3600 * self.hourly / (use if self.runs_all_day else 1.0) + self.extra


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def cpu_rate(results: dict, server: str) -> float | None:
    """The most answers per second with int8 on that server: openvino-int8 is TorchServe, uvicorn-int8 uvicorn."""
    loads = results.get("rows", {}).get(server, {}).items()
    return max((row["rps"] for load, row in loads if load.isdigit()), default=None)


def gpu_rate(results: dict, card: str) -> float | None:
    """The most answers per second over HTTP on a card of that name."""
    servers = [row["answers/s over HTTP"] for name, row in results.items() if card in name.split()[-1].split("-")]
    return max((rate for server in servers for rates in server.values() for rate in rates.values()), default=None)


def cloud_run(gibibytes: float) -> float:
    """Dollars an hour for two vCPUs and that much memory."""
    return 3600 * (2 * CLOUD_RUN["vCPU second"] + gibibytes * CLOUD_RUN["GiB second"])


def ways(
    torchserve: float | None, uvicorn: float | None, bulk: float | None, t4: float | None, l4: float | None
) -> list[Way]:
    """All ways there are.

    `torchserve` and `uvicorn` are rates of int8 on a CPU: of the default image, and of that with OpenVINO alone; `bulk`
    is that of `deployment.bulk`.
    """
    n2, requests = HOURLY["n2-standard-2"], CLOUD_RUN["million requests"]
    return [
        Way("endpoint, n2-standard-2, TorchServe image", n2, torchserve),
        Way("endpoint, n2-standard-2, OpenVINO image", n2, uvicorn),
        Way("endpoint, T4 (n1-standard-4)", HOURLY["n1-standard-4"] + HOURLY["T4"], t4),
        Way("endpoint, L4 (g2-standard-4)", HOURLY["g2-standard-4"], l4),
        Way("bulk, n2-standard-2, one machine or many", HOURLY["n2-standard-2, Compute Engine"], bulk, False),
        Way("batch job, n2-standard-2, OpenVINO image", n2, uvicorn, False),
        Way("Cloud Run, 2 vCPU, 4 GiB, TorchServe image", cloud_run(4), torchserve, False, requests),
        Way("Cloud Run, 2 vCPU, 1 GiB, OpenVINO image", cloud_run(1), uvicorn, False, requests),
    ]


def table(rows: list[Way]) -> str:
    lines = [
        "| | $ per hour | photos/s | $ per 1,000 | $ per million | per million, busy 10 % of the day |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way in rows:
        cells = ["not measured"] + ["–"] * 3
        if way.rate:
            full, tenth = way.per_million(), way.per_million(0.1)
            cells = [f"{way.rate:.0f}", f"{full / 1000:.4f}", f"{full:.2f}", f"{tenth:.2f}"]
        lines.append(f"| {way.name} | {way.hourly:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    gpus, cpu = read(HERE / "gpu_results.json"), read(HERE / "results.json")
    rates = [cpu_rate(cpu, server) for server in ("openvino-int8", "uvicorn-int8")]
    bulk = read(HERE / "bulk_results.json").get("small", {}).get("bulk", {}).get("rate")
    print(table(ways(*rates, bulk, gpu_rate(gpus, "T4"), gpu_rate(gpus, "L4"))))
    print(f"\nCPU rates measured on: {cpu.get('machine', 'nothing yet, run `make bench`')}.")
    print(
        f"\nList prices of {PRICES_OF}, us-central1, for machines that are fully busy; an endpoint costs all day, "
        f"the others while they compute.\nA batch job also pays for some {BATCH_START} minutes until its first photo: "
        f"${BATCH_START / 60 * HOURLY['n2-standard-2']:.3f}. Storage and traffic are left out."
    )


if __name__ == "__main__":
    main()
