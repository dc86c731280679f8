"""A JSON object from a file of a model folder."""

import json
from pathlib import Path
from typing import Any

from interviewmate_mlx.errors import ModelError

# The largest tokenizer.json of a public model has 33 MB; in memory JSON takes up to 20 times that.
_MOST_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is no JSON object, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_JSON_BYTES + 1)
        if len(data) > _MOST_JSON_BYTES:
            raise ValueError(f"got more than {_MOST_JSON_BYTES >> 20} MB, expected less")
        value = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ModelError(
            f"Cannot read {path}: {error.strerror}.\nCheck the path and who may read it."
        ) from error
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ModelError(f"{path} is no JSON: {fault}\nDownload it again.") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{path}: got a JSON {type(value).__name__}, expected an object.\nDownload it again."
        )
    return value
