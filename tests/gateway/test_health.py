"""Health, metrics, version."""

from typing import Any

import pytest
from softprompt_api import errors


async def test_live_and_version_answer(stack: Any) -> None:
    assert (await stack.http.get("/health/live")).json() == {"status": "ok"}
    assert (await stack.http.get("/version")).json()["version"]


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
async def test_ready_when_both_services_serve(stack: Any, path: str) -> None:
    response = await stack.http.get(path)
    assert (response.status_code, response.json()["status"]) == (200, "ok")


async def test_not_ready_while_the_inference_service_starts(stack: Any) -> None:
    await stack.services["inference"].set_serving(False)
    response = await stack.http.get("/health/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "inference": "not serving", "registry": "serving"}


async def test_head_tells_that_it_is_not_ready(stack: Any) -> None:
    assert (await stack.http.head("/health")).status_code == 200
    await stack.services["inference"].set_serving(False)
    response = await stack.http.head("/health/ready")
    assert (response.status_code, response.content) == (503, b"")


async def test_metrics_answer_head(stack: Any) -> None:
    response = await stack.http.head("/metrics")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) > 1000


async def test_degraded_once_the_registry_is_gone_and_its_adapters_are_known(stack: Any) -> None:
    await stack.registry.add("loud")
    await stack.until_listed("loud")
    await stack.services["registry"].stop(0)
    response = await stack.http.get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")


async def test_metrics_count_requests_tokens_and_the_engines_load(stack: Any) -> None:
    await stack.complete("hello")
    await stack.events("/v1/completions", model=stack.base, prompt="hello")
    await stack.http.get("/v1/models/never-heard-of")
    await stack.http.get("/no/such/route")
    await stack.http.request("BREW", "/v1/models")
    text = (await stack.http.get("/metrics")).text
    name = stack.replica_name(0)
    for line in (
        'softprompt_gateway_requests_total{method="POST",route="/v1/completions",status="200"} 2.0',
        'softprompt_gateway_requests_total{method="GET",route="/v1/models/{id_:path}",status="404"} 1.0',
        'softprompt_gateway_requests_total{method="GET",route="unmatched",status="404"} 1.0',
        'softprompt_gateway_tokens_total{kind="prompt"} 10.0',
        f'softprompt_engine_up{{replica="{name}"}} 1.0',
        f'softprompt_engine_num_pages{{replica="{name}"}} 64.0',
        f'softprompt_engine_generated_tokens_total{{replica="{name}"}} 7.0',
        f'softprompt_inference_adapters{{replica="{name}",tier="device"}} 2.0',
        f'softprompt_inference_adapters{{replica="{name}",tier="host"}} 3.0',
        f'softprompt_inference_adapter_bytes{{replica="{name}",tier="host"}} 600.0',
        f'softprompt_inference_adapter_hits_total{{replica="{name}",tier="device"}} 9.0',
        f'softprompt_inference_adapter_hits_total{{replica="{name}",tier="host"}} 5.0',
        f'softprompt_inference_adapter_hits_total{{replica="{name}",tier="registry"}} 4.0',
        "softprompt_gateway_known_adapters 0.0",
    ):
        assert line in text
    assert 'method="other"' in text
    assert "BREW" not in text
    assert "never-heard-of" not in text


async def test_metrics_have_the_names_that_vllms_users_know(stack: Any) -> None:
    await stack.complete("hello", n=2)
    await stack.events("/v1/completions", model=stack.base, prompt="hello", max_tokens=2)
    text = (await stack.http.get("/metrics")).text
    of_engine = f'{{engine="0",model_name="{stack.base}"}}'
    of_model = f'{{model_name="{stack.base}"}}'
    for line in (
        f"vllm:num_requests_running{of_engine} 0.0",
        f"vllm:num_requests_waiting{of_engine} 2.0",
        f"vllm:kv_cache_usage_perc{of_engine} 0.25",
        f"vllm:prompt_tokens_total{of_engine} 40.0",
        f"vllm:generation_tokens_total{of_engine} 7.0",
        f"vllm:prefix_cache_queries_total{of_engine} 40.0",
        f"vllm:prefix_cache_hits_total{of_engine} 10.0",
        f"vllm:num_preemptions_total{of_engine} 0.0",
        'vllm:lora_requests_info{max_lora="16",running_lora_adapters="formal,terse",waiting_lora_adapters=""} ',
        f'vllm:request_success_total{{finished_reason="stop",model_name="{stack.base}"}} 2.0',
        f'vllm:request_success_total{{finished_reason="length",model_name="{stack.base}"}} 1.0',
        f"vllm:time_to_first_token_seconds_count{of_model} 2.0",
        f"vllm:e2e_request_latency_seconds_count{of_model} 2.0",
        f"vllm:request_time_per_output_token_seconds_count{of_model} 2.0",
        # Two choices of five tokens, and one of two.
        f"vllm:inter_token_latency_seconds_count{of_model} 9.0",
        f'vllm:inter_token_latency_seconds_bucket{{le="+Inf",model_name="{stack.base}"}} 9.0',
    ):
        assert line in text


async def test_metrics_tell_generations_that_were_broken_off(stack: Any) -> None:
    await stack.complete("break OVERLOADED")
    async with stack.http.stream(
        "POST", "/v1/completions", json={"model": stack.base, "prompt": "stall", "stream": True}
    ) as answer:
        await anext(answer.aiter_lines())
    await stack.inference.until(lambda fake: fake.cancelled)
    text = (await stack.http.get("/metrics")).text
    for reason in ("error", "abort"):
        assert f'request_success_total{{finished_reason="{reason}",model_name="{stack.base}"}} 1.0' in text
    assert f'vllm:e2e_request_latency_seconds_count{{model_name="{stack.base}"}}' not in text


@pytest.mark.parametrize("gateway_settings", [{"metrics_adapters": 2}])
async def test_adapters_have_counters_of_their_own_up_to_a_number(stack: Any) -> None:
    for name in ("one", "two", "three", "four"):
        await stack.registry.add(name)
    for name in ("one", "two", "three", "four", "one"):
        assert (await stack.complete("hello", model=name)).status_code == 200
    text = (await stack.http.get("/metrics")).text
    for adapter, times in {"one": 2, "two": 1, "(other)": 2}.items():
        assert f'softprompt_gateway_adapter_requests_total{{adapter="{adapter}"}} {times}.0' in text
        for kind in ("prompt", "completion"):
            line = f'softprompt_gateway_adapter_tokens_total{{adapter="{adapter}",kind="{kind}"}} {5 * times}.0'
            assert line in text
    assert "three" not in text


async def test_metrics_answer_without_an_engine(stack: Any) -> None:
    await stack.services["inference"].stop(0)
    text = (await stack.http.get("/metrics")).text
    assert f'softprompt_engine_up{{replica="{stack.replica_name(0)}"}} 0.0' in text
    assert "softprompt_engine_num_pages{" not in text


async def test_a_broken_registry_is_no_reason_to_restart_the_gateway(stack: Any) -> None:
    stack.registry.error = errors.Unavailable("away")
    assert (await stack.http.get("/health/live")).status_code == 200
