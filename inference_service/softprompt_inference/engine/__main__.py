"""`python -m softprompt_inference.engine --fd N --files-fd M`: an engine on the sockets that it inherits."""

import gc
import logging
import os
import sys
from functools import partial

import structlog
from softprompt_api.ending import run_to_end
from softprompt_api.logs import configure_logs

from softprompt_inference.cores import Binding
from softprompt_inference.engine.config import EngineConfig, Prepare
from softprompt_inference.engine.engine import EngineBroken
from softprompt_inference.engine.plan import Runner
from softprompt_inference.engine.process import Report, serve_parent


class _ToStructlog(logging.Handler):
    """The engine and the libraries below it log through the standard library; print all as the services do."""

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"logger": record.name, "process": "engine"}
        if record.exc_info:
            # As text, without the frames' variables: those hold users' tokens.
            facts["exception"] = logging.Formatter().formatException(record.exc_info)
        structlog.get_logger().log(record.levelno, record.getMessage(), **facts)


def main() -> None:
    """Serve until the other end closes."""
    configure_logs(os.environ.get("SOFTPROMPT_LOG_FORMAT", "auto"))
    logging.basicConfig(level=logging.WARNING, handlers=[_ToStructlog()])
    binding = Binding()
    try:
        serve_parent(partial(_load, binding), partial(_prepare, binding))
    except EngineBroken as error:
        logging.getLogger(__name__).critical("%s; the engine ends", error)
        sys.exit(1)


def _prepare(binding: Binding, wanted: Prepare, report: Report) -> None:
    # torch takes seconds to import: only now is there somebody to tell. A fifth of them would be the collector's,
    # which goes through all that is there over and over; `serve` turns it on when the model is loaded.
    gc.disable()
    report("importing torch")
    with binding.importing(wanted.num_threads):
        from softprompt_inference.model import runner
    runner.prepare(wanted, report)


def _load(binding: Binding, config: EngineConfig, report: Report) -> Runner:
    from softprompt_inference.model.runner import load_runner

    runner = load_runner(config, report)
    if runner.loaded.device.type == "cpu":
        binding.bind()
    return runner


if __name__ == "__main__":
    run_to_end(main)
