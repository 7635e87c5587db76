"""Flags, environment and config file become one set of options."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from softprompt.cli import app, doctor, main, run
from softprompt.cli.options import RunOptions, default_data_dir, expand_data_dir, make_options
from softprompt.cli.problems import WrongUsage
from softprompt.cli.services import Addresses, environment
from typer.main import get_command


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_the_default_model_is_served_on_the_default_port() -> None:
    options = make_options({})
    assert options.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (options.port, options.host, options.max_prompt_adapter_token) == (2242, "127.0.0.1", 512)


def test_the_seeds_config_file_is_read(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "model: some/model\nenable_prompt_adapter: true\nprompt_adapters:\n  tweet_adapter: ./tweets\n"
        "max_prompt_adapter_token: 128\n",
    )
    options = make_options({}, path)
    assert options.model == "some/model"
    assert options.prompt_adapters == {"tweet_adapter": "./tweets"}
    assert options.max_prompt_adapter_token == 128


def test_loras_are_registered_beside_soft_prompts(tmp_path: Path) -> None:
    text = "prompt_adapters: {a: x}\nlora_modules: [b=y]\nmax_loras: 4\nmax_lora_rank: 32\n"
    options = make_options({}, config(tmp_path, text))
    assert options.adapters == {"a": "x", "b": "y"}
    assert (options.max_loras, options.max_lora_rank) == (4, 32)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    options = make_options({"model": "flag", "port": None}, config(tmp_path, "model: file\nport: 1\n"))
    assert (options.model, options.port) == ("flag", 1)


@pytest.mark.parametrize(
    "text",
    [
        "prompt_adapters: {a: x, b: y}",
        "prompt-adapters: [a=x, b=y]",
        "prompt_adapters: [{name: a, path: x}, {name: b, path: y}]",
        "prompt_adapters: [a: x, b: y]",
    ],
)
def test_adapters_may_be_a_mapping_or_a_list(tmp_path: Path, text: str) -> None:
    assert make_options({}, config(tmp_path, text)).prompt_adapters == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt_adapters: {}", "unknown key 'promt_adapters' in .*; did you mean 'prompt_adapters'?"),
        ("zzz: 1", "unknown key 'zzz' in .*; known keys: model, "),
        ("enable_lora: false", "enable_lora in .*: must be true"),
        ("lora_modules: [a]", "'a' is not NAME=PATH"),
        (
            "prompt_adapters: {a: x}\nlora_modules: {a: y}",
            "lora_modules in .*: 'a' is the name of a soft prompt too",
        ),
        ("port: '2242'", "port in .*: Input should be a valid integer"),
        ("port: 70000", "port in .*: Input should be less than or equal to 65535"),
        ("model: 3", "model in .*: Input should be a valid string"),
        ("enable_prompt_adapter: false", "enable_prompt_adapter in .*: must be true"),
        ("prompt_adapters: {Bad Name: x}", "'Bad Name' is not an adapter name"),
        ("prompt_adapters: [a]", "'a' is not NAME=PATH"),
        ("prompt_adapters: 3", "must be a mapping of names to paths"),
        ("prompt_adapters: [a=x, a=y]", "'a' is given twice, with different paths"),
        ("prompt_adapters: {a: x, a: y}", "the key 'a' is given twice"),
        ("- model", "must hold `key: value` lines"),
        ("model: [", "is not valid YAML"),
        ("model: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_a_wrong_file_stops_the_start_and_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        make_options({}, config(tmp_path, text))


def test_a_wrong_flag_is_named_as_a_flag() -> None:
    with pytest.raises(WrongUsage, match=r"--kv-cache-gb: Input should be greater than 0"):
        make_options({"kv_cache_gb": -1.0})


@pytest.mark.parametrize("share", [0.0, 1.5, 90.0])
def test_a_share_of_the_gpu_is_no_percentage(share: float) -> None:
    with pytest.raises(
        WrongUsage, match=r"--gpu-memory-utilization: Input should be (greater than 0|less than or equal to 1)"
    ):
        make_options({"gpu_memory_utilization": share})


ORIGINS = "https://app.example,http://localhost:5173"


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_the_gateway_is_told_whose_pages_are_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    given = {"SOFTPROMPT_ALLOWED_ORIGINS": ORIGINS} if source == "variable" else {}
    monkeypatch.setattr(os, "environ", {**os.environ, **given})
    told: list[RunOptions] = []
    monkeypatch.setattr(run, "Supervisor", lambda options, *_: SimpleNamespace(run=lambda: told.append(options)))
    monkeypatch.setattr(run, "Stop", lambda: SimpleNamespace(listen=lambda: None))
    flags = {"flag": ["--allowed-origins", ORIGINS], "variable": []}
    file = ["--config", str(config(tmp_path, f"allowed_origins: {ORIGINS}"))]
    with pytest.raises(SystemExit) as ended:
        main(["run", *flags.get(source, file)])
    assert (ended.value.code, told[0].allowed_origins) == (0, ORIGINS)
    addresses = Addresses(redis_url="", registry="", inference=("",), gateway_host="", gateway_port=0)
    settings = environment("gateway", told[0], addresses)
    assert settings["SOFTPROMPT_GATEWAY_ALLOWED_ORIGINS"] == ORIGINS
    assert "SOFTPROMPT_ALLOWED_ORIGINS" not in settings


def test_a_gateways_own_variable_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOFTPROMPT_GATEWAY_ALLOWED_ORIGINS", "http://localhost:1")
    with pytest.raises(SystemExit):
        main(["run", "--allowed-origins", ORIGINS])
    assert "here it is --allowed-origins, or SOFTPROMPT_ALLOWED_ORIGINS" in capfd.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"cannot read the config file .*nothing.yaml: No such file"):
        make_options({}, tmp_path / "nothing.yaml")


def test_without_a_home_folder_the_flag_for_the_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(WrongUsage, match=r"no home folder for ~/.local/share/softprompt: .*--data-dir"):
        expand_data_dir(make_options({}).data_dir)
    assert doctor._folder(default_data_dir()).state == "none"
    assert expand_data_dir(make_options({"data_dir": "/data"}).data_dir) == Path("/data")


@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_a_file_is_no_data_folder(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = doctor._folder(str(file / below))
    assert (found.state, found.remedy) == (f"{file} is not a folder", "choose another with --data-dir")
    assert doctor._folder(str(tmp_path / below)).remedy == ""


def test_an_empty_file_leaves_the_defaults(tmp_path: Path) -> None:
    assert make_options({}, config(tmp_path, "")) == RunOptions()


def test_the_documentation_tells_every_variable_of_run_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    table = page.partition("<!-- settings: softprompt run -->\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    told = {variable.strip("`"): default for variable, default, _ in rows}
    run = get_command(app).commands["run"]
    assert told.keys() == {option.envvar for option in run.params if option.envvar}
    for name, field in RunOptions.model_fields.items():
        if (default := told.get(f"SOFTPROMPT_{name.upper()}")) is not None and name != "data_dir":
            value = field.get_default(call_default_factory=True)
            assert default == ("unset" if value is None else f"`{json.dumps(value).strip(chr(34))}`"), name
