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


async def test_metrics_answer_without_an_engine(stack: Any) -> None:
    await stack.services["inference"].stop(0)
    text = (await stack.http.get("/metrics")).text
    assert f'softprompt_engine_up{{replica="{stack.replica_name(0)}"}} 0.0' in text
    assert "softprompt_engine_num_pages{" not in text


async def test_a_broken_registry_is_no_reason_to_restart_the_gateway(stack: Any) -> None:
    stack.registry.error = errors.Unavailable("away")
    assert (await stack.http.get("/health/live")).status_code == 200
