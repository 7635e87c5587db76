"""The inference processes of one machine."""

from pathlib import Path

import pytest
from softprompt.cli.options import make_options
from softprompt.cli.replicas import make_replicas
from softprompt.cli.services import Addresses


@pytest.mark.parametrize(("count", "names"), [(1, ["inference"]), (2, ["inference-1", "inference-2"])])
def test_each_has_a_name_a_log_and_an_address(count: int, names: list[str], tmp_path: Path) -> None:
    places = tuple(f"127.0.0.1:{port}" for port in range(1, count + 1))
    addresses = Addresses(redis_url="", registry="r:1", inference=places, gateway_host="h", gateway_port=1)
    replicas = make_replicas(make_options({"replicas": count}), addresses, tmp_path)
    assert [replica.name for replica in replicas] == names
    assert [replica.address for replica in replicas] == list(places)
