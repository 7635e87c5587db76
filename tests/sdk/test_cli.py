"""Wrong arguments: one plain line on standard error, exit 2, no traceback, nothing started."""

import builtins
import io
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from softprompt.cli import doctor, main


def told(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> int:
    """The status that a command ends with after it said this, and neither it nor a library anything else."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capfd.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.err.startswith("softprompt: ")
    assert said.out == ""
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "--prot", "1"], "No such option"),
        (["run", "--port", "x"], "Invalid value for '--port'"),
        (["run", "--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["run", "--prompt-adapters"], "requires an argument"),
        (["run", "--prompt-adapters", "tweet"], "--prompt-adapters: 'tweet' is not NAME=PATH"),
        (["run", "--prompt-adapters", "tweet=/no/such/folder"], "adapter 'tweet': there is no folder"),
        (["run", "--prompt-adapters", "tweet=~nobody-here/x"], "adapter 'tweet': there is no home folder for"),
        (["run", "--data-dir", "~nobody-here/x"], "there is no home folder for ~nobody-here/x"),
        (["run", "--lora-modules", "a=/no/such/folder"], "adapter 'a': there is no folder"),
        (
            ["run", "--lora-modules", "a=x", "--prompt-adapters", "a=y"],
            "--lora-modules: 'a' is the name of a soft",
        ),
        (["run", "--max-loras=-1"], "--max-loras: Input should be greater than or equal to 0"),
        (["run", "--config", "/no/such.yaml"], "cannot read the config file /no/such.yaml"),
        (["run", "--redis-url", ""], "--redis-url"),
        (["run", "--redis-url", "http://x"], "--redis-url: must begin with redis://, rediss://, unix://"),
        (["run", "--device", "gpu"], "--device: 'gpu' is none of auto, cpu, cuda, cuda:N"),
        (["run", "--kv-cache-gb", "inf"], "--kv-cache-gb: Input should be a finite number"),
        (["run", "--allow-file-imports", "/no/such"], "--allow-file-imports: there is no folder /no/such"),
        (
            ["run", "--allowed-origins", "https://app.example/"],
            "--allowed-origins: 'https://app.example/' is neither",
        ),
        (["serve", "nothing"], "Invalid value"),
        (["adapter", "add", "name"], "Missing argument"),
        (["adapter", "add", "name", "path", "--label", "x"], "'x' is not KEY=VALUE"),
        (["adapter", "alias", "name", "prod"], "give the VERSION that the alias shall point to, or --remove"),
        (["adapter", "alias", "name", "prod", "1", "--remove"], "give the VERSION"),
        (["adapter", "alias", "name", "prod", "0"], "Invalid value for 'version'"),
        (["adapter", "alias", "name", "prod", "99999999999"], "Invalid value for 'version'"),
        (["adapter", "alias", "name", "prod", "1", "--expect", "99999999999"], "Invalid value for '--expect'"),
        (["adapter", "rollback", "name", "--to", "99999999999"], "Invalid value for '--to'"),
        (["key", "create", "--tokens-per-minute", "99999999999"], "Invalid value for '--tokens-per-minute'"),
        (["adapter", "nearest", "name", "--top-k", "21"], "Invalid value for '--top-k'"),
        (["adapter", "verify", "name", "--prompt", ""], "--prompt: a prompt must not be empty"),
        (["adapter", "rollback", "name", "--to", "0"], "Invalid value for '--to'"),
        (["adapter", "label", "name"], "give labels to set as KEY=VALUE, or --remove KEY"),
        (["adapter", "label", "name", "x"], "'x' is not KEY=VALUE"),
        (
            ["key", "create", "--scopes", "root"],
            "'root' is not a list of infer, adapters:read, adapters:write, admin",
        ),
        (["key", "create", "--scopes", "infer,"], "--scopes: 'infer,' is not a list"),
        (["key", "create", "--expires-in-days", "1e99"], "--expires-in-days: 1e+99 days are no time"),
        (["key", "create", "--requests-per-minute", "-1"], "Invalid value for '--requests-per-minute'"),
        (["key", "revoke"], "Missing argument"),
        (["--tls-ca", "/no/such.pem", "key", "ls"], "cannot read /no/such.pem: No such file"),
        (["--tls-client-cert", "a.pem", "key", "ls"], "tls_client_cert and tls_client_key are needed, both"),
        (["run", "--tls-cert", "a.pem"], "tls_key: tls_cert and tls_key are needed, both of them"),
        (["run", "--tls-cert", "a.pem", "--tls-key", "/no/such.key"], "--tls-key: cannot read a.pem"),
        (["complete", "--max-tokens", "0", "hello"], "Invalid value for '--max-tokens'"),
        (["complete"], "there is no prompt"),
        (["complete", os.fsdecode(b"\xff")], "the text is not UTF-8"),
        (["adapter", "label", "x", os.fsdecode(b"a=\xff")], "an argument is not UTF-8"),
        (["adapter", "ls", "--label", os.fsdecode(b"a=\xff")], "an argument is not UTF-8"),
        (["bench", "--num-prompts", "0"], "Invalid value for '--num-prompts'"),
        (["bench", "--request-rate", "0"], "--request-rate: '0' is neither a number above 0 nor inf"),
        (["bench", "--request-rate", "nan"], "--request-rate: 'nan' is neither"),
        (
            ["bench", "--prompt-len", "9:3"],
            "--prompt-len: '9:3' is neither a number of tokens above 0 nor MIN:MAX",
        ),
        (["bench", "--output-len", "0"], "--output-len: '0' is neither"),
        (["bench", "--zipf", "-1"], "Invalid value for '--zipf'"),
        (["bench", "--goodput", "ttft"], "--goodput: 'ttft' is not NAME:MILLISECONDS; names are ttft, tpot, e2el"),
        (["bench", "--goodput", "itl:5"], "--goodput: 'itl:5' is not NAME:MILLISECONDS"),
        (["bench", "--dataset", "/no/such.jsonl"], "--dataset: cannot read /no/such.jsonl: No such file"),
        (
            ["bench", "--save-result", "/no/such/result.json"],
            "--save-result: /no/such/result.json cannot be written",
        ),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert told(arguments, message, capfd) == 2


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"softprompt {version('softprompt')}\n"


@pytest.mark.parametrize("group", [[], ["adapter"], ["key"]])
def test_without_a_command_the_help_is_shown_as_it_is(
    group: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(group)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"Usage: {' '.join(['softprompt', *group])} [OPTIONS] COMMAND")
    assert "\nCommands:\n" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter", "ls", "--registry", "127.0.0.1:1"], "no registry answers at 127.0.0.1:1"),
        (["key", "ls", "--registry", "127.0.0.1:1"], "no registry answers at 127.0.0.1:1"),
        (["adapter", "probe", "a", "--inference", "127.0.0.1:1"], "no inference service answers at 127.0.0.1:1"),
        (["adapter", "nearest", "a", "--inference", "127.0.0.1:1"], "no inference service answers at 127.0.0.1:1"),
        (["adapter", "verify", "a", "--registry", "127.0.0.1:1"], "no registry answers at 127.0.0.1:1"),
        (["complete", "hello", "--url", "http://127.0.0.1:1"], "no gateway answers at http://127.0.0.1:1"),
        (["complete", "hello", "--url", "http://[::1"], "no gateway answers at http://[::1"),
        (["complete", "hello", "--url", "http://localhost:x"], "no gateway answers at http://localhost:x"),
        (["complete", "hello", "--api-key", "ключ"], "an API key consists of printable ASCII characters"),
        (["bench", "--api-key", "ключ"], "an API key consists of printable ASCII characters"),
        (["adapter", "rm", f"sha256:{64 * 'a'}", "--registry", "127.0.0.1:1"], "say NAME@VERSION"),
        (["bench", "--base-url", "http://127.0.0.1:1/v1"], "no server answers at http://127.0.0.1:1"),
    ],
)
def test_a_system_that_is_not_there_is_told_in_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert told(arguments, message, capfd) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["run"], {"SOFTPROMPT_PORT": "many"}, 2, "Invalid value for '--port' (env var: 'SOFTPROMPT_PORT')"),
        (
            ["adapter", "ls"],
            {"SOFTPROMPT_REGISTRY_ADDRESS": "127.0.0.1:1"},
            1,
            "no registry answers at 127.0.0.1:1",
        ),
    ],
)
def test_a_process_of_its_own_ends_in_the_same_way(
    arguments: list[str], variables: dict[str, str], code: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "softprompt.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code
    assert done.stderr.startswith(f"softprompt: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom softprompt.cli import main\nmain(['run', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--prompt-adapters" in done.stdout


def test_verify_without_peft_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from softprompt.cli import main\nmain(['adapter', 'verify', 'name', '--registry', '127.0.0.1:1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "peft is not installed: pip install 'softprompt[inference,train]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["http://xn--/", f"http://{'x' * 64}/"])
def test_a_host_that_no_name_can_be_is_told(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert told(["complete", "--url", url, "hello"], "what was given cannot be sent to 'http://x", capfd) == 1


def test_a_torch_that_cannot_be_imported_is_told_with_all_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import_ = builtins.__import__

    def broken(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return import_(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    text = " ".join(capfd.readouterr().out.split())
    assert "cannot be imported: libcudart.so.12" in text
    assert "data folder" in text


def test_a_machine_without_a_compiler_is_advised_to_have_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(doctor, "_ports", list)  # others may have them
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--data-dir", str(tmp_path)])
    assert ended.value.code == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "~ CPU kernels false failed" in text
    assert "→ install gcc" in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SOFTPROMPT_ENABLE_LORA", "false", "--enable-lora: must be true"),
        ("SOFTPROMPT_ENABLE_PROMPT_ADAPTER", "false", "--enable-prompt-adapter: must be true"),
        ("SOFTPROMPT_PROMPT_ADAPTERS", "first=/no/such second=/nor/such", "/no/such"),
        ("SOFTPROMPT_LORA_MODULES", "first=/no/such", "/no/such"),
    ],
)
def test_what_is_served_may_be_set_by_the_environment(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert told(["run"], message, capfd) == 2


def test_a_folder_for_logs_that_is_none_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").touch()
    assert told(["run", "--data-dir", str(tmp_path)], "inference could not be started: ", capfd) == 1


def test_a_terminal_that_lacks_a_character_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="iso8859-1", errors="strict"))
    monkeypatch.setattr(
        doctor, "_torch", lambda: [doctor.Finding(subject="torch", state="for é", remedy="another")]
    )
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    text = written.getvalue().decode("iso8859-1")
    assert "for é" in text
    assert "? another" in text
