"""What helps against the service's usual errors."""

ME = "python -m deployment.ai_platform"
QUOTAS = {"T4": "CustomModelServingT4GPUsPerProjectPerRegion", "L4": "CustomModelServingL4GPUsPerProjectPerRegion"}
CALLER = "aiplatform.endpoints.predict,aiplatform.endpoints.get,aiplatform.endpoints.list"


def remedy(
    error: Exception,
    command: str = "",
    project: str = "PROJECT",
    *,
    image: str = "IMAGE",
    location: str = "us-central1",
    accelerator: str | None = None,
    max_replicas: int | None = None,
) -> str:
    """What to do about `error` of `command`, mostly a command of its own; empty where this module has no advice.

    The error's class decides, and its reason, as the service names it in `google.rpc.ErrorInfo`.
    """
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    match error, command:
        case (auth.DefaultCredentialsError() | auth.RefreshError() | exceptions.Unauthenticated(), _):
            return "gcloud auth application-default login"
        case (exceptions.PermissionDenied(), _):
            return permission(error.reason, command, project)
        case (exceptions.TooManyRequests(), "predict"):
            return "again in some minutes: a version with --min-replicas 0 starts, or all replicas are busy"
        case (exceptions.TooManyRequests(), _):
            return more_quota(project, location, accelerator, max_replicas)
        case (exceptions.NotFound(), "upload"):
            return f"gcloud builds submit --config=cloudbuild.yaml --substitutions=_IMAGE={image}"
        case (exceptions.NotFound(), "deploy" | "batch"):
            return f"{ME} upload IMAGE"
        case (exceptions.NotFound(), "predict" | "traffic"):
            return f"{ME} deploy"
        case (exceptions.FailedPrecondition(), "upload"):  # the service takes the image in at once
            repository = image.split("/")[2] if image.count("/") >= 3 else "REPOSITORY"
            return (
                f"gcloud artifacts docker images describe {image}, and where it lies in another project: "
                f"gcloud artifacts repositories add-iam-policy-binding {repository} --location={location} "
                "--member=serviceAccount:service-PROJECT_NUMBER@gcp-sa-aiplatform.iam.gserviceaccount.com "
                "--role=roles/artifactregistry.reader"
            )
        case (exceptions.FailedPrecondition(), "deploy"):
            return (
                f"gcloud logging read resource.type=aiplatform.googleapis.com/Endpoint --limit=50 --project={project}"
            )
        case (exceptions.FailedPrecondition(), "predict"):  # also of an endpoint without a traffic split
            return f"{ME} list, and where no version has traffic: {ME} traffic VERSION=100"
        case (exceptions.DeadlineExceeded(), "predict"):
            return f"a longer --timeout; {ME} list shows whether a replica runs"
        case (exceptions.ServiceUnavailable() | exceptions.DeadlineExceeded(), _):
            return f"check the network and --location, then {ME} list"
    return ""


def permission(reason: str | None, command: str, project: str) -> str:
    """What to do where a call is not permitted, for a `reason` of the service's or for want of a role."""
    match reason:
        case "SERVICE_DISABLED":
            return f"gcloud services enable aiplatform.googleapis.com --project={project}"
        case "BILLING_DISABLED":
            return f"gcloud billing projects link {project} --billing-account=ACCOUNT"
        case "USER_PROJECT_DENIED":
            return f"gcloud auth application-default set-quota-project {project}"
    if command == "predict":  # a caller needs no more than this
        return (
            f"gcloud iam roles create fastunetCaller --project={project} --permissions={CALLER}\n"
            f"       gcloud projects add-iam-policy-binding {project} --member=user:YOU "
            f"--role=projects/{project}/roles/fastunetCaller"
        )
    return f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/aiplatform.user"


def more_quota(project: str, location: str, accelerator: str | None, max_replicas: int | None) -> str:
    """How to get replicas that the quota forbids; it is counted by their largest number, running or not."""
    if accelerator in (None, "none"):
        quota, each = "CustomModelServingCPUsPerProjectPerRegion", 4
    else:
        quota, each = QUOTAS.get(accelerator, "QUOTA"), 1
    found = (
        "" if quota != "QUOTA" else " (gcloud beta quotas info list --service=aiplatform.googleapis.com names QUOTA)"
    )
    return (
        "another --accelerator, --machine or --location, fewer --max-replicas, or ask for more: gcloud beta quotas "
        f"preferences create --service=aiplatform.googleapis.com --project={project} --quota-id={quota} "
        f"--preferred-value={each * (max_replicas or 1)} --dimensions=region={location}{found}"
    )
