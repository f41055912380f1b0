"""The one error that means "what the user gave cannot be used": entry points print its single line
and exit with status 2.
"""

# package that the base install lacks -> the extra that brings it; those of a single function
# (OpenCV, ONNX, flatbuffers) are named there
EXTRAS = {
    "grain": "train",
    "ml_collections": "train",
    "tensorboardX": "train",
    "tensorflow_datasets": "prepared",
    "array_record": "prepared",
    "matplotlib": "plots",
    "anyio": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "pyarrow": "parquet",
    "huggingface_hub": "hub",
}


class UserError(ValueError):
    """A message for the user: names the file, field or flag, and what to do about it."""


class TooLarge(UserError):
    """A picture of more bytes or pixels than allowed."""


def missing_extra(error: ImportError) -> UserError | None:
    """The line that names the extra to install, where one brings the module; else None."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return UserError(f"{package} is not installed: pip install 'dsct-jax[{EXTRAS[package]}]'")
