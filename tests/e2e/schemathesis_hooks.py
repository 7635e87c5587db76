"""Hooks of schemathesis that let well-formed requests get past the checks, to the engine and the registry.

Random names are nobody's, random bytes are no adapter, and of forty random fields two exclude each other. Requests
that are well-formed get names that exist, a real adapter, and but a few of their optional fields. Others are sent
as they were made; so are those of the coverage phase, which tries one field at a time, but for their model.
"""

import base64
import os
import random
from typing import Any
from urllib.parse import unquote

import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.generation.meta import TestPhase

MODELS = ["tiny", "first", "second@1", "first+second", "tiny:first"]
# Others use these at the same time; what is changed and deleted is called "fuzzed".
KEPT = ["first", "second", "third"]
ADAPTERS = ["fuzzed", "fuzzed@1", "first", "second@1", "nobody"]
CONFIG = os.environ["FUZZED_CONFIG"]
TENSORS = base64.b64decode(os.environ["FUZZED_TENSORS"])
SHA256 = os.environ["FUZZED_SHA256"]
REQUIRED = {
    *("model", "prompt", "messages", "tokens", "name", "config", "tensors_base64", "source", "version"),
    *("lora_name", "lora_path", "prompt_adapter_name", "prompt_adapter_path"),
}
VOCABULARY = 49152
NUM_OPTIONAL = 3
# Without a limit these generate until the context is full.
LIMITS = {"/v1/chat/completions": "max_completion_tokens", "/v1/responses": "max_output_tokens"}
FEW_TOKENS = 20


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Keep what others use, and make a well-formed request one that can be answered."""
    path = case.path_parameters
    if case.method in ("PATCH", "DELETE") and unquote(str(path.get("adapter"))).partition("@")[0] in KEPT:
        path["adapter"] = "fuzzed"
    for field in ("lora_name", "prompt_adapter_name"):
        if isinstance(case.body, dict) and case.body.get(field) in KEPT:
            case.body[field] = "fuzzed"
    if case.meta is None or case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    # From the case alone, so that every run is the same.
    chance = random.Random(f"{case.method} {case.path} {path} {case.body}")
    body = case.body if isinstance(case.body, dict) else {}
    if "model" in body:
        body["model"] = chance.choice(MODELS)
    if case.meta.phase.name == TestPhase.COVERAGE:
        return
    if body:
        case.body = body = _thinned_out(_whole(body), chance)
    if body and case.path in LIMITS and not {"max_tokens", LIMITS[case.path]} & body.keys():
        body[LIMITS[case.path]] = FEW_TOKENS
    if "tensors_base64" in body:
        body |= {"name": "fuzzed", "config": CONFIG, "tensors_base64": base64.b64encode(TENSORS).decode()}
        for checked in ("sha256", "base_model", "idempotency_key"):
            body.pop(checked, None)
    for field in ("lora_name", "prompt_adapter_name"):
        if field in body:
            body[field] = "fuzzed"
    if "version" in body and "alias" in path:
        body["version"] = 1
    case.query.pop("page_token", None)
    if case.meta.phase.name == TestPhase.FUZZING and path:
        _name(case, chance)


def _name(case: Any, chance: random.Random) -> None:
    """Name an adapter, a model or an alias that there may be, and upload a real adapter."""
    path = case.path_parameters
    if case.path == "/v1/adapters/{adapter}" and case.method == "POST":
        path["adapter"], case.body = "fuzzed", TENSORS
        case.headers["x-adapter-config"] = base64.b64encode(CONFIG.encode()).decode()
        case.headers["x-adapter-sha256"] = SHA256
        for checked in ("x-adapter-labels", "x-adapter-base-model", "idempotency-key"):
            case.headers.pop(checked, None)
    elif "alias" in path:
        path |= {"adapter": "fuzzed", "alias": "prod"}
    elif "adapter" in path:
        changes = case.method in ("PATCH", "DELETE")
        adapter = chance.choice(ADAPTERS[:2] if changes else ADAPTERS)
        path["adapter"] = adapter.partition("@")[0] if case.path.endswith("/versions") else adapter


def _whole(value: Any) -> Any:
    """The value with whole numbers written as integers: JSON Schema counts 1.0 as one, and we do not."""
    if isinstance(value, dict):
        return {name: _whole(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _thinned_out(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A body with few optional fields, few choices, and ids that the vocabulary has."""
    optional = sorted(body.keys() - REQUIRED)
    kept = REQUIRED | set(chance.sample(optional, min(len(optional), NUM_OPTIONAL)))
    thin = {name: value for name, value in body.items() if name in kept}
    for name in ("stop_token_ids", "tokens", "prompt"):
        if isinstance(thin.get(name), list):
            thin[name] = [_known(item) for item in thin[name]]
    if isinstance(thin.get("logit_bias"), dict):
        thin["logit_bias"] = {str(int(token) % VOCABULARY): bias for token, bias in thin["logit_bias"].items()}
    for message in thin.get("messages", ()):
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            ]
        if isinstance(message.get("content"), list):
            message["content"] = [_known(part) for part in message["content"]]
    if thin.get("stream_options"):
        thin["stream"] = True
    if thin.get("n"):
        thin["n"] = thin["n"] % 4 + 1
    return thin


def _known(item: Any) -> Any:
    """A token id that the vocabulary has, a part that names an adapter that there is, or a list of these."""
    if isinstance(item, list):
        return [_known(one) for one in item]
    if isinstance(item, dict) and item.get("type") == "soft_prompt":
        return {**item, "name": "first"}
    return item % VOCABULARY if isinstance(item, int) else item
