"""OpenAI's client for Node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.conformance, pytest.mark.timeout(2400)]

PACKAGES = ("openai@7.55.0", "zod@4.4.3")


def test_openais_client_for_node_gets_what_it_expects(
    small_system: Any, node_with: Callable[..., Path], run: Callable[..., str]
) -> None:
    folder = node_with("openai-node", *PACKAGES)
    told = run("node", Path(__file__).with_name("openai_node.mjs"), folder, small_system.url)
    counts = dict(
        line.split()[1:3] for line in told.splitlines() if line[:2] in ("# ", "ℹ ") and len(line.split()) == 3
    )
    assert (counts["tests"], counts["pass"], counts["skipped"]) == ("10", "10", "0"), told
