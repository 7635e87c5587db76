"""The inference processes of one machine."""

from pathlib import Path
from typing import Any

import pytest
from softprompt.cli import replicas as replicas_module
from softprompt.cli.options import make_options
from softprompt.cli.replicas import make_replicas
from softprompt.cli.services import Addresses


@pytest.mark.parametrize(("count", "names"), [(1, ["inference"]), (2, ["inference-1", "inference-2"])])
def test_each_has_a_name_a_log_and_an_address(
    count: int, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    asked: list[str] = []
    monkeypatch.setattr(
        replicas_module, "Child", lambda name, _, **told: started.append({"name": name, **told}) or "a process"
    )
    monkeypatch.setattr(replicas_module, "is_serving", lambda address, _: asked.append(address) or True)
    places = [f"127.0.0.1:{port}" for port in range(1, count + 1)]
    addresses = Addresses(redis_url="", registry="r:1", inference=tuple(places), gateway_host="h", gateway_port=1)
    replicas = make_replicas(make_options({"replicas": count}), addresses, tmp_path)
    assert [replica.name for replica in replicas] == names
    for replica in replicas:
        replica.start()
        assert replica.looks_well()
    assert asked == places
    assert [one["name"] for one in started] == names
    assert [one["log"] for one in started] == [tmp_path / f"{name}.log" for name in names]
    assert [one["env"]["SOFTPROMPT_INFERENCE_ADDRESS"] for one in started] == places
