"""The embedded store: a real server, one per data folder, that loses nothing and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from softprompt.cli import store as embedded
from softprompt.cli.problems import Problem, WrongUsage
from softprompt.cli.processes import Child
from softprompt.cli.stopping import Stop
from softprompt.cli.store import EmbeddedStore, locked, socket_path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def children() -> Iterator[list[Child]]:
    children: list[Child] = []
    yield children
    for child in children:
        child.end(10)


def store_in(data_dir: Path) -> EmbeddedStore:
    return EmbeddedStore(data_dir, data_dir / "logs", Stop())


def test_it_answers_redis_and_writes_every_change_to_disk(data_dir: Path, children: list[Child]) -> None:
    store = store_in(data_dir)
    children.append(store.start())
    with redis.Redis.from_url(store.url) as client:
        assert client.ping()
        config = client.config_get("append*")
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("port")["port"] == "0"


@pytest.mark.parametrize("name", ["one #1", "what?x=1", "50%41", "a\tb", "ключ;"])
def test_its_address_leads_to_it_in_a_folder_of_any_name(name: str, tmp_path: Path, children: list[Child]) -> None:
    store = store_in(tmp_path / name)
    children.append(store.start())
    with redis.Redis.from_url(store.url) as client:
        assert client.ping()


def test_what_was_acknowledged_survives_a_kill(data_dir: Path, children: list[Child]) -> None:
    store = store_in(data_dir)
    children.append(store.start())
    with redis.Redis.from_url(store.url) as client:
        client.set("key", "value")
    os.kill(children[0].pid, signal.SIGKILL)
    children[0].end(10)
    children.append(store.start())
    with redis.Redis.from_url(store.url) as client:
        assert client.get("key") == b"value"


def test_a_store_that_outlived_its_system_is_ended_before_a_new_one_starts(
    data_dir: Path, children: list[Child]
) -> None:
    store = store_in(data_dir)
    children.append(store.start())
    with redis.Redis.from_url(store.url) as client:
        client.set("key", "value")
    children.append(store.start())
    assert children[0].end(0) == 0
    with redis.Redis.from_url(store.url) as client:
        assert client.get("key") == b"value"


def test_a_store_that_has_much_to_load_is_waited_for(
    data_dir: Path, children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a server with many gigabytes of adapters answers, for longer than any other start may take.
    answers = iter([None, *["-LOADING Valkey is loading the dataset in memory"] * 5, "+PONG"])
    seconds = iter(range(0, 10_000, 20))
    monkeypatch.setattr(embedded, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(embedded, "ask", lambda _path, _command: next(answers))
    children.append(store_in(data_dir).start())
    assert list(answers) == []
    assert next(seconds) > embedded.START_TIMEOUT_S


def test_a_data_folder_serves_one_system_at_a_time(data_dir: Path) -> None:
    holder = rf"in use by another softprompt \(process {os.getpid()}\)"
    with locked(data_dir), pytest.raises(WrongUsage, match=holder), locked(data_dir):
        pass
    with locked(data_dir):
        pass


def test_the_lock_is_free_after_its_holder_was_killed(data_dir: Path) -> None:
    script = (
        "import time; from pathlib import Path; from softprompt.cli.store import locked\n"
        f"with locked(Path({str(data_dir)!r})):\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WrongUsage, match="in use"), locked(data_dir):
            pass
        holder.kill()
    with locked(data_dir):
        pass


def test_a_server_that_does_not_start_shows_its_log(data_dir: Path) -> None:
    (data_dir / "store" / "appendonlydir").mkdir(parents=True)
    (data_dir / "store" / "appendonlydir" / "appendonly.aof.manifest").write_text("this is no manifest\n")
    with pytest.raises(Problem, match=r"the store .* did not start") as raised:
        store_in(data_dir).start()
    assert "manifest" in raised.value.detail


def test_without_any_server_three_ways_are_named(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Problem, match=r"--redis-url.*valkey-server or redis-server.*softprompt\[embedded\]"):
        store_in(data_dir)


def test_a_server_on_the_path_is_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = tmp_path / "redis-server"
    server.symlink_to(embedded.find_server())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded.find_server() == server


def test_a_folder_too_deep_for_a_socket_is_served_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    store = store_in(deep)
    child = store.start()
    with redis.Redis.from_url(store.url) as client:
        assert client.ping()
    path = socket_path(deep / "store")
    assert len(os.fsencode(path)) <= 103
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path == socket_path(deep / "store")
    assert child.end(10) == 0
    path.parent.rmdir()
