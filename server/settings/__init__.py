"""Every setting: its name, default and help text, in one frozen model.

Order of precedence: arguments, ``LORAPLEX_*`` variables, the YAML file, the defaults.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, YamlConfigSettingsSource
from sqlalchemy import make_url

from server.settings.secrets import MASK, SECRETS, SecretFiles, masked
from server.settings.serving import ALLOWED_MAX_RANKS, HOST_PER_GPU_SLOT, Price
from server.settings.sign_in import SignIn

__all__ = ["ALLOWED_MAX_RANKS", "HOST_PER_GPU_SLOT", "MASK", "SECRETS", "Price", "Settings"]


class Settings(SignIn):
    """All of them."""

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON for operators, without keys and passwords."""
        values = self.model_dump(mode="json")
        url = make_url(self.database_url)
        return {name: masked(name, value) for name, value in values.items()} | {
            "database_url": url.render_as_string(hide_password=True)
        }

    def written_folders(self) -> set[Path]:
        """Where adapters and files are kept: DATA_DIR, and the folder of a SQLite database elsewhere."""
        url = make_url(self.database_url)
        beside = Path(str(url.database)).parent if url.get_backend_name() == "sqlite" else self.data_dir
        return {self.data_dir, beside} if beside.is_dir() else {self.data_dir}

    @classmethod
    def load(cls, config: Path | None = None, **overrides: Any) -> Settings:
        """Settings from the environment over ``config`` (YAML); ``overrides`` win over both.

        Raises pydantic's ValidationError; FileNotFoundError where ``config`` is not there; ValueError where
        it, or a variable, cannot be parsed.
        """
        if config is not None and not config.is_file():
            raise FileNotFoundError(f"there is no settings file {config}")

        return _read_from(cls, config)(**overrides)


@functools.lru_cache(maxsize=8)
def _read_from(kind: type[Settings], config: Path | None) -> type[Settings]:
    """``kind`` with the sources of ``load``; the file is read for each object anew.

    Kept, since to make a class of so many fields takes five times as long as to read all of them.
    """

    class FromFile(kind):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = (init_settings, env_settings, SecretFiles(settings_cls))
            if config is None:
                return sources
            try:
                return (*sources, YamlConfigSettingsSource(settings_cls, yaml_file=config))
            except Exception as exc:  # PyYAML's own, and what a file that is a list or a text leads to
                raise ValueError(f"{config} does not hold settings in YAML: {exc}") from exc

    return FromFile
