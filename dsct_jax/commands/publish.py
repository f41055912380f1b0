"""A trained model on the Hugging Face hub: weights, configuration and model card in one commit."""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsct_jax.commands.flags import load_model
from dsct_jax.commands.model_card import METRICS, MODEL_CARD, read_json
from dsct_jax.errors import UserError
from dsct_jax.inference.load import Model
from dsct_jax.weights.hub import CARD, CONFIG, PREFIX, WEIGHTS, hub_errors
from dsct_jax.weights.run_directory import parse_run_path

_TASK = "object-detection"  # of the hub's fixed list; there is none for emotions
_TAGS = ("jax", "flax", "emotion-recognition", "context-aware")
_MEASURED = ("mAP", "accuracy", "macro_f1", "mean_iou")


def publish(
    model: Model,
    name: str,
    *,
    card: str,
    license: str,
    license_link: str = "",
    public: bool = False,
    tag: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Uploads `model` with `card`, the text of a model card, to the hub as ORG/NAME; returns
    hf:ORG/NAME[@TAG]. The repository is made if it is missing, and is private unless `public`.

    Args:
        license_link: address of a license that the hub does not know by name.
        metrics: of `train.py --mode=eval`, for the table on its page.

    Raises:
        UserError: a question (?) of the card is open, or the hub refuses.
    """
    from huggingface_hub import HfApi

    where = f"{PREFIX}{name}"
    if questions := [line.strip() for line in card.splitlines() if "(?)" in line]:
        count = f"{len(questions)} lines with a question (?), the first: {questions[0]}"
        raise UserError(f"{where}: the model card is not ready: {count}")
    api, front = HfApi(), front_matter(model, name, license, license_link, metrics or {})
    config = json.dumps(model.config, indent=1, sort_keys=True) + "\n"
    with tempfile.TemporaryDirectory() as folder, hub_errors(where):
        model.save(Path(folder, WEIGHTS))
        Path(folder, CONFIG).write_text(config, encoding="utf-8")
        Path(folder, CARD).write_text(f"---\n{front}---\n\n{card}", encoding="utf-8")
        api.create_repo(name, private=not public, exist_ok=True)
        # one that was there stays as it was
        if api.model_info(name).private is public:
            now = "private: make it public on its page, or omit" if public else "public: say"
            raise UserError(f"{where}: the repository is there and {now} --public")
        message = tag or "A model of dsct-jax"
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        if tag:
            api.create_tag(name, tag=tag)
    return where + (f"@{tag}" if tag else "")


def front_matter(
    model: Model, name: str, license: str, license_link: str, metrics: Mapping[str, Any]
) -> str:
    """What the hub reads of a card, as YAML: license, tags, the numbers of its table of results."""
    from huggingface_hub import EvalResult, ModelCardData

    source = str(model.config["data"].get("source", "own data"))
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=source,
            dataset_name=str(metrics.get("protocol", source)),
            metric_type=metric,
            metric_name=METRICS[metric][0],
            metric_value=round(float(metrics[metric]), 4),
        )
        for metric in _MEASURED
        if isinstance(metrics.get(metric), int | float)
    ]
    data = ModelCardData(
        license="other" if license_link else license,
        license_name=license if license_link else None,
        license_link=license_link or None,
        library_name="dsct-jax",
        pipeline_tag=_TASK,
        tags=list(_TAGS),
        model_name=name,
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def run(arguments: argparse.Namespace) -> None:
    checkpoint = arguments.checkpoint
    folder = parse_run_path(checkpoint)[0] if checkpoint.is_dir() else checkpoint.parent
    card = arguments.card or folder / MODEL_CARD
    measured = folder / f"metrics_{arguments.split}.json"
    if not card.is_file():
        remedy = "write it with `dsct model_card` and answer its questions"
        raise UserError(f"{card}: missing; {remedy}")
    metrics = read_json(measured) if measured.is_file() else None
    print(f"license: {arguments.license} {arguments.license_link}".rstrip())
    where = publish(
        load_model(arguments),
        arguments.to.removeprefix(PREFIX),
        card=card.read_text(encoding="utf-8"),
        license=arguments.license,
        license_link=arguments.license_link,
        public=arguments.public,
        tag=arguments.tag,
        metrics=metrics,
    )
    seen = "everybody" if arguments.public else "you and your organization only"
    print(f"published as {where}, for {seen} to see: dsct_jax.load({where!r})")
