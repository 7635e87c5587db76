"""`softprompt run` is asked to stop: by which signals, and with whom to tell."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from rich.console import Console
from softprompt.adapter_files import find_adapter
from softprompt.cli import main, run
from softprompt.cli import supervisor as supervising
from softprompt.cli.options import make_options
from softprompt.cli.services import Addresses
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.registry.v1.registry_pb2 import BaseModel


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give this process its handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_a_second_one_to_hurry(number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = Stop()
    stop.listen()
    signal.raise_signal(number)
    assert (stop.asked(), stop.hurried()) == (True, False)
    signal.raise_signal(number)
    assert stop.hurried()


def test_a_hang_up_that_nohup_has_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    stop.listen()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.asked()
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked()


# Each stop is asked for while the process does nothing but begin and end to wait for it. Threads take turns as
# often as they can, so that the signal may come anywhere within.
ASKED_AT_ANY_MOMENT = """
import os, signal, sys, threading
from softprompt.cli.stopping import Stop

sys.setswitchinterval(1e-6)
waiting = threading.Semaphore(0)

def ask():
    for _ in range(500):
        waiting.acquire()
        os.kill(os.getpid(), signal.SIGTERM)

asking = threading.Thread(target=ask)
asking.start()
for _ in range(500):
    stop = Stop()
    stop.listen()
    waiting.release()
    while not stop.wait(0):
        pass
asking.join()
"""


def test_no_moment_is_a_wrong_one_to_ask() -> None:
    subprocess.run([sys.executable, "-c", ASKED_AT_ANY_MOMENT], check=True, timeout=60)


# Ctrl-C on `softprompt run | tee log` ends tee too.
STOP_WITH_NOBODY_READING = """
import signal, sys
from pathlib import Path
from rich.console import Console
from softprompt.cli.healing import Service
from softprompt.cli.options import make_options
from softprompt.cli.processes import Child
from softprompt.cli.stopping import Stop
from softprompt.cli.supervisor import Supervisor

folder = Path(sys.argv[1])
stop = Stop()
stop.listen()
supervisor = Supervisor(make_options({"data_dir": str(folder)}), {}, Console(), stop)
child = Child("worker", [sys.executable, "-c", "import signal; signal.pause()"], log=folder / "worker.log")
supervisor._start(Service("worker", lambda: child, lambda: True))
signal.raise_signal(signal.SIGINT)
supervisor._end_all()
print(child.exit_code(), file=sys.stderr)
"""


def test_children_are_ended_in_order_though_nobody_reads_what_is_said(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", STOP_WITH_NOBODY_READING, str(tmp_path)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert done.stderr == f"{-signal.SIGTERM}\n"
    assert done.returncode == 0


ADAPTER = Path(__file__).parents[2] / "examples" / "adapters" / "tweet_adapter"


class ServedModel:
    """An inference service that answers."""

    def __init__(self, _address: str) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def model(self) -> GetModelResponse:
        return GetModelResponse(base_model=BaseModel(id="tiny"))


def test_a_stop_does_not_wait_for_a_registry_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "InferenceClient", ServedModel)
    stop = Stop()
    options = make_options({"data_dir": str(tmp_path)})
    supervisor = Supervisor(options, {"tweets": find_adapter(ADAPTER)}, Console(), stop)
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def ask_to_stop_once_called() -> None:
            with silent.accept()[0]:
                stop.ask()
                left.wait()

        left = threading.Event()
        caller = threading.Thread(target=ask_to_stop_once_called)
        caller.start()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        nowhere = Addresses(redis_url="", registry=address, inference=("",), gateway_host="", gateway_port=0)
        try:
            with pytest.raises(supervising._Stopped):
                supervisor._register(nowhere)
        finally:
            left.set()
            caller.join()


def test_a_signal_while_adapters_are_fetched_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_path: str) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal was kept for later")

    monkeypatch.setattr(run, "find_adapter", fetch)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--prompt-adapters", "tweets=owner/name"])
    assert ended.value.code == 130
