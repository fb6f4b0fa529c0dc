"""A page to try a model in the browser: drop a photo, see what the running server, or an endpoint, says of it.

It is a client of a server and no part of one: it lies outside `deployment/`, whose modules go into archive and image.
"""

import argparse
import base64
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
from PIL import Image, ImageDraw

SAMPLE = "sample/street_view_of_a_small_neighborhood.png"
MAX_SIDE = 1024  # pixels of a photo as it is shown; it is sent as it is


def ask_server(url: str, photo: bytes) -> dict:
    """The server's answer to one photo: what it says of it, or an error with its `message`."""
    try:
        form = {"files": {"data": photo}, "data": {"size": "original"}}
        return httpx.post(url, **form, timeout=120, trust_env=False).json()
    except (httpx.TransportError, ValueError):
        return {"message": f"No server answers at {url}. Start one with `make serve`, then try again."}


def ask_endpoint(name: str, photo: bytes) -> dict:
    """The answer of the endpoint `name` on AI Platform to one photo, or an error with its `message`."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    from deployment import ai_platform

    try:
        ai_platform.connect()
        (answer,) = ai_platform.predict([photo], name, size="original")
        return answer.get("error", answer)
    except (GoogleAPIError, GoogleAuthError, ValueError) as error:
        return {"message": f"The endpoint {name} does not answer: {error}"}


def show(path: str | None, ask: Callable[[bytes], dict], palette: Callable) -> list:
    """What the page shows of the photo at `path`: a line of text, a picture, the classes on the photo, their bars."""
    text, picture, overlay, bars = "", *[gr.update(visible=False)] * 3
    if path is None:
        return [text, picture, overlay, bars]
    start = time.perf_counter()
    answer = ask(Path(path).read_bytes())
    text = f"answered in {1000 * (time.perf_counter() - start):.0f} ms"
    if "message" in answer:
        return [f"### {answer['message']}", picture, overlay, bars]
    photo = Image.open(path).convert("RGB")
    scale = min(1, MAX_SIDE / max(photo.size))
    photo = photo.resize([max(1, round(scale * side)) for side in photo.size])
    if "base64_prediction" in answer:
        drawn, areas, color_map = draw_mask(answer, photo.size, palette)
        picture = gr.update(value=drawn, label="mask", visible=True)
        overlay = gr.update(value=(photo, areas), color_map=color_map, visible=True)
        bars = gr.update(value=answer["classes"], label="shares of the photo", visible=True)
    elif "probabilities" in answer:
        text = f"### {answer.get('label') or ', '.join(answer['labels']) or 'none of the labels'}\n{text}"
        bars = gr.update(value=answer["probabilities"], label="probabilities", visible=True)
    elif "points" in answer:
        for x, y in answer["points"]:
            ImageDraw.Draw(photo).circle((scale * x, scale * y), max(photo.size) // 100 + 2, "crimson", "white")
        picture = gr.update(value=photo, label="points", visible=True)
    else:
        text = f"### {', '.join(f'{value:g}' for value in answer['values'])}\n{text}"
    return [text, picture, overlay, bars]


def draw_mask(answer: dict, size: tuple[int, int], palette: Callable) -> tuple[Image.Image, list, dict[str, str]]:
    """The mask as a picture of `size` (width, height), the area of each name that occurs, their colors.

    The names of the indices are in `names`; JSON objects such as `classes` come in any order from some servers.
    """
    mask = np.frombuffer(base64.b64decode(answer["base64_prediction"]), np.uint8)
    mask = mask.reshape([int(side) for side in answer["shape"]])  # the cloud's API carries every number as a float
    mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    names = answer["names"]
    colors = palette(names)
    indices: dict[str, list[int]] = {}  # several where classes have one name
    for i in np.unique(mask).tolist():
        indices.setdefault(names[i], []).append(i)
    areas = [(np.isin(mask, found).astype(float), name) for name, found in indices.items()]
    color_map = {name: "#" + bytes(colors[found[0]]).hex() for name, found in indices.items()}
    return Image.fromarray(colors[mask]), areas, color_map


def build(ask: Callable[[bytes], dict], palette: Callable, sample: Path, where: str) -> gr.Blocks:
    """The page. `ask` gives the answer to a photo's bytes, `palette` colors for names; `where` says who answers."""
    with gr.Blocks(title="Try the model", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## Drop a photo\nAnswers come from {where}.")
        with gr.Row():
            photo = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="photo")
            picture = gr.Image(visible=False, interactive=False, format="png")
        text = gr.Markdown()
        with gr.Row():
            overlay = gr.AnnotatedImage(label="overlay: point at a class", visible=False)
            bars = gr.Label(visible=False, num_top_classes=12, show_heading=False)
        shown = dict(fn=lambda path: show(path, ask, palette), inputs=photo, outputs=[text, picture, overlay, bars])
        photo.input(**shown)
        gr.Examples([[str(sample)]], **shown, run_on_click=True, cache_examples=False, label="an example")
    return page


def has_window() -> bool:
    """Whether a browser can open a window here. Without a display Python would take one that runs in the terminal."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080/predictions/fastunet", help="of the model")
    parser.add_argument("--endpoint", metavar="NAME", help="ask this endpoint on AI Platform instead of a server")
    args = parser.parse_args()
    from deployment.answers import palette  # in a Space it comes out of the archive

    ask = partial(ask_endpoint, args.endpoint) if args.endpoint else partial(ask_server, args.url)
    page = build(ask, palette, Path(SAMPLE), args.endpoint or args.url)
    page.launch(server_name="127.0.0.1", footer_links=[], inbrowser=has_window())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
