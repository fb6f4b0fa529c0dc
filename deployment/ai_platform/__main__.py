"""The command line: `python -m deployment.ai_platform COMMAND`; `--help` lists the commands."""

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import batch, batch_results, connect, delete, deploy, error_in, overview, predict, traffic, upload
from .client import ACCELERATORS
from .jobs import MAX_PIXELS


def remedy(error: Exception, command: str = "", project: str = "PROJECT", image: str = "IMAGE") -> str:
    """What to do about `error` of `command`, mostly a command of its own; empty where this module has no advice.

    The error's class decides, and its reason, as the service names it in `google.rpc.ErrorInfo`.
    """
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    me = "python -m deployment.ai_platform"
    match error, command:
        case (auth.DefaultCredentialsError() | auth.RefreshError() | exceptions.Unauthenticated(), _):
            return "gcloud auth application-default login"
        case (exceptions.PermissionDenied(reason="SERVICE_DISABLED"), _):
            return f"gcloud services enable aiplatform.googleapis.com --project={project}"
        case (exceptions.PermissionDenied(reason="BILLING_DISABLED"), _):
            return f"gcloud billing projects link {project} --billing-account=ACCOUNT"
        case (exceptions.PermissionDenied(), _):
            return f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/aiplatform.user"
        case (exceptions.TooManyRequests(), "predict"):
            return "again in some minutes: a version with --min-replicas 0 starts, or all replicas are busy"
        case (exceptions.TooManyRequests(), _):
            return (
                "another --accelerator or --location, or ask for more: gcloud beta quotas preferences create "
                f"--service=aiplatform.googleapis.com --project={project} --preferred-value=1 --quota-id=QUOTA "
                "--dimensions=region=LOCATION (QUOTA such as CustomModelServingT4GPUsPerProjectPerRegion)"
            )
        case (exceptions.NotFound(), "upload"):
            return f"gcloud builds submit --config=cloudbuild.yaml --substitutions=_IMAGE={image}"
        case (exceptions.NotFound(), "deploy" | "batch"):
            return f"{me} upload IMAGE"
        case (exceptions.NotFound(), "predict" | "traffic"):
            return f"{me} deploy"
        case (exceptions.FailedPrecondition(), "deploy"):
            return (
                f"gcloud logging read resource.type=aiplatform.googleapis.com/Endpoint --limit=50 --project={project}"
            )
        case (exceptions.FailedPrecondition(), "predict"):
            return f"{me} list"
        case (exceptions.ServiceUnavailable(), _):
            return "check the network and --location, then try again"
    return ""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's own, which adds the default to each option, but for options that have none, or name it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.default in (None, False) or "(default:" in (action.help or "")
        return action.help if named else super()._get_help_string(action)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="fastunet", help="name of the model and of the endpoint")
    common.add_argument("--project", help="Google Cloud project (default: the credentials' own)")
    common.add_argument("--location", help="region, such as us-central1 or europe-west4")
    common.add_argument("--api-endpoint", help="another address of the API, such as a private one")
    common.add_argument("--verbose", action="store_true", help="show what Google's SDK says of each step")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--version", help="version or alias of the model (default: the newest)")
    machines.add_argument("--accelerator", choices=ACCELERATORS, default="none", help="GPU of each replica")
    machines.add_argument("--machine", help="machine type (default: one that carries the accelerator)")
    answers = argparse.ArgumentParser(add_help=False)
    answers.add_argument("--format", choices=["png", "overlay"], help="write masks (.png) or overlays (.jpg) to --out")
    answers.add_argument("--size", choices=["original"], help="masks at the photos' own size")
    answers.add_argument("--top", type=int, help="only so many probabilities, the highest")
    answers.add_argument("--out", type=Path, default=".", help="folder for the pictures")

    about = "Host the serving image on Google Cloud: Vertex AI, now Gemini Enterprise Agent Platform."
    parser = argparse.ArgumentParser(prog="python -m deployment.ai_platform", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common, *parents], formatter_class=Help)

    p = command("upload", "register an image as the model's newest version")
    p.add_argument("image", help="REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG")
    p.add_argument("--artifacts", help="gs:// folder with the archive, for an image that holds none")
    p.add_argument("--torch-backend", default="cpu", help="that the image was built with; deploy warns by it")

    p = command("deploy", "put a version behind the endpoint; make the endpoint where there is none", machines)
    kept = "(default: as it is deployed, else"
    p.add_argument("--min-replicas", type=int, help=f"each costs all day; 0: a preview, none in idle hours {kept} 1)")
    p.add_argument("--max-replicas", type=int, help=f"grow to so many machines {kept} 1)")
    p.add_argument("--target", type=int, help=f"percent of GPU (or CPU) use that adds a machine {kept} 60)")
    p.add_argument("--share", type=int, help="percent of the traffic (default: 100 on a new endpoint, else 0)")
    p.add_argument("--shared", action="store_true", help="a shared endpoint: 1.5 MB a request; dedicated: 10 MB")
    p.add_argument("--spot", action="store_true", help="Spot machines: cheaper, and may be taken away at any time")
    p.add_argument("--log-to", metavar="bq://PROJECT.DATASET.TABLE", help="log requests and answers to BigQuery")
    p.add_argument("--log-rate", type=float, default=1.0, help="part of the requests to log, 0 to 1")

    p = command("predict", "send image files; print the answers, or write pictures", answers)
    p.add_argument("images", nargs="+", type=Path)

    p = command("batch", "predict many images by a job, from and to Cloud Storage", machines, answers)
    p.add_argument("source", nargs="+", help='image files, or gs:// files of {"b64": …} lines')
    p.add_argument("--to", required=True, metavar="gs://BUCKET/FOLDER", help="where the results go")
    p.add_argument("--max-replicas", type=int, default=1, help="grow to so many machines")
    p.add_argument("--batch-size", type=int, help="photos in one request (default: as many as the server takes)")
    p.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="of one request, as the model's configuration")

    p = command("traffic", "split the traffic between deployed versions: 1=90 2=10 (canary), 1=100 (roll back)")
    p.add_argument("shares", nargs="+", metavar="VERSION=PERCENT")
    p.add_argument("--undeploy", action="store_true", help="undeploy the versions that get none: they cost money")

    command("list", "show versions, deployments, traffic and jobs")
    command("delete", "delete the endpoint, the jobs and the model; costs end here")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    common = {"command", "project", "location", "api_endpoint", "verbose"}
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
            rows = ({"prediction": answer} for answer in answers)
            report(zip(map(str, images), rows, strict=True), out)
        case "batch":
            out, folder = options.pop("out"), batch(destination=options.pop("to"), **options)
            print(folder)
            rows = enumerate(batch_results(folder), 1)
            report(((row["instance"].get("name", f"row-{n:06}"), row) for n, row in rows), out)
        case "traffic":
            shares = dict(share.split("=") for share in options.pop("shares"))
            traffic({version: int(percent) for version, percent in shares.items()}, **options)
            print(overview(args.name))
        case "list":
            print(overview(args.name))
        case "delete":
            deleted = delete(args.name)
            print("\n".join(f"deleted {d}" for d in deleted) or f"nothing was left of {args.name}")


def report(rows: Iterable[tuple[str, dict]], out: Path) -> None:
    """Prints a line of JSON for each named row, writes the pictures in them to `out`, and counts the photos.

    Exits with status 1 where a photo got no answer.
    """
    written, failed, n = set(), 0, 0
    for n, (name, row) in enumerate(rows, 1):
        if error := error_in(row):
            failed += 1
            print(json.dumps({"file": name, "error": error}))
            continue
        answer = row["prediction"]
        shown = {key: value for key, value in answer.items() if key not in ("base64_prediction", "png", "jpeg")}
        if kind := next((kind for kind in ("png", "jpeg") if kind in answer), None):
            target = out / f"{Path(name).stem}.{'png' if kind == 'png' else 'jpg'}"
            if target in written:  # of photos that share a name but not a folder
                target = target.with_name(f"{target.stem}-{n}{target.suffix}")
            written.add(target)
            write(target, base64.b64decode(answer[kind]))
            shown = {"written": str(target)} | shown
        print(json.dumps({"file": name} | shown))
    if failed:
        sys.exit(f'error: {failed} of {n} photo(s) got no answer; the lines with "error" say why')
    print(f"{n} photo(s) answered", file=sys.stderr)


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
        connect(args.project, args.location, args.api_endpoint, args.verbose)
        run(args)
    except (GoogleAPICallError, GoogleAuthError, ValueError, OSError, RuntimeError) as e:
        advice = remedy(e, args.command, args.project or "PROJECT", getattr(args, "image", "IMAGE"))
        message = " ".join(str(getattr(e, "message", e)).split())
        sys.exit(f"error: {message}" + (f"\n  try: {advice}" if advice else ""))


if __name__ == "__main__":
    main()
