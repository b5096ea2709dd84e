"""The part of ``contract`` that is about the web server and the database, which a gateway relies on too."""

from __future__ import annotations

from server.engine.source_names import Use

PROTOCOL = "uvicorn.protocols.http.httptools_impl"

WEB_USES: tuple[Use, ...] = (
    # The web server: server/http/connection.py, whose every inherited name a test looks for here
    Use(
        PROTOCOL,
        "HttpToolsProtocol",
        (
            "connection_made(transport)",
            "connection_lost(exc)",
            "data_received(data)",
            "on_message_begin",
            "on_header(name, value)",
            "on_headers_complete",
            "on_body(body)",
            "on_message_complete",
            "on_response_complete",
            "timeout_keep_alive_handler",
            "send_400_response(msg)",
            "_start_asgi_task(cycle, app)",
            "_unset_keepalive_if_required",
            "app_state",
            "connections",
            "cycle",
            "flow",
            "headers",
            "logger",
            "loop",
            "parser",
            "pipeline",
            "server_state",
            "timeout_keep_alive_task",
            "transport",
            "url",
        ),
        "bounds heads, which uvicorn does not",
    ),
    Use(
        PROTOCOL,
        "RequestResponseCycle",
        (
            "disconnected",
            "message_event",
            "response_complete",
            "response_started",
            "scope",
            "chunked_encoding",
            "expected_content_length",
            "waiting_for_100_continue",
        ),
        "as above",
    ),
    Use("uvicorn.protocols.http.flow_control", "FlowControl", ("read_paused", "resume_reading"), "as above"),
    Use(
        PROTOCOL,
        "RequestResponseCycle",
        ("response_complete", "chunked_encoding", "disconnected", "flow", "scope", "transport"),
        "writes pieces of an answer past ASGI: server/http/pieces.py",
    ),
    Use("uvicorn.protocols.http.flow_control", "FlowControl", ("write_paused",), "as above"),
    Use(
        "uvicorn.server",
        "Server",
        (
            "startup(sockets)",
            "main_loop",
            "on_tick(counter)",
            "handle_exit(sig, frame)",
            "started",
            "should_exit",
        ),
        "drains before it stops",
    ),
    # The database: adapters/database/database.py
    Use(
        "sqlalchemy.ext.asyncio.session",
        "AsyncSession",
        ("execute", "scalar", "get", "get_one", "merge", "delete", "flush", "commit", "close"),
        "wrapped, so that no cancellation leaves a statement in the middle",
    ),
    Use("sqlalchemy.pool.base", "PoolProxiedConnection", ("driver_connection",), "watches past SQLAlchemy"),
    Use("aiosqlite", "Connection", ("execute_fetchall",), "watches for writes of other processes"),
    # adapters/database/sqlite.py
    Use(
        "aiosqlite",
        "Connection",
        ("__init__(connector, iter_chunk_size)", "_execute(fn)", "_conn", "_thread", "cursor"),
        "a statement is one turn of the thread, and so is all that opens a connection",
    ),
)
