"""Logging of every pdkv process: structlog through the standard library, to stderr.

Console form on a terminal, one JSON object a line otherwise. ``structlog.contextvars.bind_contextvars`` adds
``request_id`` and ``transfer`` to whatever a request's own task logs.
"""

import logging
import sys

import structlog

_QUIET = ("httpx", "httpcore", "uvicorn.error", "uvicorn.access", "asyncio")


def configure_logging(level: str, role: str, form: str = "auto") -> None:
    """Send everything at ``level`` ("debug" to "error") or above to stderr, marked with ``role``.

    ``form``: "auto" (console on a terminal, JSON otherwise), "console" or "json". Call once, before threads start.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console, key="ts"),
        _role_adder(role),
    ]
    render: list[structlog.types.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if console:
        render.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="ts", pad_event_to=30))
    else:
        render += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _role_adder(role: str) -> structlog.types.Processor:
    def add_role(
        _logger: object, _method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:  # first, so that it leads the line
        event.setdefault("role", role)
        return event

    return add_role
