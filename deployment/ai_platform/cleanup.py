"""Deleting all that has a name, in the right order, and saying what stays."""

import contextlib
import shlex
import time
from typing import TYPE_CHECKING

from . import jobs
from .client import find_endpoint, find_endpoints, known_endpoints, place
from .progress import QUICK, limited, progress

if TYPE_CHECKING:
    from google.cloud import aiplatform


@limited(3600)
def delete(name: str = "fastunet", every_endpoint: bool = False) -> list[str]:
    """Deletes the endpoint with all that is deployed to it, the batch jobs, and the model with all its versions.

    Jobs that run are cancelled first: the service deletes no running job. Returns the names of what it deleted; none
    where nothing was left. What is in other regions stays, and so does what `left_over` lists.

    Raises:
        ValueError: several endpoints have the name, and `every_endpoint` does not say that all are meant. Nothing is
            deleted then.
    """
    from google.api_core import exceptions
    from google.cloud import aiplatform

    known_endpoints.pop(name, None)
    endpoints = find_endpoints(name) if every_endpoint else [find_endpoint(name)]
    resources = [*filter(None, endpoints), *aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"')]
    with contextlib.suppress(exceptions.NotFound):
        resources.append(aiplatform.Model(name))
    deleted = []
    for resource in resources:
        with progress(f"deleting {resource.resource_name}"), contextlib.suppress(exceptions.NotFound):
            if isinstance(resource, aiplatform.BatchPredictionJob):
                cancel(resource)
            resource.delete(**({"force": True} if isinstance(resource, aiplatform.Endpoint) else {}))
            deleted.append(resource.resource_name)
    return deleted


def cancel(job: "aiplatform.BatchPredictionJob") -> None:
    """Cancels a job that still runs, and waits until it has ended, which it does soon."""
    if job.state.name in jobs.ENDED:
        return
    job.cancel()
    while job.state.name not in jobs.ENDED:
        time.sleep(jobs.WAIT / 5)


@limited(QUICK)
def left_over(name: str = "fastunet") -> list[str]:
    """The commands that remove what `delete` leaves, and what costs cents a month; call it before `delete`.

    Images and folders are those of the model's versions and jobs, but for the files that a job was given; bucket and
    repository of a build are named as Google names them.
    """
    from google.api_core import exceptions
    from google.cloud import aiplatform

    project, location = place()
    images, folders = set(), set()
    with contextlib.suppress(exceptions.NotFound):
        for version in aiplatform.Model(name).versioning_registry.list_versions():
            model = aiplatform.Model(name, version=version.version_id)
            images.add(model.container_spec.image_uri)
            folders.add(model.uri)
    for job in aiplatform.BatchPredictionJob.list(filter=f'display_name="{name}"'):
        folders.add(job.output_info.gcs_output_directory if job.output_info else "")
        made = job.gca_resource
        destination = made.output_config.gcs_destination.output_uri_prefix
        folders.update(uri for uri in made.input_config.gcs_source.uris if jobs.is_written(uri, destination))
    commands = [f"gcloud artifacts docker images delete {image} --delete-tags" for image in sorted(images)]
    commands += [f"gcloud storage rm --recursive {shlex.quote(folder)}" for folder in sorted(filter(None, folders))]
    repositories = {tuple(image.split("/")[:3]) for image in images if image.count("/") >= 3}
    commands += [
        f"gcloud artifacts repositories delete {repository} --location={host.removesuffix('-docker.pkg.dev')} "
        f"--project={owner}  # the whole repository"
        for host, owner, repository in sorted(repositories)
    ]
    commands.append(f"gcloud storage rm --recursive gs://{project}_cloudbuild  # what `gcloud builds submit` sent")
    return commands
