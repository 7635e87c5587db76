"""LangChain's standard tests of chat models, with the default model."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from softprompt_inference.model.source import DEFAULT_MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.conformance, pytest.mark.timeout(2400)]

PACKAGES = ("langchain-openai==1.7.4", "langchain-tests==1.1.9")
MODEL = "smol"
NUM_PASSED = 34
# What a model of 135 million parameters does not do, whoever serves it; docs/conformance.md tells more.
BEYOND_THE_MODEL = {
    *("test_agent_loop[model0]", "test_agent_loop[model1]", "test_json_mode"),
    *("test_tool_calling_with_no_arguments", "test_unicode_tool_call_integration"),
}


def test_langchains_standard_tests_pass(
    start_system: Callable[..., Any], python_with: Callable[..., Path], run: Callable[..., str], tmp_path: Path
) -> None:
    system = start_system(
        *("--served-model-name", MODEL, "--kv-cache-gb", "0.1", "--max-model-len", "2048", "--dtype", "bfloat16"),
        model=DEFAULT_MODEL,
    )
    report = tmp_path / "report.xml"
    # The client of a model lives longer than one test, and so must the loop that it is bound to.
    scopes = [f"asyncio_default_{what}_loop_scope=session" for what in ("test", "fixture")]
    options = [word for option in ("asyncio_mode=auto", *scopes) for word in ("-o", option)]
    told = run(
        *(python_with("langchain", *PACKAGES), "-m", "pytest", "-c", "/dev/null", "--rootdir", tmp_path, *options),
        *("-p", "no:cacheprovider", "--noconftest", f"--junitxml={report}"),
        Path(__file__).with_name("langchain_suite.py"),
        codes=(0, 1),
        OPENAI_BASE_URL=f"{system.url}/v1",
        OPENAI_API_KEY="unused",
        CONFORMANCE_MODEL=MODEL,
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {str(case.get("name")) for case in cases if case.find("failure") is not None}
    skipped = [case for case in cases if case.find("skipped") is not None]
    assert failed <= BEYOND_THE_MODEL, told[-20_000:]
    assert len(cases) - len(failed) - len(skipped) >= NUM_PASSED
