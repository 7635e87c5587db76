"""How tokens are chosen where a request does not say: as the model's own files recommend."""

import json
import logging
from pathlib import Path
from typing import Any

from softprompt_api.errors import InvalidArgument
from softprompt_api.params import SamplingParams

_log = logging.getLogger(__name__)

_FILE = "generation_config.json"
_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_defaults(folder: Path) -> dict[str, Any]:
    """Of the fields of SamplingParams, those for which a local model folder has a value that they may have."""
    path = folder / _FILE
    if not path.exists():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    defaults = {}
    for name in _NAMES:
        if (value := config.get(name)) is None:
            continue
        try:
            SamplingParams(**{name: value})
        except InvalidArgument as error:
            _log.warning("%s of the model is not taken: %s", _FILE, error.message)
        else:
            defaults[name] = value
    return defaults
