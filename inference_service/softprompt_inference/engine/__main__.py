"""`python -m softprompt_inference.engine --fd N`: an engine on the socket that it inherits as descriptor N."""

import argparse
import logging
import os
import socket
from collections.abc import Callable

from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.plan import Runner
from softprompt_inference.engine.process import end_with_parent, serve


def main() -> None:
    """Serve the socket until its other end closes."""
    parser = argparse.ArgumentParser(prog="softprompt_inference.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="descriptor of a connected stream socket")
    fd = parser.parse_args().fd
    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as stream:
        serve(stream, _load)


def _load(config: EngineConfig, report: Callable[[str], None]) -> Runner:
    # torch takes seconds to import: only now is there somebody to tell.
    report("importing torch")
    from softprompt_inference.model.runner import load_runner

    return load_runner(config, report)


if __name__ == "__main__":
    main()
