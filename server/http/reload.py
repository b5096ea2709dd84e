"""SIGHUP: the settings are read again, and what a running server can take over is taken over.

The environment of a process does not change, so this is about the settings' file and about the files that
``LORAPLEX_…_FILE`` name: a rotated key, a log that should say more for a while, another origin or price.
What runs goes on as it began.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pydantic import SecretStr, ValidationError

from server import logs
from server.http.services import Services
from server.settings import Settings

logger = logging.getLogger(__name__)

TAKEN_OVER = (
    "log_level", "log_format", "admin_key", "service_key", "metrics_key",
    # Read where they count, by each request.
    "cors_origins", "sse_keepalive", "import_prefixes", "drain_timeout",
    # Told to those who hold them.
    "auth_failures", "max_uploads", "max_uploads_each", "disk_reserve", "prices", "keep_usage_days",
    "metrics_tenants", "metrics_adapters", "traces_share",
)  # fmt: skip


def take_over(services: Services, load: Callable[[], Settings]) -> None:
    """Takes over what it may of the settings that ``load`` reads, and logs what needs a restart.

    Settings that are not valid change nothing.
    """
    before = services.settings
    try:
        now = load()
        services.authentication.rekey(
            admin_key=_clear(now.admin_key),
            service_key=_clear(now.service_key),
            metrics_key=_clear(now.metrics_key),
        )
    except ValidationError as exc:
        said = "; ".join(f"{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in exc.errors())
        logger.error("the settings stay as they are: %s", said)
        return
    except (ValueError, OSError) as exc:
        logger.error("the settings stay as they are: %s", exc)
        return
    logs.configure(now.log_format, now.log_level)
    _tell(services, now)
    changed = [name for name in Settings.model_fields if getattr(now, name) != getattr(before, name)]
    taken = [name for name in changed if name in TAKEN_OVER]
    services.settings = before.model_copy(update={name: getattr(now, name) for name in taken})
    left = [name.upper() for name in changed if name not in TAKEN_OVER]
    names = ", ".join(name.upper() for name in taken) or "nothing"
    rest = ", ".join(left) or "nothing"
    logger.info("the settings were read again; taken over: %s; after a restart: %s", names, rest)


def _tell(services: Services, now: Settings) -> None:
    services.wrong_keys.most = now.auth_failures
    intake = services.intake
    intake.most, intake.each, intake.reserve = now.max_uploads, now.max_uploads_each, now.disk_reserve
    services.completions.quotas.reprice(now.prices)
    services.usage_writer.keep_days = now.keep_usage_days
    services.metrics.tenants, services.metrics.by_adapter.bound = now.metrics_tenants, now.metrics_adapters
    if services.tracer is not None:
        services.tracer.keep(now.traces_share)


def _clear(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None
