"""The start: with a fit store it serves, and otherwise one sentence says why not."""

import os
import signal
import subprocess
import sys

import pytest
from redis.asyncio import Redis
from softprompt_api.rpc.tls import ServerTls
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import SettingsError, read_settings
from softprompt_registry.startup import StoreUnfit, check_store, shown_url


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--appendonly", "no"), "appendonly is 'no' and must be 'yes'"),
        (("--appendfsync", "everysec"), "appendfsync is 'everysec' and must be 'always'"),
        (("--no-appendfsync-on-rewrite", "yes"), "no-appendfsync-on-rewrite is 'yes' and must be 'no'"),
        (("--maxmemory-policy", "allkeys-lru"), "maxmemory-policy is 'allkeys-lru' and must be 'noeviction'"),
        (("--rename-command", "CONFIG", ""), "its settings cannot be read"),
    ],
)
async def test_a_store_that_may_lose_writes_is_refused_unless_durability_is_weak(
    tmp_path, settings, start_valkey, flags, problem
):
    with start_valkey(tmp_path / "weak", *flags) as valkey:
        weak = settings.model_copy(update={"redis_url": valkey.url})
        with pytest.raises(StoreUnfit) as refused:
            await RegistryServer(weak).__aenter__()
        assert problem in str(refused.value)
        assert "--durability weak" in str(refused.value)
        async with RegistryServer(weak.model_copy(update={"durability": "weak"})) as server:
            assert server.port > 0


async def test_weak_durability_is_told_with_every_new_version(client, connect, make_adapter, settings):
    """`client`: its base model is in the store that both registries share."""
    adapter = make_adapter()
    strong = await client.stub.RegisterAdapter(iter(adapter.requests("tweets")))
    async with RegistryServer(settings.model_copy(update={"durability": "weak"})) as server:
        theirs = connect(server.port)
        weak = await theirs.stub.RegisterAdapter(iter(adapter.requests("tweets")))
        assert weak.warnings[:-1] == strong.warnings
        assert "--durability weak" in weak.warnings[-1]
        assert await theirs.get("tweets") == weak.adapter, "the version itself is as any other"
        await theirs.channel.close()


async def test_a_store_that_cannot_be_written_is_refused(settings, redis):
    await redis.config_set("min-replicas-to-write", "1")
    with pytest.raises(StoreUnfit) as refused:
        await RegistryServer(settings).__aenter__()
    assert "cannot be written" in str(refused.value)


async def test_a_store_that_runs_no_scripts_is_refused(settings, redis):
    await redis.acl_setuser("default", enabled=True, nopass=True, commands=["-eval"])
    with pytest.raises(StoreUnfit, match=r"runs no scripts.*EVAL"):
        await RegistryServer(settings).__aenter__()
    await redis.acl_setuser("default", enabled=True, nopass=True, commands=["+eval"])
    async with RegistryServer(settings):
        pass


async def test_registries_may_start_on_one_store_at_the_same_moment(settings, redis):
    class Interleaved(Redis):
        """A store that another registry writes to between any two commands of this one."""

        async def execute_command(self, *args, **options):
            answer = await super().execute_command(*args, **options)
            if args[0] == "EVAL":
                await check_store(redis, durability="strong")
            return answer

    client = Interleaved.from_url(settings.redis_url)
    await check_store(client, durability="strong")
    await client.aclose()
    left = await redis.keys("sp:probe*")
    assert len(left) == 2
    assert all([0 < await redis.ttl(key) <= 60 for key in left])


async def test_a_store_that_is_too_old_is_refused_with_its_version(settings, redis):
    class Old(Redis):
        async def info(self, *sections):
            return {**await super().info(*sections), "redis_version": "6.2.14"}

    client = Old.from_url(settings.redis_url)
    with pytest.raises(StoreUnfit, match=r"is Redis 6\.2\.14; supported: Redis from 7\.0, and Valkey"):
        await check_store(client, durability="weak")
    await client.aclose()


async def test_a_full_store_is_taken_and_emptied(settings, client, connect, make_adapter, redis):
    """`client`: of another registry, with a base model."""
    await client.register("tweets", make_adapter())
    await redis.config_set("maxmemory", "1")
    async with RegistryServer(settings) as server:
        theirs = connect(server.port)
        await theirs.delete("tweets")
        assert await theirs.names() == []
    await redis.config_set("maxmemory", "0")


async def test_a_wrong_password_is_said_at_once_and_never_shown(settings, redis):
    await redis.config_set("requirepass", "open-sesame")
    with_password = settings.redis_url.replace("unix://", "unix://:hunter2@")
    with pytest.raises(StoreUnfit) as refused:
        await RegistryServer(settings.model_copy(update={"redis_url": with_password})).__aenter__()
    assert "refuses the login" in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_a_store_that_is_away_is_waited_for_a_bounded_time(settings):
    away = settings.model_copy(update={"redis_url": "redis://u:secret@127.0.0.1:1/0", "start_timeout_s": 0.5})
    with pytest.raises(StoreUnfit) as refused:
        await RegistryServer(away).__aenter__()
    assert "redis://127.0.0.1:1/0" in str(refused.value)
    assert "secret" not in str(refused.value)


async def test_a_taken_address_is_said(settings, bare_registry):
    taken = settings.model_copy(update={"address": f"127.0.0.1:{bare_registry.port}"})
    with pytest.raises(OSError, match="is another service running there"):
        await RegistryServer(taken).__aenter__()


def test_a_stores_address_is_shown_without_its_password():
    assert shown_url("redis://user:secret@host:6379/0") == "redis://host:6379/0"
    assert shown_url("unix:///data/valkey.sock") == "unix:///data/valkey.sock"


class TestProcess:
    """`python -m softprompt_registry` as its own process."""

    def start(self, *flags: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "softprompt_registry", *flags],
            env={**os.environ, "SOFTPROMPT_LOG_FORMAT": "json", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr:
            if "registry ready" in line:
                return
        raise AssertionError("it ended before it was ready")

    def test_it_says_that_it_is_ready_and_drains_at_sigterm(self, valkey):
        process = self.start("--address", "127.0.0.1:0", "--redis-url", valkey.url)
        self.wait_until_ready(process)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert "registry stopped" in log
        assert process.returncode == 0

    def test_it_can_be_stopped_while_it_waits_for_its_store(self):
        process = self.start("--redis-url", "redis://127.0.0.1:1", "--start-timeout-s", "60")
        for line in process.stderr:
            if "waiting for the store" in line:
                break
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=20)
        assert "Traceback" not in log

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (("--redis-url", "http://x"), "redis_url must begin with redis://"),
            (("--address", "0.0.0.0:0"), "reachable from other machines"),
            (("--redis-url", "redis://127.0.0.1:1", "--start-timeout-s", "0.1"), "no store answers"),
            (("--nonsense", "1"), "nonsense"),
        ],
    )
    def test_what_stops_the_start_is_said_without_a_traceback(self, flags, sentence):
        process = self.start(*flags)
        _, log = process.communicate(timeout=20)
        assert sentence in log
        assert "Traceback" not in log
        assert process.returncode != 0

    def test_it_imports_no_torch_and_no_transformers(self):
        code = (
            "import sys, softprompt_registry.__main__\n"
            "assert not {'torch', 'transformers', 'peft', 'triton'} & sys.modules.keys()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestSettings:
    """Settings come from flags and environment, and what is wrong is said."""

    def test_flags_win_over_the_environment(self, monkeypatch):
        monkeypatch.setenv("SOFTPROMPT_REGISTRY_ADDRESS", "127.0.0.1:1")
        monkeypatch.setenv("SOFTPROMPT_REGISTRY_GRACE_S", "7")
        monkeypatch.setenv("SOFTPROMPT_LOG_FORMAT", "json")
        settings = read_settings(["--address", "127.0.0.1:2"])
        assert (settings.address, settings.grace_s, settings.log_format) == ("127.0.0.1:2", 7, "json")

    def test_the_defaults_are_for_one_machine(self):
        settings = read_settings()
        assert settings.address == "127.0.0.1:2243"
        assert settings.durability == "strong"

    def test_an_unknown_variable_stops_the_start(self, monkeypatch):
        monkeypatch.setenv("SOFTPROMPT_REGISTRY_ADRESS", "x")
        with pytest.raises(SettingsError, match="SOFTPROMPT_REGISTRY_ADRESS"):
            read_settings()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("GRACE_S", "-1"),
            ("DURABILITY", "medium"),
            ("MAX_UPLOADS", "0"),
            ("HEARTBEAT_S", "nan"),
            ("ADDRESS", ""),
        ],
    )
    def test_a_bad_value_stops_the_start(self, monkeypatch, name, value):
        monkeypatch.setenv(f"SOFTPROMPT_REGISTRY_{name}", value)
        with pytest.raises(SettingsError, match=name.lower()):
            read_settings()

    def test_listening_beyond_this_machine_needs_callers_with_certificates(self, authority):
        cert, key = authority.issue()
        pair = ["--address", "0.0.0.0:2243", "--tls-cert", str(cert), "--tls-key", str(key)]
        with pytest.raises(SettingsError, match=r"and asks nobody for a certificate; .* TLS with tls_client_ca"):
            read_settings(pair)
        settings = read_settings([*pair, "--tls-client-ca", str(authority.cert)])
        assert settings.server_tls == ServerTls(cert=cert, key=key, client_ca=authority.cert)

    def test_listening_beyond_this_machine_must_be_meant(self):
        assert read_settings(["--address", "0.0.0.0:2243", "--allow-remote"]).allow_remote
        for address in ("localhost:1", "[::1]:1", "unix:/tmp/x"):
            read_settings(["--address", address])
