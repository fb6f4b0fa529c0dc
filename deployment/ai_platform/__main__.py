"""The command line: `python -m deployment.ai_platform COMMAND`; `--help` lists the commands."""

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import (
    batch,
    batch_results,
    connect,
    delete,
    deploy,
    error_in,
    left_over,
    named,
    overview,
    predict,
    predict_raw,
    traffic,
    upload,
)
from .advice import remedy
from .client import ACCELERATORS, place
from .deployments import METRICS
from .jobs import MAX_PIXELS
from .online import TIMEOUT


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's own, which adds the default to each option, but for options that have none, or name it themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = action.default in (None, False) or "(default:" in (action.help or "")
        return action.help if named else super()._get_help_string(action)


def key_values(text: str) -> dict[str, str]:
    """`KEY=VALUE,KEY=VALUE` as a dictionary, for argparse."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(key and equals for key, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE,…")
    return {key: value for key, _, value in pairs}


def version_share(text: str) -> tuple[str, int]:
    """`VERSION=PERCENT`, for argparse."""
    version, _, percent = text.partition("=")
    if not version or not percent.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not VERSION=PERCENT, such as 2=10")
    return version, int(percent)


def shared_options() -> tuple[argparse.ArgumentParser, ...]:
    """The options that several commands have: of all, of machines, of what is made, of answers."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="fastunet", help="name of the model and of the endpoint")
    common.add_argument("--project", help="Google Cloud project (default: the credentials' own)")
    common.add_argument("--location", help="region, such as us-central1 or europe-west4")
    common.add_argument("--api-endpoint", help="another address of the API, such as a private one")
    common.add_argument("--verbose", action="store_true", help="show what Google's SDK says of each step")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--version", help="version or alias (default: deploy the newest, batch the `default`)")
    machines.add_argument("--accelerator", choices=ACCELERATORS, help="GPU of each replica (default: as deployed)")
    machines.add_argument("--machine", help="machine type (default: the smallest that carries the accelerator)")
    machines.add_argument("--service-account", help="that the container runs as (default: one without rights)")
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--kms-key", metavar="projects/…/cryptoKeys/…", help="key of Cloud KMS that encrypts it")
    made.add_argument("--labels", type=key_values, metavar="KEY=VALUE,…", help="labels, as for the bill")
    answers = argparse.ArgumentParser(add_help=False)
    answers.add_argument("--format", choices=["png", "overlay"], help="write masks (.png) or overlays (.jpg) to --out")
    answers.add_argument("--size", choices=["original"], help="masks at the photos' own size")
    answers.add_argument("--top", type=int, help="only so many probabilities, the highest")
    answers.add_argument("--out", type=Path, default=".", help="folder for the pictures")
    return common, machines, made, answers


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command in `argv`; None: this process's own."""
    common, machines, made, answers = shared_options()
    about = "Host the serving image on Google Cloud: Vertex AI, now Gemini Enterprise Agent Platform."
    parser = argparse.ArgumentParser(prog="python -m deployment.ai_platform", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common, *parents], formatter_class=Help)

    p = command("upload", "register an image as the model's newest version", made)
    p.add_argument("image", help="REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG")
    p.add_argument("--artifacts", help="gs:// folder with the archive, for an image that holds none")
    p.add_argument("--torch-backend", default="cpu", help="that the image was built with; deploy warns by it")

    p = command("deploy", "put a version behind the endpoint, or scale it where it runs", machines, made)
    kept = "(default: as it is deployed, else"
    p.add_argument("--min-replicas", type=int, help=f"each costs all day; 0: a preview, none in idle hours {kept} 1)")
    p.add_argument("--max-replicas", type=int, help=f"grow to so many machines; the quota must hold them {kept} 1)")
    p.add_argument("--scale-on", choices=METRICS, help=f"what adds machines {kept} the GPU's use, or the CPU's)")
    p.add_argument("--target", type=int, help=f"percent of use, or requests a minute, that adds a machine {kept} 60)")
    p.add_argument("--idle-after", type=int, help="seconds until the last machine goes, with --min-replicas 0")
    p.add_argument("--share", type=int, help="percent of the traffic (default: 100 on a new endpoint, else 0)")
    p.add_argument("--shared", action="store_true", help="a shared endpoint: 1.5 MB a request; dedicated: 10 MB")
    p.add_argument("--inference-timeout", type=int, help="seconds for an answer of a dedicated endpoint, up to 3600")
    p.add_argument("--spot", action="store_true", help="Spot machines: cheaper, and may be taken away at any time")
    p.add_argument(
        "--flex-start",
        type=int,
        metavar="SECONDS",
        help="wait for machines that are hard to get, and have them for so long at most; a preview",
    )
    p.add_argument("--gpu-partition", metavar="SIZE", help="a part of the GPU, such as 1g.10gb of an H100")
    p.add_argument("--log-to", metavar="bq://PROJECT.DATASET.TABLE", help="log requests and answers to BigQuery")
    p.add_argument("--log-rate", type=float, default=1.0, help="part of the requests to log, 0 to 1")

    p = command("predict", "send image files; print the answers, or write pictures", answers)
    p.add_argument("images", nargs="+", type=Path)
    p.add_argument("--raw", action="store_true", help="each image as it is, in a request of its own: up to 10 MB")
    p.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds to wait for an answer")

    p = command("batch", "predict many images by a job, from and to Cloud Storage", machines, made, answers)
    p.add_argument(
        "source", nargs="+", help='image files, gs:// folders of images, or gs://….jsonl files of {"b64": …} lines'
    )
    p.add_argument("--to", required=True, metavar="gs://BUCKET/FOLDER", help="where the results go")
    p.add_argument("--replicas", type=int, default=1, help="machines, from start to end: jobs do not autoscale")
    p.add_argument("--batch-size", type=int, help="photos in one request (default: as many as the server takes)")
    p.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="of one request, as the model's configuration")

    p = command("traffic", "split the traffic between deployed versions: 1=90 2=10 (canary), 1=100 (roll back)")
    p.add_argument("shares", nargs="+", type=version_share, metavar="VERSION=PERCENT")
    p.add_argument("--undeploy", action="store_true", help="undeploy the versions that get none: they cost money")

    command("list", "show versions, deployments, traffic and jobs")
    p = command("delete", "delete the endpoint, the jobs and the model; costs end here")
    p.add_argument(
        "--all", dest="every_endpoint", action="store_true", help="also where several endpoints are named so"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the command in `args` says, and print what came of it."""
    common = {"command", "project", "location", "api_endpoint", "verbose"}
    options = {key: value for key, value in vars(args).items() if key not in common and value is not None}
    match args.command:
        case "upload":
            model = upload(**options)
            print(f"{model.resource_name} version {model.version_id}")
        case "deploy":
            print(deploy(**options).resource_name)
        case "predict":
            images, out, raw = options.pop("images"), options.pop("out"), options.pop("raw")
            ask = ask_raw if raw else predict
            rows = ({"prediction": answer} for answer in ask(images, **options))
            report(zip(map(str, images), rows, strict=True), out, images)
        case "batch":
            out, destination = options.pop("out"), options.pop("to")
            folder = batch(destination=destination, **options)
            print(folder)
            report(named(batch_results(folder), args.source, destination), out, args.source)
        case "traffic":
            traffic(dict(options.pop("shares")), **options)
            print(overview(args.name))
        case "list":
            print(overview(args.name))
        case "delete":
            stays = left_over(args.name)
            deleted = delete(args.name, args.every_endpoint)
            where = f"in {place()[1]}, the only region looked through (--location names another)"
            print("\n".join(f"deleted {d}" for d in deleted) or f"nothing was left of {args.name} {where}")
            if deleted:
                print(f"no more of {args.name} {where}. What stays, and how to remove it:", *stays, sep="\n  ")


def ask_raw(images: Sequence[Path], **options: Any) -> Iterator[dict]:
    """The answers to the images, one by one and raw; a picture as `{"png": …}` or `{"jpeg": …}`, an error in place."""
    from google.api_core import exceptions

    for image in images:
        try:
            answer = predict_raw(image, **options)
        except exceptions.GoogleAPICallError as error:
            if error.code not in (400, 413) or isinstance(error, exceptions.FailedPrecondition):
                raise
            answer = {"error": {"message": error.message}}  # this image's own; the others may be good
        if isinstance(answer, bytes):
            kind = "png" if options["format"] == "png" else "jpeg"
            answer = {kind: base64.b64encode(answer).decode()}
        yield answer


def report(rows: Iterable[tuple[str, dict]], out: Path, photos: Iterable[Path | str] = ()) -> None:
    """Prints a line of JSON for each named row, writes the pictures in them to `out`, and counts the photos.

    No picture is written over another, nor over one of `photos`, the files that were sent. Exits with status 1 where a
    photo got no answer.
    """
    taken, failed, n = {Path(photo).resolve() for photo in photos}, 0, 0
    for n, (name, row) in enumerate(rows, 1):
        if error := error_in(row):
            failed += 1
            print(json.dumps({"file": name, "error": error}))
            continue
        answer = row["prediction"]
        shown = {key: value for key, value in answer.items() if key not in ("base64_prediction", "png", "jpeg")}
        if kind := next((kind for kind in ("png", "jpeg") if kind in answer), None):
            target = out / f"{Path(name).stem}.{'png' if kind == 'png' else 'jpg'}"
            stem, number = target.stem, n
            while target.resolve() in taken:  # by a photo, or for one of the same name in another folder
                target = target.with_name(f"{stem}-{number}{target.suffix}")
                number += 1
            taken.add(target.resolve())
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
    """The command; an error of Google's ends it with one line and what helps."""
    args = parse_args(argv)
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError

    try:
        connect(args.project, args.location, args.api_endpoint, args.verbose)
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (GoogleAPICallError, GoogleAuthError, ValueError, OSError, RuntimeError) as e:
        options = {key: getattr(args, key) for key in ("image", "accelerator", "max_replicas") if hasattr(args, key)}
        location = args.location or "us-central1"
        advice = remedy(e, args.command, args.project or "PROJECT", location=location, **options)
        message = " ".join(str(getattr(e, "message", e)).split())
        sys.exit(f"error: {message}" + (f"\n  try: {advice}" if advice else ""))


if __name__ == "__main__":
    main()
