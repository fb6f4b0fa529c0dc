"""What a worker of TorchServe reports: metrics, and a line in the log for each request that failed."""

import logging

if __package__:
    from . import protocol
else:  # in the archive, where the files lie side by side
    import protocol

logger = logging.getLogger(__name__)


def observe(context, name: str, value: float) -> None:
    """Add `value` to the histogram `name` on TorchServe's metrics address."""
    from ts.metrics.metric_type_enum import MetricTypes  # there when TorchServe runs this

    context.metrics.add_metric(name, round(value, 6), "count", dimensions=[], metric_type=MetricTypes.HISTOGRAM)


def log_errors(context, i: int, response: protocol.Response, errors: list[protocol.Rejected]) -> None:
    """One line in the log for request `i`, with the stack of a fault of our own; a count per error in the metrics."""
    from ts.metrics.dimension import Dimension

    if errors:
        reasons = ", ".join(sorted({f"{error.type}: {error.message}" for error in errors}))
        fault = next((error.__cause__ for error in errors if error.__cause__), None)
        logger.warning(
            "request %s answered with %d: %s", context.get_request_id(i), response.status, reasons, exc_info=fault
        )
    for error in errors:
        context.metrics.add_counter("rejected_inputs", 1, dimensions=[Dimension("Reason", error.type)])
