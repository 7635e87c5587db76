"""Parse hostile configs of every kind in a process of its own, and tell what it was seen to reach for."""

import json
import sys

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import parse_config
from softprompt_api.formats.kinds import FORMATS

WATCHED = (
    *("import", "open", "exec", "compile", "ctypes.", "marshal.", "pickle.", "os.", "shutil.", "subprocess."),
    *("socket.", "urllib.", "http.", "ftplib.", "webbrowser."),
)
SIZES = {
    "num_virtual_tokens": 5,
    "token_dim": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_tasks": 2,
    "num_ranks": 1,
    "r": 4,
    "lora_alpha": 8,
}
KEYS = ("auto_mapping", "megatron_core", "megatron_config", "chat_template", "a_path")
VALUES = (
    "antigravity",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "org/adapter",
    "os.system",
    "__import__('os')",
    {"trust_remote_code": True},
    {"base_model_class": "antigravity", "parent_library": "antigravity"},
    {"antigravity": 1},
    ["antigravity", "/etc/passwd"],
    {"q_proj": 3, "(a+)+$": 1},
    {"q_proj|v_proj": 3},
    True,
    7,
)


def main() -> None:
    texts = []
    for kind, format_ in FORMATS.items():
        sizes = {key: value for key, value in SIZES.items() if key in format_.keys}
        for key in (*format_.keys, *KEYS):
            texts += [json.dumps({"peft_type": kind, **sizes, key: value}) for value in VALUES]
    seen: list[str] = []
    sys.addaudithook(
        lambda event, arguments: seen.append(f"{event} {arguments[:1]}") if event.startswith(WATCHED) else None
    )
    num_refused = 0
    for text in texts:
        try:
            parse_config(text)
        except AdapterInvalid:
            num_refused += 1
    while_parsing = list(seen)
    with open(__file__):
        sees = len(seen) > len(while_parsing)
    print(json.dumps({"seen": while_parsing, "sees": sees, "num_texts": len(texts), "num_refused": num_refused}))


main()
