"""adapter_config.json to an AdapterSpec, through an allowlist of keys per kind.

PEFT writes its defaults into every file, so a key of an unused feature is accepted while it is off, and a key that
nobody here knows is accepted only while it is null, false or empty. Everything else is refused by name: an adapter
is served as it was trained, or not at all.
"""

from collections.abc import Mapping

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import checks, kinds
from softprompt_api.formats.spec import AdapterFormat, AdapterSpec
from softprompt_api.formats.strict_json import parse_object

MAX_CONFIG_BYTES = 2**20


def parse_config(text: str | bytes) -> AdapterSpec:
    """The spec in the text of an adapter_config.json; AdapterInvalid names the key at fault."""
    size_bytes = len(text.encode(errors="surrogatepass")) if isinstance(text, str) else len(text)
    if size_bytes > MAX_CONFIG_BYTES:
        raise AdapterInvalid(
            f"adapter_config.json has {size_bytes} bytes; at most {MAX_CONFIG_BYTES}", field="config_json"
        )
    config = parse_object(text, what="adapter_config.json", field="config_json")
    format_ = _format(config)
    for key, value in config.items():
        if key == "peft_type":
            continue
        if check := format_.keys.get(key):
            check(key, value)
        elif not checks.is_off(value):
            checks.unsupported(key, value, checks.OFF, because=f"but not known for {format_.kind} adapters")
    return format_.spec(config)


def _format(config: Mapping[str, object]) -> AdapterFormat:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds.FORMATS:
        checks.unsupported("peft_type", kind, ", ".join(sorted(kinds.FORMATS)))
    return kinds.FORMATS[kind]
