"""A tiny model with a real tokenizer, adapters that PEFT wrote for it, a hub on this machine, and certificates."""

import contextlib
import gc
import hashlib
import json
import os
import re
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.garbage import start_collecting

MakeAdapter = Callable[..., Path]

# Fixtures of end-to-end tests, which each process that runs such tests makes once.
_SHARED_SYSTEM = re.compile(r"\b(shared_system|small_system|demo_system)\b")

# Before torch is first imported: tests share their cores with each other's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads this once, when it is first imported, and transformers imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Libraries are imported, and tests collected, once and for all: the collector would go through it over and over.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what tests make."""
    start_collecting()


def pytest_unconfigure() -> None:
    """Native modules count what is never collected as leaks, and say so at the exit."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of files that share a system all tests run in one process, so that it starts once."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SystemsOnce(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return _shared_system(file) or file

    return SystemsOnce(config, log)


@cache
def _shared_system(file: str) -> str:
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    found = _SHARED_SYSTEM.search(text)
    return found[0] if found else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test for a GPU needs one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(native_kernels: None, request: pytest.FixtureRequest) -> Any:
    """Each dtype that native kernels can have products in, where this processor has the instructions."""
    import torch
    from softprompt_kernels import native

    chosen: torch.dtype = getattr(torch, request.param)
    supports = native.supports_linear if chosen == torch.bfloat16 else native.supports_wide
    if not supports(torch.zeros(2, 2, dtype=chosen)):
        pytest.skip(f"this processor has no products of ours in {chosen}")
    return chosen


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the default model's tokenizer and chat template."""
    import torch
    from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_MODEL))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Wide enough that greedy choices are far apart and outputs of different adapters differ.
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make_adapter(seed, num_virtual_tokens, kind)` writes a PEFT folder of random values for the tiny model.

    `rank` is a LoRA's, `std` that of all others' values.
    """
    import torch
    from peft import (
        LoraConfig,
        MultitaskPromptTuningConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        TaskType,
        get_peft_model,
    )
    from transformers import AutoModelForCausalLM

    kinds = {
        "prompt_tuning": PromptTuningConfig,
        "prefix_tuning": PrefixTuningConfig,
        "multitask": partial(MultitaskPromptTuningConfig, num_tasks=2),
    }

    def make(
        seed: int, num_virtual_tokens: int = 5, kind: str = "prompt_tuning", rank: int = 4, std: float = 1.0
    ) -> Path:
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        torch.manual_seed(seed)
        if kind == "lora":
            config = LoraConfig(
                task_type=TaskType.CAUSAL_LM, r=rank, target_modules="all-linear", init_lora_weights=False
            )
        else:
            config = kinds[kind](task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters() if kind != "lora" else ():
                parameter.normal_(std=std)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def with_benchmarks() -> dict[str, str]:
    """An environment in which processes find `benchmarks`, which is not installed."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Hub:
    """The hub's protocol on a port of this machine, as far as downloads of public repositories need it.

    Attributes:
        url: for HF_ENDPOINT.
        files: repository → file name → content.
        asked: every path that was asked for, in order.
    """

    COMMIT = "c0ffee" + "0" * 34

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.told_bytes: dict[str, int] = {}  # what content-length says of a file, where it lies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn_url = f"http://localhost:{self._server.server_address[1]}/cdn"  # another host
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def put(self, repository: str, folder: Path) -> None:
        """Publish every file of a folder."""
        self.files[repository] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                status, headers, body = hub._answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(ConnectionError):  # whoever had enough leaves
                        self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler

    def _answer(self, target: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(target).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._listed("/".join(parts[2:4]), parts[4:])
        if parts[0] == "cdn":
            return self._sent(*parts[1:3], parts[3])
        if len(parts) < 5 or parts[2] != "resolve" or parts[3] not in ("main", "v1", self.COMMIT):
            return self._absent()
        repository, name = "/".join(parts[:2]), parts[4]
        if name not in self.files.get(repository, {}):
            return self._absent()
        commit = {"X-Repo-Commit": self.COMMIT, "ETag": f'"{self._oid(repository, name)}"'}
        if name.endswith(".safetensors"):  # large files live elsewhere
            size = str(len(self.files[repository][name]))
            headers = {**commit, "X-Linked-Size": size, "X-Linked-ETag": commit["ETag"], "content-length": "0"}
            return 302, {**headers, "location": f"{self.cdn_url}/{repository}/{name}"}, b""
        status, headers, body = self._sent(*parts[:2], name)
        return status, {**headers, **commit}, body

    def _oid(self, repository: str, name: str) -> str:
        return hashlib.sha256(self.files[repository][name]).hexdigest()

    def _sent(self, owner: str, repository: str, name: str) -> tuple[int, dict[str, str], bytes]:
        body = self.files[f"{owner}/{repository}"][name]
        return 200, {"content-length": str(self.told_bytes.get(name, len(body)))}, body

    def _listed(self, repository: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repository not in self.files:
            return self._absent()
        names = sorted(self.files[repository])
        shape: object = {"id": repository, "sha": self.COMMIT, "siblings": [{"rfilename": name} for name in names]}
        if rest[:1] == ["tree"]:
            shape = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(self.files[repository][name]),
                    "oid": self._oid(repository, name)[:40],
                }
                for name in names
            ]
        body = json.dumps(shape).encode()
        return 200, {"content-length": str(len(body)), "content-type": "application/json"}, body

    def _absent(self) -> tuple[int, dict[str, str], bytes]:
        return 404, {"content-length": "0", "X-Error-Code": "RepoNotFound"}, b""


@pytest.fixture(scope="session")
def open_hub() -> type[Hub]:
    """Open a hub with nothing in it; whoever does closes it."""
    return Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub of the test's own, with nothing in it."""
    with contextlib.closing(Hub()) as hub:
        yield hub


class Authority:
    """Signs certificates, which are good for two days.

    Attributes:
        cert: its own, as PEM.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._num_issued = 0
        # The machine's own would add extensions.
        (folder / "openssl.cnf").write_text("[req]\ndistinguished_name=name\n[name]\n")
        rules = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
        self.cert, self._key = self._write(name, *(word for rule in rules for word in ("-addext", rule)))

    def issue(self, *, names: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """A certificate for these names, and its private key."""
        self._num_issued += 1
        by = ("-CA", str(self.cert), "-CAkey", str(self._key))
        rules = ("basicConstraints=critical,CA:FALSE", f"subjectAltName={names}")
        name = f"{self.cert.stem}-{self._num_issued}"
        return self._write(name, *by, *(word for rule in rules for word in ("-addext", rule)))

    def _write(self, name: str, *words: str) -> tuple[Path, Path]:
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        files = ("-keyout", str(key), "-out", str(cert), "-config", str(self._folder / "openssl.cnf"))
        command = ("openssl", "req", "-x509", "-subj", f"/CN={name}", *curve, *files, *words)
        subprocess.run(command, check=True, capture_output=True)
        return cert, key


@pytest.fixture(scope="session")
def make_authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """`make_authority(name)` makes one that nobody trusts yet."""
    return lambda name: Authority(tmp_path_factory.mktemp("authority"), name)


@pytest.fixture(scope="session")
def authority(make_authority: Callable[[str], Authority]) -> Authority:
    """The one whose certificates the tests' services believe."""
    return make_authority("believed")


@pytest.fixture(scope="session")
def strange_authority(make_authority: Callable[[str], Authority]) -> Authority:
    """Another, whose certificates they do not."""
    return make_authority("strange")


def _hostile_bytes(pieces: object) -> bytes:
    match pieces:
        case str(text):
            return text.encode()
        case list(several):
            return b"".join(map(_hostile_bytes, several))
        case {"repeat": piece, "times": int(times)}:
            return _hostile_bytes(piece) * times
        case {"numbered": str(piece), "times": int(times)}:
            return "".join(piece.replace("#", str(number)) for number in range(times)).encode()
        case {"hex": str(digits)}:
            return bytes.fromhex(digits)
        case {"u64": int(number)}:
            return number.to_bytes(8, "little")
        case {"utf16": str(text)}:
            return text.encode("utf-16")
        case {"sized": inner}:
            data = _hostile_bytes(inner)
            return len(data).to_bytes(8, "little") + data
        case {"safetensors": dict(shapes)}:
            return save({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    raise ValueError(f"these are no bytes: {pieces}")


@pytest.fixture(scope="session")
def hostile_bytes() -> Callable[[object], bytes]:
    """The bytes that rows of e2e/hostile spell.

    A text; {repeat, times}; {numbered, times}, where "#" is the number; {hex}; {u64}; {utf16}; {sized}: with its
    number of bytes in front; {safetensors}: a file of ones, from names and shapes; or several of these.
    """
    return _hostile_bytes
