"""Host the serving image on Google Cloud: upload, deploy, predict, scale, clean up.

The service is Vertex AI, now Gemini Enterprise Agent Platform; here it is called AI Platform throughout.

    python -m deployment.ai_platform upload REGION-docker.pkg.dev/PROJECT/fastunet/serve:1
    python -m deployment.ai_platform deploy
    python -m deployment.ai_platform predict street.png
    python -m deployment.ai_platform delete

The functions are the commands. They raise the service's own errors (`google.api_core.exceptions`); the command line
knows for the usual ones what helps.
"""

from .cleanup import delete, left_over
from .client import connect, find_endpoint, find_endpoints, get_endpoint, get_model, overview, traffic, upload
from .deployments import deploy
from .jobs import batch
from .online import mask, predict, predict_raw, request_body
from .results import batch_results, error_in, named

__all__ = [
    "batch",
    "batch_results",
    "connect",
    "delete",
    "deploy",
    "error_in",
    "find_endpoint",
    "find_endpoints",
    "get_endpoint",
    "get_model",
    "left_over",
    "mask",
    "named",
    "overview",
    "predict",
    "predict_raw",
    "request_body",
    "traffic",
    "upload",
]
