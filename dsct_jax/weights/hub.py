"""Models by name from the Hugging Face hub: hf:ORG/NAME[@REVISION], read as .safetensors alone,
since anything else there could run a program.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dsct_jax.config import expanded_path
from dsct_jax.errors import UserError

PREFIX = "hf:"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def local_path(source: Path | str) -> Path:
    """The file of a hub name, which is downloaded into the hub's cache unless it lies there; any
    other path as it is.

    A revision (branch, tag or commit) that was downloaded once is not asked for again. Without one
    the hub is asked whether there is a newer version; where it cannot be reached, or
    HF_HUB_OFFLINE=1 forbids it, the newest of the cache is taken.

    Raises:
        UserError: the name cannot be one, there is no such repository, revision or file, or neither
            an answer of the hub nor a copy in the cache.
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return expanded_path(source)
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    name, _, revision = text.removeprefix(PREFIX).partition("@")
    with hub_errors(text):
        if revision:
            stored = try_to_load_from_cache(name, WEIGHTS, revision=revision)
            if isinstance(stored, str):
                return Path(stored)
        path = hf_hub_download(name, WEIGHTS, revision=revision or None)
        with contextlib.suppress(errors.EntryNotFoundError):
            # the hub counts downloads by this file; it is not needed here
            hf_hub_download(name, CONFIG, revision=revision or None)
    return Path(path)


@contextlib.contextmanager
def hub_errors(asked: str) -> Iterator[None]:
    """The hub's errors as a UserError that begins with what was `asked` for."""
    from huggingface_hub import errors

    http: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's, of whichever version
    reasons: dict[type[Exception], str] = {
        errors.GatedRepoError: "its owner must let you in: ask on its page, then `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or a private one of somebody else "
        "(`hf auth login`)",
        errors.RevisionNotFoundError: "has no such revision (branch, tag or commit)",
        errors.RemoteEntryNotFoundError: f"has no {WEIGHTS}, and nothing else is loaded",
        errors.LocalEntryNotFoundError: "is not in the cache, and the hub cannot be reached (or "
        "HF_HUB_OFFLINE=1 forbids it)",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE=1 forbids asking the hub; unset it",
        errors.HFValidationError: "is no name of the hub; write hf:ORG/NAME[@REVISION]",
        http: "",
    }
    try:
        yield
    except tuple(reasons) as error:
        known = next(text for kind, text in reasons.items() if isinstance(error, kind))
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{asked}: {known or f'the hub says: {said}'}") from error
