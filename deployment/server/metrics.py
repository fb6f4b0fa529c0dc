"""What our own server counts for Prometheus, under the names and labels that TorchServe gives it."""

from prometheus_client import Counter, Gauge, Histogram

from ..protocol import Rejected

LABELS = ("ModelName", "Level")
STEPS = {
    step: Histogram(f"{step}_seconds", "Of a request, in this step", LABELS)
    for step in ("preprocess", "inference", "postprocess")
}
REQUESTS = Counter("ts_inference_requests_total", "Requests for predictions that were let in", LABELS)
BATCH_REQUESTS = Histogram("batch_requests", "Requests that are computed as one: always 1 here", LABELS)
BATCH_PHOTOS = Histogram("batch_photos", "Images in a request", LABELS)
# A gauge, because a counter would be called rejected_inputs_total.
REJECTED = Gauge("rejected_inputs", "Requests, or images of a request, that got an error", ("Reason", *LABELS))


def count_request(model: str) -> None:
    """A request that was let in."""
    REQUESTS.labels(model, "Model").inc()


def observe_answer(model: str, seconds: list[float], images: int) -> None:
    """A request of `images` that took so many seconds in each of the three steps."""
    for histogram, value in zip(STEPS.values(), seconds, strict=True):
        histogram.labels(model, "Model").observe(value)
    BATCH_REQUESTS.labels(model, "Model").observe(1)
    BATCH_PHOTOS.labels(model, "Model").observe(images)


def count_errors(model: str, errors: list[Rejected]) -> None:
    """Errors of requests, or of images in them, by their type."""
    for error in errors:
        REJECTED.labels(error.type, model, "Model").inc()
