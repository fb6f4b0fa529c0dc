"""Host the serving image on Google Cloud AI Platform (today Vertex AI): upload, deploy, predict, scale, clean up.

    python -m deployment.ai_platform upload REGION-docker.pkg.dev/PROJECT/fastunet/serve:1
    python -m deployment.ai_platform deploy --accelerator T4
    python -m deployment.ai_platform predict street.png
    python -m deployment.ai_platform delete

The functions are the commands. They raise the service's own errors (`google.api_core.exceptions`); the command line
knows for the usual ones what helps.
"""

from .client import (
    connect,
    delete,
    deploy,
    find_endpoint,
    get_endpoint,
    mask,
    overview,
    predict,
    request_body,
    traffic,
    upload,
)
from .jobs import batch, batch_results

__all__ = [
    "batch",
    "batch_results",
    "connect",
    "delete",
    "deploy",
    "find_endpoint",
    "get_endpoint",
    "mask",
    "overview",
    "predict",
    "request_body",
    "traffic",
    "upload",
]
