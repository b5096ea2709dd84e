"""Secrets among the settings: from which files they come, and how they are hidden where they are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic_settings import PydanticBaseSettingsSource

MASK = "**********"
_SECRET = re.compile(r"key$|token$|secret|password|credential", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked(name: str, value: Any) -> Any:
    """``value`` without what its name, or a URL in it, says is secret."""
    if isinstance(value, dict):
        return {key: masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(name, inner) for inner in value]
    if isinstance(value, str) and value:
        return MASK if _SECRET.search(name) else _USER_INFO.sub(MASK, value)
    return value


# What may be in a file that LORAPLEX_<NAME>_FILE names.
SECRETS = (
    "admin_key",
    "service_key",
    "metrics_key",
    "rollout_key",
    "fleet_key",
    "limits_redis_url",
    "database_url",
    "oidc_client_secret",
)


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets from files, as Docker, Kubernetes and systemd hand them over."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """ValueError for a secret that is given twice, or a file without one."""
        variable = f"LORAPLEX_{field_name.upper()}"
        file = os.environ.get(f"{variable}_FILE") if field_name in SECRETS else None
        if not file:
            return None, field_name, False
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both given; one of them would be ignored")
        if not Path(file).is_file():
            raise FileNotFoundError(f"{variable}_FILE: there is no file {file}")
        secret = Path(file).read_text(encoding="utf-8").strip()
        if not secret:
            raise ValueError(f"{variable}_FILE: {file} is empty")
        return secret, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The secrets that come from files."""
        fields = self.settings_cls.model_fields.items()
        found = {name: self.get_field_value(field, name)[0] for name, field in fields}
        return {name: secret for name, secret in found.items() if secret is not None}
