"""`softprompt bench` against a real gateway whose model repeats prompts, one byte a token."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest


async def bench(stack: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "softprompt.cli", "bench", "--base-url", f"{stack.url}/v1", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_a_run_is_counted_and_kept(stack: Any, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    code, output, errors = await bench(
        stack,
        *("--num-prompts", "12", "--prompt-len", "6:9", "--output-len", "5", "--max-concurrency", "4"),
        *("--goodput", "ttft:60000", "tpot:60000", "--save-result", str(result)),
    )
    assert (code, errors) == (0, "")
    kept = json.loads(result.read_text())
    figures, requests = kept["figures"], stack.inference.requests
    assert figures["successful_requests"] == len(requests) == 12
    assert figures["generated_tokens"] == 12 * 5
    assert figures["input_tokens"] == sum(len(request.token_ids.ids) for request in requests)
    assert {len(request.token_ids.ids) for request in requests} <= {6, 7, 8, 9}
    assert all(request.sampling.ignore_eos and request.sampling.temperature == 0 for request in requests)
    assert figures["goodput"] == figures["request_throughput"]
    assert kept["settings"]["models"] == [stack.base]
    assert kept["settings"]["goodput"] == {"ttft": 60000.0, "tpot": 60000.0}
    lines = {name: value.strip() for name, _, value in (line.partition(":") for line in output.splitlines())}
    assert lines["Successful requests"] == "12"
    assert lines["Total generated tokens"] == "60"


async def test_all_adapters_take_part(stack: Any) -> None:
    digests = {(await stack.registry.add(name)).digest for name in ("loud", "shrill")}
    await stack.until_listed("loud", "shrill")
    code, _, _ = await bench(stack, "--adapters", "all", "--num-prompts", "16", "--output-len", "2")
    assert code == 0
    assert {request.adapter for request in stack.inference.requests} == digests


async def test_named_models_are_asked_by_their_popularity(stack: Any) -> None:
    loud, shrill = (await stack.registry.add("loud"), await stack.registry.add("shrill"))
    names = ("--model", "shrill@1", "--adapters", "loud", "--zipf", "3")
    code, _, _ = await bench(stack, *names, "--num-prompts", "40", "--output-len", "2")
    assert code == 0
    asked = [request.adapter for request in stack.inference.requests]
    assert asked.count(shrill.digest) > asked.count(loud.digest) > 0


async def test_prompts_come_from_a_file(stack: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"first one"\n\n{"prompt": "second one", "other": 1}\n')
    code, _, _ = await bench(stack, "--dataset", str(file), "--num-prompts", "3", "--request-rate", "1000")
    assert code == 0
    assert sorted(request.text for request in stack.inference.requests) == ["first one", "first one", "second one"]


async def test_failures_are_counted_and_the_first_is_told(stack: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"refuse OVERLOADED"\n"hello"\n"break DATA_CORRUPTED"\n')
    code, output, errors = await bench(stack, "--dataset", str(file), "--num-prompts", "3")
    assert code == 0
    assert "Failed requests:" in output
    assert errors == "2 requests failed, the first: 503: refused as asked\n"


async def test_a_run_in_which_all_failed_fails(stack: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"refuse OVERLOADED"\n')
    code, _, errors = await bench(stack, "--dataset", str(file), "--num-prompts", "2")
    assert code == 1
    assert "2 requests failed" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "acme/tiny-2"), "has no model 'acme/tiny-2'; it has 1, such as acme/tiny-1"),
        (("--adapters", "loud"), "has no model 'loud'"),
        (("--adapters", "all"), "lists no adapters"),
    ],
)
async def test_a_model_that_is_not_there_is_told_before_the_run(
    stack: Any, arguments: tuple[str, str], message: str
) -> None:
    code, output, errors = await bench(stack, *arguments)
    assert (code, output) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert stack.inference.requests == []


@pytest.mark.parametrize("line", ["{}", "1", '""', "not JSON", '{"prompt": 5}'])
async def test_a_file_that_has_no_prompts_is_told(stack: Any, tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n{line}\n')
    code, _, errors = await bench(stack, "--dataset", str(file))
    assert code == 2
    assert f"line 2 of {file}" in errors
