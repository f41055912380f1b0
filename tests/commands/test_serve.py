"""The page's door: what it answers, what it refuses and how, and that requests wait their turn."""

import io
import json
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

import dsct_jax
from configs import base, debug
from dsct_jax.__main__ import main
from dsct_jax.commands import serve
from dsct_jax.commands.serve import Door, make_app
from dsct_jax.model.build import Network, network_config
from dsct_jax.postprocess import Selection

testclient = pytest.importorskip("starlette.testclient", reason="the serve extra is not installed")
HOSTS = ("testserver", "127.0.0.1")


def model_of(name: str = "dsct"):
    config = debug.get_config()
    if name != "dsct":
        base.use_network(config, name)
    network = Network(network_config(config.model.to_dict(), len(config.class_names)))
    return dsct_jax.Model(network, *network.init(0), config.to_dict())


@pytest.fixture(scope="module")
def door():
    return Door(model_of(), Selection(min_confidence=0.0), max_bytes=200_000, max_megapixels=1.0)


@pytest.fixture(scope="module")
def client(door):
    with testclient.TestClient(make_app(door, hosts=HOSTS)) as one:
        yield one


def photo(size=(80, 60), form="JPEG", **how) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, form, **how)
    return file.getvalue()


def test_the_page_asks_nobody_else(client):
    page = client.get("/")
    assert page.status_code == 200 and "apparent emotions" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    about = client.get("/health").json()
    assert about["ready"] and about["inside"] and about["class_names"][0] == "Anger"


def test_the_answer_is_that_of_the_library(client, door):
    sent = photo(form="PNG")
    found = client.post("/predict", content=sent).json()
    expected = dsct_jax.predict(door.model, Image.open(io.BytesIO(sent)), min_confidence=0.0)
    assert (found["width"], found["height"]) == (80, 60)
    assert [one["box"] for one in found["subjects"]] == [pytest.approx(one.box) for one in expected]
    assert [one["labels"] for one in found["subjects"]] == [list(one.labels) for one in expected]


def test_inside_a_person(client):
    found = client.post("/predict?inside=1", content=photo()).json()
    points = found["context_points"]
    assert len(points) == 6 and found["subjects"]
    for person in found["subjects"]:
        samples = np.array(person["inside"]["samples"])
        assert samples.shape[1] == 3 and (np.diff(samples[:, 2]) <= 0).all()
        context = person["inside"]["context"]
        assert context and all(0 <= query < 6 for query, *_ in context)
        assert {way for *_, way in context} <= {"spatial", "semantic"}


def test_photographs_of_a_phone_are_upright(client):
    exif = Image.Exif()
    exif[274] = 6
    found = client.post("/predict", content=photo(exif=exif)).json()
    assert (found["width"], found["height"]) == (60, 80)


@pytest.mark.parametrize(
    ("body", "question", "status", "says"),
    [
        (b"<html>", "", 415, "the picture: cannot be read as an image"),
        (photo()[:300], "", 415, "cannot be read"),
        (photo((2000, 600), quality=1), "", 413, "2000x600, more than 1 megapixels"),
        (b"x" * 300_000, "", 413, "more than 0.2 MB"),
        (photo(), "?min_confidence=2", 400, "must lie in [0, 1]"),
        (photo(), "?min_confidence=high", 400, "high"),
    ],
)
def test_what_is_refused(client, body, question, status, says):
    reply = client.post(f"/predict{question}", content=body)
    assert reply.status_code == status and says in reply.json()["error"]


def test_a_body_without_a_length_is_counted(client):
    reply = client.post("/predict", content=iter([b"x" * 50_000] * 10))
    assert reply.status_code == 413


def test_other_names_and_ways(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/predict").status_code == 405
    assert client.get("/../serve.py").status_code == 404


def test_one_turn_and_a_short_queue(monkeypatch, door):
    """Of ten at once, as many are answered as may wait and one more; never two together."""
    running, most = 0, 0

    def slow(*_, **__):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return {"subjects": []}

    monkeypatch.setattr(Door, "answer", slow)
    app = make_app(Door(door.model, door.selection, waiting=3), hosts=HOSTS)
    statuses, body = [], photo()
    with testclient.TestClient(app) as client:
        asked = [
            threading.Thread(
                target=lambda: statuses.append(client.post("/predict", content=body).status_code)
            )
            for _ in range(10)
        ]
        for one in asked:
            one.start()
        for one in asked:
            one.join()
    assert most == 1 and set(statuses) == {200, 503} and 4 <= statuses.count(200) < 10


def test_a_two_stage_network_says_where_it_looked():
    model = model_of("two_stage")
    door = Door(model, Selection(), lambda image, name: [[5, 5, 40, 50]])
    with testclient.TestClient(make_app(door, hosts=HOSTS)) as client:
        assert not client.get("/health").json()["inside"]
        found = client.post("/predict?inside=1", content=photo()).json()
    (person,) = found["subjects"]
    assert person["box"] == pytest.approx([5, 5, 40, 50]) and np.sum(
        person["attention"]
    ) == pytest.approx(1)
    assert len(found["context_place"]) == 4


def test_a_real_server(tmp_path, monkeypatch, door, capsys):
    """uvicorn and a socket, as `dsct serve` starts them; a port in use is one line."""
    uvicorn = pytest.importorskip("uvicorn")
    model, servers = door.model, []
    model.save(tmp_path / "m.safetensors")
    monkeypatch.setattr(serve, "load_model", lambda _: model)
    monkeypatch.setattr(Door, "warm_up", lambda _: None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["serve", f"--checkpoint={tmp_path / 'm.safetensors'}", f"--port={port}"]
    make = uvicorn.Server
    monkeypatch.setattr(
        uvicorn, "Server", lambda config: servers.append(make(config)) or servers[0]
    )
    thread = threading.Thread(target=main, args=(flags,))
    thread.start()
    while not (servers and servers[0].started):
        time.sleep(0.02)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", photo())
        assert json.load(urllib.request.urlopen(request))["width"] == 80
        monkeypatch.setattr(uvicorn, "Server", make)
        assert main(flags) == 2
        assert f"--port={port}: 127.0.0.1 cannot be listened to" in capsys.readouterr().err
    finally:
        servers[0].should_exit = True
        thread.join()
    assert main([*flags, "--boxes=faces"]) == 2
    assert "--boxes=faces: this network finds people" in capsys.readouterr().err
