"""The pages say what is there: every command in them is understood, every field is in the
reference.
"""

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import dsct_jax
from data.command import override, train_parser
from dsct_jax.config import read_config
from dsct_jax.model.build import NETWORKS, Network, network_config

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PACKAGES = {"dsct_jax": "dsct_jax.commands.parsers", "data": "data.tools.parsers"}


def commands_of(page):
    """The commands of a page's blocks, each as a list of words."""
    text, inside = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")), False
    lines = iter(text.splitlines())
    for line in lines:
        inside ^= line.lstrip().startswith("```")
        if not (inside or line.startswith("    ")):
            continue
        if not re.match(r"\s*([A-Z_]+=\S+ )*(dsct|make|python) ", line):
            continue
        while line.count('"') % 2:  # a quotation that goes on
            line += next(lines).strip()
        words = shlex.split(line, comments=True)
        words = words[next(i for i, word in enumerate(words) if "=" not in word) :]
        if not {"...", "COMMAND"} & {*words}:
            yield [word.strip("[]") for word in words]


COMMANDS = sorted({shlex.join(words) for page in PAGES for words in commands_of(page)})


def test_there_are_commands():
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_is_understood(command, tmp_path, monkeypatch):
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words if "=" not in word} <= {*targets}
        return
    if words[0] == "-":  # a script follows
        return
    # a file of the reader's own
    own = r"--config=(?!configs/(demo|debug|base|caer|emo|faces|table)).*"
    words = [re.sub(own, "--config=configs/demo.py", word) for word in words]
    if program == "dsct":
        words = ["-m", "dsct_jax", *words]
    if words[0] == "-m" and words[1] in PACKAGES:
        parsers = importlib.import_module(PACKAGES[words[1]])
        name = words[2].replace("-", "_")
        parser = getattr(parsers, name, None) or getattr(parsers, f"{name}_")
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        monkeypatch.chdir(tmp_path)  # where outputs are tried
        rest = [word for word in words[3:] if not word.startswith("--config.")]
        if "--help" not in rest:
            parser().parse_args(rest)
    elif words[0] == "-m":
        assert words[1] == "pytest" or importlib.util.find_spec(words[1]), words[1]
    elif words[0] == "train.py":
        _, rest = train_parser("").parse_known_args(words[1:])
        assert [word for word in rest if not word.startswith("--config.")] == []
    else:
        assert (ROOT / words[0]).is_file()
    monkeypatch.chdir(ROOT)
    flags = dict(word.split("=", 1) for word in words if word.startswith("--config="))
    source = ROOT / flags.get("--config", "configs/base.py")
    changes = [word for word in words if word.startswith("--config.")]
    if changes and source.is_file():
        override(read_config(source), changes)


def test_the_reference_has_every_field_and_every_public_name():
    place = importlib.util.spec_from_file_location("reference", ROOT / "docs/hooks/reference.py")
    reference = importlib.util.module_from_spec(place)
    place.loader.exec_module(reference)
    text = reference.configuration()
    for entry in NETWORKS.values():
        for field in dataclasses.fields(entry.config):
            assert f"| `{field.name}` |" in text or field.metadata["shared"] or field.name == "name"
    assert "| `learning_rate` | `0.0002` | more than 0 |" in text
    names = reference.public_names()
    assert "predict(\n    model: Detector,\n    images:" in names
    commands = reference.commands()
    assert "## dsct predict_many" in commands and "## python -m data import" in commands


def test_the_notebook_runs(tmp_path):
    """Every cell, on the debug network."""
    config = read_config(ROOT / "configs" / "debug.py")
    network = Network(network_config(config["model"], len(config["class_names"])))
    dsct_jax.Model(network, *network.init(0), config).save(tmp_path / "small.safetensors")
    notebook = json.loads((ROOT / "examples" / "what_a_network_looks_at.ipynb").read_text())
    cells = ["".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == "code"]
    assert cells[0].count('"runs/demo"') == 1
    cells[0] = cells[0].replace("runs/demo", str(tmp_path / "small.safetensors"))
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    assert len(names["tiles"]) == 2 and names["tiles"][0].size[0] >= names["image"].width
    assert len(names["seen"].layers) == network.config.num_decoder_layers
