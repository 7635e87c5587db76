"""Logs on stderr: coloured on a terminal, key=value otherwise, JSON where asked for."""

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_logs(log_format: str) -> None:
    """Send structlog's events to stderr; `log_format` is "json" or "auto".

    Tracebacks are plain: structlog's rich ones take seconds to draw, and show local variables, hence prompts.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Processor]
    if log_format == "json":
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    elif sys.stderr.isatty():
        renderer = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        keys = ["timestamp", "level", "event"]
        renderer = [
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=keys, drop_missing=True),
        ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # uvicorn's own lines repeat what our access log says, and tell clients' malformed bytes as warnings.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
