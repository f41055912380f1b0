"""A page and an HTTP door for one model: photographs come as bytes, stay in memory, and are
answered one after another.
"""

import argparse
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from dsct_jax.commands.flags import finder_of, load_model, selection
from dsct_jax.errors import TooLarge, UserError
from dsct_jax.inference.finders import Finder
from dsct_jax.inference.introspection import Layer, introspect
from dsct_jax.inference.load import Model
from dsct_jax.inference.predict import predict_each
from dsct_jax.postprocess import Selection
from dsct_jax.preprocess import decode_image
from dsct_jax.visualization.attention import context_place

PAGE = Path(__file__).with_name("page.html")
UPLOAD = Path("the picture")  # what errors call it
SECONDS_TO_ARRIVE = 60  # of a picture
SHOWN_SAMPLES = 64  # of a person, the heaviest
# nothing from elsewhere, and nobody may frame the page
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; media-src blob:; connect-src 'self'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Door:
    """A model, how it is asked, and what it takes."""

    model: Model
    selection: Selection
    finder: Finder | None = None  # of the people, for a two-stage network
    max_bytes: int = 20_000_000
    max_megapixels: float = 50.0
    waiting: int = 8  # requests at most, beside the one that is answered

    @property
    def looks_inside(self) -> bool:
        """Whether the network reports what it looked at."""
        return self.model.config["model"].get("name", "dsct") == "dsct"

    def about(self) -> dict[str, Any]:
        """What programs and the page need to know."""
        decoder = self.model.decoder
        return {
            "ready": True,
            "class_names": decoder.class_names,
            "multi_label": decoder.multi_label,
            "min_confidence": decoder.resolve_min_confidence(self.selection),
            "inside": self.looks_inside,
        }

    def warm_up(self) -> None:
        """Compiles for every canvas, so that no visitor waits for it."""
        for height, width in self.model.preprocessing.buckets:
            for inside in {False, self.looks_inside}:
                self.answer(Image.new("RGB", (width, height)), inside=inside)

    def read(self, body: bytes) -> Image.Image:
        """The upright picture. Raises UserError: it is none; TooLarge."""
        try:
            return decode_image(UPLOAD, body, upright=True, max_megapixels=self.max_megapixels)
        except TooLarge as error:  # without the remedy, which is the server's owner's
            raise TooLarge(str(error).partition("; ")[0]) from None

    def answer(
        self, image: Image.Image, *, inside: bool, lowest: float | None = None
    ) -> dict[str, Any]:
        """An entry of predictions.json, `inside` with what the last layer looked at per person."""
        chosen = self.selection
        if lowest is not None:
            chosen = dataclasses.replace(chosen, min_confidence=lowest)
        entry: dict[str, Any] = {"width": image.width, "height": image.height}
        if inside and self.looks_inside:
            found = introspect(self.model, image, selection=chosen)
            people = [dataclasses.asdict(subject) for subject in found.subjects]
            for person, query in zip(people, found.queries, strict=True):
                person["inside"] = _inside(found.layers[-1], int(query))
            return entry | {"subjects": people, "context_points": _round(found.context_points)}
        finder = self.finder
        find = None if finder is None else lambda image, _: finder(image, str(UPLOAD))
        ((_, _, subjects),) = predict_each(self.model, [image], selection=chosen, find=find)
        entry["subjects"] = [dataclasses.asdict(subject) for subject in subjects]
        if self.model.crops is not None:
            entry["context_place"] = context_place(image.size, self.model.crops)
        return entry


def _round(values: Any) -> list[Any]:
    return np.round(np.asarray(values, np.float64), 4).tolist()


def _inside(layer: Layer, query: int) -> dict[str, Any]:
    """The heaviest samples [x, y, weight], and the context queries [number, weight, how selected]
    of one subject query.
    """
    weights = layer.subject_weights[query]
    heaviest = np.argsort(-weights)[:SHOWN_SAMPLES]
    samples = np.column_stack([layer.subject_samples[query], weights])[heaviest]
    selected = np.flatnonzero(layer.context_weights[query])
    ways = ["spatial" if layer.spatial[query, number] else "semantic" for number in selected]
    values = _round(layer.context_weights[query][selected])
    context = [list(row) for row in zip(selected.tolist(), values, ways, strict=True)]
    return {"samples": _round(samples), "context": sorted(context, key=lambda row: -row[1])}


async def _body(request: Request, most: int) -> bytes:
    """Raises TooLarge where it is larger, as announced or as counted."""
    body = io.BytesIO()
    announced = int(request.headers.get("content-length") or 0)
    parts = request.stream()
    while announced <= most and body.tell() <= most:
        part = await anext(parts, None)
        if part is None:
            return body.getvalue()
        body.write(part)
    raise TooLarge(f"more than {most / 1e6:g} MB; make the picture smaller")


async def _predict(door: Door, request: Request, turns: anyio.CapacityLimiter) -> Response:
    """The answer to one picture, or one line and a status that say what is wrong with it."""
    asked, status = request.query_params, 400
    try:
        cut = asked.get("min_confidence")
        lowest = None if cut is None else Selection(min_confidence=float(cut)).min_confidence
        with anyio.fail_after(SECONDS_TO_ARRIVE):
            body = await _body(request, door.max_bytes)
        status = 415
        found = await anyio.to_thread.run_sync(
            lambda: door.answer(door.read(body), inside="inside" in asked, lowest=lowest),
            limiter=turns,
        )
    except TooLarge as error:
        return JSONResponse({"error": str(error)}, 413)
    except ValueError as error:  # a UserError is one
        return JSONResponse({"error": str(error)}, status)
    except TimeoutError:
        line = f"the picture did not arrive within {SECONDS_TO_ARRIVE} seconds"
        return JSONResponse({"error": line}, 408)
    except ClientDisconnect:
        return Response(status_code=499)
    return JSONResponse(found)


def make_app(door: Door, *, hosts: Sequence[str]) -> Starlette:
    """The application: GET /, GET /health, POST /predict. Requests for a host that is not one of
    `hosts` are refused, as another page's would be that has this address under its name.
    """
    turns, waiting = anyio.CapacityLimiter(1), 0  # one model, one turn
    page = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def health(_: Request) -> Response:
        return JSONResponse(door.about())

    async def predict(request: Request) -> Response:
        nonlocal waiting
        if waiting > door.waiting:
            line = f"{waiting} pictures are waiting; try again in a moment"
            return JSONResponse({"error": line}, 503)
        waiting += 1  # on entry: a body that is still coming in is a request too
        try:
            return await _predict(door, request, turns)
        finally:
            waiting -= 1

    routes = [Route("/", home), Route("/health", health)]
    routes.append(Route("/predict", predict, methods=["POST"]))
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=guard)


def run(arguments: argparse.Namespace) -> None:
    model = load_model(arguments)
    if (model.crops is None) != (arguments.boxes is None):
        wanted = "a two-stage network needs --boxes" if model.crops else "this network finds people"
        raise UserError(f"--boxes={arguments.boxes}: {wanted}")
    finder = finder_of(arguments)
    size, pixels = int(arguments.max_megabytes * 1e6), arguments.max_megapixels
    door = Door(model, selection(arguments), finder, size, pixels, arguments.waiting)
    print(f"{arguments.checkpoint}: loaded; compiling ...", flush=True)
    door.warm_up()
    host, port = arguments.host, arguments.port
    hosts = ["localhost", "127.0.0.1", "[::1]", host, *arguments.allow_host]
    print(f"open http://{host}:{port}/   for programs: POST /predict, GET /health")
    print("no login, no encryption: whoever reaches this address can use it; Ctrl-C stops")
    app = make_app(door, hosts=hosts)
    config = uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False)
    try:
        uvicorn.Server(config).run()
    except SystemExit:
        raise UserError(
            f"--port={port}: {host} cannot be listened to there; take another"
        ) from None
