"""The command line: `python -m deployment.ai_platform COMMAND`; `--help` lists the commands."""

import argparse
import base64
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import batch, connect, delete, deploy, overview, predict, traffic, upload
from .client import ACCELERATORS


def remedy(error: Exception, project: str = "PROJECT", image: str = "IMAGE") -> str:
    """What to do about `error`, mostly a command; empty where this module has no advice."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    text = str(error)
    match error:
        case auth.DefaultCredentialsError() | auth.RefreshError() | exceptions.Unauthenticated():
            return "gcloud auth application-default login"
        case exceptions.PermissionDenied() if "SERVICE_DISABLED" in text or "has not been used" in text:
            return f"gcloud services enable aiplatform.googleapis.com --project={project}"
        case exceptions.PermissionDenied():
            return f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/aiplatform.user"
        case exceptions.ResourceExhausted():
            return (
                "another --accelerator or --location, or ask for more: gcloud beta quotas preferences create "
                f"--service=aiplatform.googleapis.com --project={project} --preferred-value=1 --quota-id=QUOTA "
                "--dimensions=region=LOCATION (QUOTA such as CustomModelServingT4GPUsPerProjectPerRegion)"
            )
        case exceptions.NotFound() if "mage" in text:
            return f"gcloud builds submit --config=cloudbuild.yaml --substitutions=_IMAGE={image}"
        case exceptions.NotFound() if "odel" in text:
            return "python -m deployment.ai_platform upload IMAGE"
        case exceptions.NotFound() if "ndpoint" in text:
            return "python -m deployment.ai_platform deploy"
        case exceptions.FailedPrecondition() if "server" in text:
            return (
                f"gcloud logging read resource.type=aiplatform.googleapis.com/Endpoint --limit=50 --project={project}"
            )
        case exceptions.ServiceUnavailable():
            return "check the network and --location, then try again"
    return ""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    show = argparse.ArgumentDefaultsHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="fastunet", help="name of the model and of the endpoint")
    common.add_argument("--project", help="Google Cloud project (default: the credentials' own)")
    common.add_argument("--location", help="region, such as us-central1 or europe-west4")
    common.add_argument("--api-endpoint", help="another address of the API, such as a private one")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--version", help="version or alias of the model (default: the newest)")
    machines.add_argument("--accelerator", choices=ACCELERATORS, default="none", help="GPU of each replica")
    machines.add_argument("--machine", help="machine type (default: one that carries the accelerator)")
    machines.add_argument("--max-replicas", type=int, default=1, help="grow to so many machines")

    parser = argparse.ArgumentParser(
        prog="python -m deployment.ai_platform",
        description="Host the serving image on Google Cloud AI Platform (today Vertex AI).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common, *parents], formatter_class=show)

    p = command("upload", "register an image as the model's newest version")
    p.add_argument("image", help="REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG")
    p.add_argument("--artifacts", help="gs:// folder with the archive, for an image that holds none")

    p = command("deploy", "put a version behind the endpoint; make the endpoint where there is none", machines)
    p.add_argument("--min-replicas", type=int, default=1, help="never fewer machines than this; each costs all day")
    p.add_argument("--target", type=int, default=60, help="percent of GPU (or CPU) use that adds a machine")
    p.add_argument("--share", type=int, help="percent of the traffic (default: 100 on a new endpoint, else 0)")
    p.add_argument("--dedicated", action="store_true", help="requests of up to 10 MB, on an address of their own")
    p.add_argument("--log-to", metavar="bq://PROJECT.DATASET.TABLE", help="log requests and answers to BigQuery")
    p.add_argument("--log-rate", type=float, default=1.0, help="part of the requests to log, 0 to 1")

    p = command("predict", "send image files; print the answers, of masks the share of each class, or write pictures")
    p.add_argument("images", nargs="+", type=Path)
    p.add_argument("--format", choices=["png", "overlay"], help="write masks (.png) or overlays (.jpg) to --out")
    p.add_argument("--size", choices=["original"], help="masks at the photos' own size")
    p.add_argument("--top", type=int, help="only so many probabilities, the highest (classification, multi-label)")
    p.add_argument("--out", type=Path, default=".", help="folder for the pictures")

    p = command("batch", "predict many images by a job, from and to Cloud Storage", machines)
    p.add_argument("source", nargs="+", help='image files, or gs:// files of {"b64": …} lines')
    p.add_argument("--to", required=True, metavar="gs://BUCKET/FOLDER", help="where the results go")

    p = command("traffic", "split the traffic between deployed versions: 1=90 2=10 (canary), 1=100 (roll back)")
    p.add_argument("shares", nargs="+", metavar="VERSION=PERCENT")
    p.add_argument("--undeploy", action="store_true", help="undeploy the versions that get none: they cost money")

    command("list", "show versions, deployments, traffic and jobs")
    command("delete", "delete the endpoint, the jobs and the model; costs end here")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    common = {"command", "project", "location", "api_endpoint"}
    options = {key: value for key, value in vars(args).items() if key not in common and value is not None}
    match args.command:
        case "upload":
            model = upload(**options)
            print(f"{model.resource_name} version {model.version_id}")
        case "deploy":
            print(deploy(**options).resource_name)
        case "predict":
            images, out = options.pop("images"), options.pop("out")
            answers = predict(images, **options)
            for path, answer in zip(images, answers, strict=True):
                kind = next((k for k in ("png", "jpeg") if k in answer), None)
                if kind:
                    target = out / f"{path.stem}.{'png' if kind == 'png' else 'jpg'}"
                    write(target, base64.b64decode(answer[kind]))
                print(json.dumps({"file": str(path)} | ({"written": str(target)} if kind else shown(answer))))
            if all("error" in answer for answer in answers):
                sys.exit(1)
        case "batch":
            print(batch(destination=options.pop("to"), **options))
        case "traffic":
            shares = dict(share.split("=") for share in options.pop("shares"))
            traffic({version: int(percent) for version, percent in shares.items()}, **options)
            print(overview(args.name))
        case "list":
            print(overview(args.name))
        case "delete":
            deleted = delete(args.name)
            print("\n".join(f"deleted {d}" for d in deleted) or f"nothing was left of {args.name}")


def shown(answer: dict) -> dict:
    """An answer without its long field."""
    return {key: value for key, value in answer.items() if key != "base64_prediction"}


def write(path: Path, data: bytes) -> None:
    """Writes `data` so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError

    try:
        connect(args.project, args.location, args.api_endpoint)
        run(args)
    except (GoogleAPICallError, GoogleAuthError, ValueError, OSError, RuntimeError) as e:
        advice = remedy(e, args.project or "PROJECT", getattr(args, "image", "IMAGE"))
        message = " ".join(str(getattr(e, "message", e)).split())
        sys.exit(f"error: {message}" + (f"\n  try: {advice}" if advice else ""))


if __name__ == "__main__":
    main()
