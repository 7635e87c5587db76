#!/bin/sh
# Install the registry and the gateway alone into a clean environment: they must run without torch.
# usage: light_install.sh PYTHON
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[gateway,registry]'
cd "$folder"  # so that nothing is imported from the working tree
venv/bin/python - <<'CHECK'
import importlib.util
import softprompt, softprompt.cli, softprompt_gateway.__main__, softprompt_registry.__main__

for name in ("torch", "transformers", "triton", "peft"):
    assert importlib.util.find_spec(name) is None, f"{name} was installed"
try:
    softprompt.LLM
except softprompt.MissingExtra as error:
    print(f"LLM: {error}")
else:
    raise AssertionError("LLM was importable without torch")
CHECK
venv/bin/python -m softprompt_registry --help >/dev/null
venv/bin/softprompt run --help >/dev/null
du -sh venv/lib | sed 's/\t.*/ installed, without torch/'
