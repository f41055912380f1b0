"""Publishing to the hub and loading from it, against a server of the tests' own that answers what
huggingface_hub asks.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from dsct_jax import __main__, load
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model, model_config
from dsct_jax.model.build import Network
from dsct_jax.weights import hub
from tests.inference.test_load import small_config

pytest.importorskip("huggingface_hub", reason="needs the extra hub")


def small_model(seed=0):
    network = Network(model_config(small_config()))
    return Model(network, *network.init(seed), small_config())


class FakeHub(BaseHTTPRequestHandler):
    """Repositories in memory: {name: {"private": ..., "tags": {tag: commit}, commit: files}}."""

    repositories: ClassVar[dict] = {}
    requests: ClassVar[list] = []

    def log_message(self, *_):
        pass

    @property
    def site(self):
        return f"http://{self.headers['Host']}"

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status=200, document=None, *, content=b"", **headers):
        content = content if document is None else json.dumps(document).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        self.requests.append(f"POST {self.path}")
        body, parts = self.body(), self.path.strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(
                name,
                {"private": asked.get("private", asked.get("visibility") == "private"), "tags": {}},
            )
            return self.answer(200, {"url": f"{self.site}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        repository = self.repositories[name]
        if parts[4] == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
            ]
            return self.answer(200, {"files": modes})
        if parts[4] == "tag":
            repository["tags"][json.loads(body)["tag"]] = repository["tags"][parts[5]]
            return self.answer(200, {})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = hashlib.sha1(body).hexdigest()
        repository[commit], repository["tags"]["main"] = files, commit
        url = f"{self.site}/{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name in self.repositories:
                private = self.repositories[name]["private"]
                return self.answer(200, {"id": name, "private": private})
        repository = self.repositories.get("/".join(parts[:2]))
        if repository is None or parts[2:3] != ["resolve"]:
            return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        commit = repository["tags"].get(parts[3], parts[3])
        if commit not in repository:
            return self.answer(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        content = repository[commit].get("/".join(parts[4:]))
        headers = {"X_Repo_Commit": commit}
        if content is None:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", **headers)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content=content, ETag=etag, **headers)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub without repositories, an empty cache, and a huggingface_hub that knows only these."""
    FakeHub.repositories, FakeHub.requests = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    _forget()  # it reads the environment when it is imported
    yield server
    server.shutdown()
    server.server_close()
    _forget()


def _forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def run(tmp_path, model):
    """What `publish` reads: weights and a card without open questions, and metrics."""
    path = tmp_path / "mine.safetensors"
    model.save(path)
    (tmp_path / "MODEL_CARD.md").write_text("# Model card: mine\n\nTrained on drawings.\n")
    (tmp_path / "metrics_test.json").write_text(json.dumps({"mAP": 0.25, "protocol": "drawings"}))
    return path


def publish(run, *more):
    return __main__.main(["publish", f"--checkpoint={run}", "--to=we/drawn", *more])


def files_of(name, tag="main"):
    repository = FakeHub.repositories[name]
    return repository[repository["tags"][tag]]


def same(one, other):
    return all(np.array_equal(other.arrays()[name], value) for name, value in one.arrays().items())


def test_a_published_model_is_loaded_by_its_name(fake_hub, run, model, capsys):
    assert publish(run, "--license=apache-2.0", "--tag=v1") == 0
    assert (
        "published as hf:we/drawn@v1, for you and your organization only" in capsys.readouterr().out
    )
    assert FakeHub.repositories["we/drawn"]["private"] is True
    assert sorted(files_of("we/drawn")) == ["README.md", "config.json", "model.safetensors"]
    FakeHub.requests.clear()
    found = load("hf:we/drawn@v1")
    assert same(model, found)
    assert found.config == model.config
    assert found.decoder == model.decoder
    assert [line for line in FakeHub.requests if "config.json" in line]  # the count of downloads

    FakeHub.requests.clear()
    assert same(model, load("hf:we/drawn@v1"))
    assert FakeHub.requests == []
    load("hf:we/drawn")
    assert not [line for line in FakeHub.requests if line.startswith("GET") and "model" in line]


def test_a_newer_version_is_taken_unless_a_revision_is_named(fake_hub, run, model):
    publish(run, "--license=mit", "--tag=v1")
    load("hf:we/drawn@v1"), load("hf:we/drawn")
    changed = small_model(seed=1)
    changed.save(run)
    publish(run, "--license=mit")
    assert same(changed, load("hf:we/drawn"))
    assert same(model, load("hf:we/drawn@v1"))


def test_what_the_page_of_the_hub_reads(fake_hub, run):
    link = "https://example.org/terms"
    arguments = ["--license=emotic-research", f"--license-link={link}", "--public"]
    assert publish(run, *arguments) == 0
    assert FakeHub.repositories["we/drawn"]["private"] is False
    card = files_of("we/drawn")["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    for line in (
        "license: other",
        "license_name: emotic-research",
        f"license_link: {link}",
        "library_name: dsct-jax",
        "pipeline_tag: object-detection",
        "- emotion-recognition",
    ):
        assert line in front.splitlines(), front
    assert "value: 0.25" in front
    assert "type: mAP" in front
    assert text.strip() == "# Model card: mine\n\nTrained on drawings."


def test_a_public_repository_is_not_written_by_mistake(fake_hub, run, capsys):
    assert publish(run, "--license=mit", "--public") == 0
    commits = dict(FakeHub.repositories["we/drawn"])
    assert publish(run, "--license=mit") == 2
    assert "the repository is there and public: say --public" in capsys.readouterr().err
    assert FakeHub.repositories["we/drawn"] == commits


def test_an_open_question_in_the_card_stops_it(fake_hub, run, capsys):
    (run.parent / "MODEL_CARD.md").write_text("# Card\n\n(?) State your intended use.\n")
    assert publish(run, "--license=mit") == 2
    assert "not ready: 1 lines with a question (?), the first: (?) State" in capsys.readouterr().err
    assert FakeHub.requests == []


def test_damaged_metrics_are_one_line(fake_hub, run, capsys):
    (run.parent / "metrics_test.json").write_text("{")
    assert publish(run, "--license=mit") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics_test.json: cannot be read" in line and FakeHub.requests == []


def test_a_wrong_token_is_one_line(fake_hub, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert publish(run, "--license=mit") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hf:we/drawn: the hub says: ")
    assert "401 Unauthorized" in line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hf:we/none", "no such repository"),
        ("hf:we/drawn@v9", "has no such revision"),
        ("hf:we/empty", "has no model.safetensors"),
        ("hf:we/../x", "is no name of the hub"),
        ("hf:", "is no name of the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(fake_hub, run, name, line):
    publish(run, "--license=mit")
    FakeHub.repositories["we/empty"] = {"tags": {"main": "0" * 40}, "0" * 40: {}}
    with pytest.raises(UserError, match=line) as error:
        load(name)
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)


def test_without_a_network_the_cache_answers_or_one_line(fake_hub, run, model):
    publish(run, "--license=mit")
    load("hf:we/drawn")
    fake_hub.shutdown()
    fake_hub.server_close()
    assert same(model, load("hf:we/drawn"))
    with pytest.raises(UserError, match="is not in the cache, and the hub cannot be reached"):
        load("hf:we/other")


def test_offline_in_a_fresh_process(fake_hub, run):
    publish(run, "--license=mit")
    load("hf:we/drawn")
    FakeHub.requests.clear()
    code = "import dsct_jax; print(len(dsct_jax.load('hf:we/drawn').class_names))"
    for offline, status in (("1", 0), ("0", 0)):
        environment = {**os.environ, "HF_HUB_OFFLINE": offline}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.strip()) == (status, "26"), done.stderr
        assert bool(FakeHub.requests) == (offline == "0")


def test_other_paths_are_left_alone(tmp_path):
    assert hub.local_path(tmp_path / "a.pth") == tmp_path / "a.pth"
    assert str(hub.local_path("runs/demo")) == "runs/demo"
