"""Pages that are made when the site is built: every field of a configuration, every public name,
every command, as the code says them; and the notebook.
"""

import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "what_a_network_looks_at.ipynb"
PUBLIC = {
    "dsct_jax": ("load", "predict", "Model", "Subject", "UserError"),
    "pallas_kernels.deformable_attention": ("deformable_attention",),
}
COMMANDS = {"dsct": "dsct_jax.commands.parsers", "python -m data": "data.tools.parsers"}
_WIDTH = 70
_BLOCKS = ("Args:", "Returns:", "Raises:")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this when it has listed the files of docs/."""
    from mkdocs.structure.files import File

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # data and configs are no part of what is installed
    pages = {
        "reference/configuration.md": configuration(),
        "reference/python.md": public_names(),
        "reference/commands.md": commands(),
        f"tutorials/{NOTEBOOK.stem}.md": notebook_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def notebook_page() -> str:
    """The notebook's texts and cells."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.append(f"As a notebook: `examples/{NOTEBOOK.name}`.")
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """Every field of every section: default, allowed values, meaning."""
    from data.config import DataConfig
    from dsct_jax.model.build import NETWORKS
    from dsct_jax.training import config as training

    lines = [
        "# Configuration",
        "",
        "A configuration file is a difference from `configs/base.py`; on the command line a field "
        "is `--config.SECTION.FIELD=VALUE`. Fields of the top level: `name`, `seed`, `init_from` "
        "([weights](../weights.md)), `class_names`, `multi_label`.",
    ]
    sections = {
        "data": DataConfig,
        "matcher": training.MatcherConfig,
        "loss": training.LossConfig,
        "optimizer": training.OptimizerConfig,
        "train": training.TrainConfig,
    }
    for name, section in sections.items():
        lines += ["", f"## {name}", "", _summary(section), "", *_fields(section)]
    lines += ["", "## model", "", "`model.name` chooses the network, which has these fields."]
    for name, entry in NETWORKS.items():
        lines += ["", f"### model.name = {name}", "", _summary(entry.network), ""]
        lines += _fields(entry.config)
    return "\n".join(lines) + "\n"


def _fields(section: Any) -> list[str]:
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(section):
        rules = field.metadata
        if rules["shared"] or field.name == "name":
            continue
        bounds = [
            f"{text} {limit:g}" for text, limit in rules["bounds"].items() if limit is not None
        ]
        allowed = ", ".join(rules["choices"]) or " and ".join(bounds)
        cells = f"`{field.name}`", f"`{field.default!r}`", allowed, rules["doc"]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def public_names() -> str:
    """What a program may rely on."""
    lines = ["# Python"]
    for package, names in PUBLIC.items():
        module = importlib.import_module(package)
        lines += ["", f"## {package}", "", _summary(module)]
        for name in names:
            lines += ["", *_described(f"{package}.{name}", getattr(module, name))]
    return "\n".join(lines) + "\n"


def _described(path: str, thing: Any, level: int = 3) -> list[str]:
    name, lines = path.rpartition(".")[2], [f"{'#' * level} {path}", ""]
    if is_property := isinstance(thing, property | functools.cached_property):
        thing = thing.fget if isinstance(thing, property) else thing.func
    is_class = inspect.isclass(thing)
    is_error = is_class and issubclass(thing, Exception)
    members = vars(thing).items() if is_class and not is_error else ()
    if not is_error:
        called = "" if is_property else _called(thing)
        lines += ["```python", f"{name}{called}", "```", ""]
    lines += _markdown(inspect.getdoc(thing) or "")
    kinds = property | functools.cached_property | types.FunctionType
    for inner, member in members:
        if not inner.startswith("_") and isinstance(member, kinds):
            lines += ["", *_described(f"{name}.{inner}", member, level + 1)]
    return lines


def _called(thing: Any) -> str:
    """The signature, one parameter per line where it is long."""
    signature = inspect.signature(thing)
    text = _without_modules(str(signature))
    if len(text) < _WIDTH:
        return text
    parts, named = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            parts, named = [*parts, "*"], True
        parts.append(_without_modules(str(parameter)))
    result = "" if signature.return_annotation is signature.empty else text[text.rindex(" -> ") :]
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _without_modules(signature: str) -> str:
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Z]\w|ndarray)", "", signature)


def commands() -> str:
    """The --help of every command."""
    lines = ["# Commands", "", "`python train.py --help` has the flags of training."]
    for program, module in COMMANDS.items():
        parsers = importlib.import_module(module)
        for name, about in parsers.COMMANDS.items():
            parser = getattr(parsers, name, None) or getattr(parsers, f"{name}_")
            made = parser()
            made.prog = f"{program} {name}"
            text = made.format_help().rstrip()
            lines += ["", f"## {program} {name}", "", f"{about}.", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def _summary(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _markdown(docstring: str) -> list[str]:
    """Paragraphs as they are; what stands below "Args:" and its likes as a list."""
    lines: list[str] = []
    listing = False
    for line in docstring.splitlines():
        if line.strip() in _BLOCKS:
            listing = True
            lines += ["", f"**{line.strip()[:-1]}**", ""]
        elif listing and re.match(r"    (\w[\w, ]*|\*\*?\w+):", line):
            name, _, text = line.strip().partition(":")
            lines.append(f"- `{name}`:{text}")
        elif listing and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            listing = listing and not line.strip()
            lines.append(line)
    return lines
