"""Settings: where they come from, what they derive, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server import __main__ as command_line
from server.settings import SECRETS, Settings
from server.settings.engine_args import (
    ONE_ENGINE_ARGS,
    OWNED_ENGINE_ARGS,
    REFUSED_ENGINE_ARGS,
    REFUSED_EXECUTORS,
)
from tests.support.commands import Commands


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
        monkeypatch.delenv(name)


def made(**fields: Any) -> Settings:
    return Settings.load(**({"model": "/models/tiny"} | fields))


def refusal(**fields: Any) -> tuple[str, str]:
    """(field, message) of the one thing that is wrong."""
    with pytest.raises(ValidationError) as refused:
        made(**fields)
    (error,) = refused.value.errors()
    return ".".join(map(str, error["loc"])), error["msg"]


# --- where they come from ---------------------------------------------------------------------------


def test_arguments_over_variables_over_the_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: /from/file\nport: 1\nhost: 1.1.1.1\ngpu_slots: 3\nengine_args: {seed: 1}\n")
    monkeypatch.setenv("LORAPLEX_PORT", "2")
    monkeypatch.setenv("LORAPLEX_HOST", "2.2.2.2")
    monkeypatch.setenv("LORAPLEX_ENGINE_ARGS", '{"max_num_seqs": 4}')
    settings = Settings.load(file, host="3.3.3.3")
    assert (settings.model, settings.gpu_slots, settings.port, settings.host) == (
        "/from/file",
        3,
        2,
        "3.3.3.3",
    )
    assert settings.max_queued == 256
    assert Settings.load(model="m").port == 2
    monkeypatch.delenv("LORAPLEX_ENGINE_ARGS")
    assert Settings.load(file).engine_args == {"seed": 1}
    file.write_text("model: /from/file\nengine_args: {seed: 2}\n")
    assert Settings.load(file).engine_args == {"seed": 2}, "the file as it is now"


def test_every_setting_can_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "model": "/m", "served_model_name": "shown", "host": "0.0.0.0", "port": "0", "data_dir": "/d",
        "database_url": "postgresql+asyncpg://h/db", "limits_redis_url": "redis://h/0",
        "limits_fail": "open",
        "admin_key": "a" * 16, "service_key": "s" * 16, "metrics_key": "m" * 16, "auth_failures": "5",
        "rollout_key": "r" * 32,
        "gpu_slots": "2", "host_slots": "5", "adapter_gpu_memory": "3000", "adapter_host_memory": "4000",
        "max_lora_rank": "16", "max_model_len": "128", "engine_args": "{}", "max_running": "3",
        "max_staging": "1", "slot_patience": "0.5", "preempt_after": "3.0",
        "max_queued": "9", "queue_timeout": "1.5", "engine_stall": "30.0", "engine_restarts": "2",
        "max_upload_bytes": "100", "max_body_bytes": "2000",
        "batch_running": "3", "max_file_bytes": "5000", "database_timeout": "5.0", "host_shards": "False",
        "rank_slots": "9", "dora_on_gpu": "True",
        "batch_invariant": "True", "host_pool": "False", "activation_slice": "0.01",
        "load_notices": "False",
        "client_timeout": "5.0", "prices": "{}", "keep_usage_days": "30", "keep_versions": "7",
        "max_versions": "70",
        "blobs_url": "s3://bucket/prefix", "blobs_cache": "5000",
        "schema_timeout": "1.5", "max_uploads": "5", "max_uploads_each": "2", "disk_reserve": "7",
        "backup_dir": "/b", "same_bases": '["abc"]', "scrub_rate": "1000",
        "import_prefixes": '["https://models.example/a/"]',
        "cors_origins": '["https://app.example"]', "root_path": "/llm", "sse_keepalive": "3.0",
        "tool_parser": "hermes", "reasoning_parser": "none", "console": "False", "role": "all",
        "fleet_key": "f" * 16, "replica_url": "http://h:1", "replica_stall": "3.0",
        "drain_timeout": "0.0", "metrics_tenants": "0", "metrics_adapters": "0",
        "traces_url": "http://t:4318", "traces_share": "0.5",
        "log_format": "text", "log_level": "debug",
        "oidc_issuer": "https://login.example", "oidc_client_id": "c", "oidc_client_secret": "o" * 16,
        "oidc_scopes": "openid", "oidc_claim": "roles", "oidc_access": "{'a': 'admin'}",
        "oidc_tenant_claim": "org", "oidc_domains": '["example.org"]', "oidc_name_claim": "upn",
        "oidc_label": "us", "oidc_hours": "8.0",
    }  # fmt: skip
    assert values.keys() == Settings.model_fields.keys()
    for name, value in values.items():
        monkeypatch.setenv(f"LORAPLEX_{name.upper()}", value.replace("'", '"'))
    settings = Settings.load()
    shown = {name: getattr(settings, name) for name in values}
    for secret in (
        "admin_key", "service_key", "metrics_key", "limits_redis_url", "fleet_key", "oidc_client_secret",
        "rollout_key",
    ):  # fmt: skip
        assert shown[secret].get_secret_value() == values[secret]
        assert values[secret] not in repr(settings)
        del shown[secret], values[secret]
    for several in ("import_prefixes", "same_bases", "cors_origins", "oidc_domains"):
        assert shown.pop(several) == tuple(json.loads(values.pop(several)))
    assert {name: str(value) for name, value in shown.items()} == values


@pytest.mark.parametrize("given", ["https://a.example,http://b:80", '["https://a.example", "http://b:80"]'])
def test_origins_come_with_commas_or_as_a_list(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("LORAPLEX_CORS_ORIGINS", given)
    assert made().cors_origins == ("https://a.example", "http://b:80")


def test_an_origin_is_as_browsers_send_it() -> None:
    assert made(cors_origins="https://App.Example, *").cors_origins == ("https://app.example", "*")


@pytest.mark.parametrize(
    "origin",
    ["app.example", "https://a.example/path", "ftp://a.example", "https://*.example", "https://a.example:*"],
)
def test_an_origin_is_one(origin: str) -> None:
    with pytest.raises(ValueError, match="must be an origin"):
        made(cors_origins=[origin])


@pytest.mark.parametrize("url", ["bucket", "ftp://host/x", "s3://"])
def test_an_object_store_is_named_whole(url: str) -> None:
    with pytest.raises(ValueError, match="must name a bucket or a folder"):
        made(blobs_url=url)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Settings.load(Path("nowhere.yaml"))


# --- what they derive -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"), [("/a/b/tiny", "tiny"), ("/a/b/tiny/", "tiny"), ("org/name", "name"), ("tiny", "tiny")]
)
def test_the_public_name_is_the_last_part_of_the_model(model: str, name: str) -> None:
    assert made(model=model).served_model_name == name
    assert made(model=model, served_model_name="shown").served_model_name == "shown"


@pytest.mark.parametrize(
    ("given", "host"), [({}, 32), ({"gpu_slots": 3}, 12), ({"gpu_slots": 3, "host_slots": 3}, 3)]
)
def test_host_memory_is_four_times_the_slots(given: dict[str, int], host: int) -> None:
    assert made(**given).host_slots == host
    assert made(**{name: str(value) for name, value in given.items()}).host_slots == host


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({"gpu_slots": "auto"}, ("auto", 0)),
        ({"gpu_slots": "auto", "host_slots": 6}, ("auto", 6)),
        ({"gpu_slots": 3, "host_slots": "auto"}, (3, "auto")),
        ({"gpu_slots": "auto", "host_slots": "auto"}, ("auto", "auto")),
    ],
)
def test_slots_that_the_engine_is_to_count(given: dict[str, Any], slots: tuple[object, object]) -> None:
    settings = made(**given)
    assert (settings.gpu_slots, settings.host_slots) == slots


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("2 GB", 2 * 10**9), ("1.5MiB", 3 << 19), (77, 77)]
)
def test_memory_is_given_in_units(text: str | int, size: int) -> None:
    settings = made(adapter_gpu_memory=text, adapter_host_memory=text)
    assert (settings.adapter_gpu_memory, settings.adapter_host_memory) == (size, size)


def test_the_database_is_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("data"), tmp_path / "a b#c?d%"):
        settings = made(data_dir=folder)
        from sqlalchemy import make_url

        url = make_url(settings.database_url)
        assert (url.drivername, url.database) == ("sqlite+aiosqlite", str(folder.absolute() / "loraplex.db"))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As Compose and ``.env`` hand on what nobody has set."""
    monkeypatch.setenv("LORAPLEX_MODEL", "/models/tiny")
    before = Settings.load()
    monkeypatch.setenv(f"LORAPLEX_{name.upper()}", "")
    if name == "model":
        with pytest.raises(ValidationError, match="Field required"):
            Settings.load()
    else:
        assert Settings.load() == before


@pytest.mark.parametrize("name", ["data_dir", "backup_dir", "max_model_len", *SECRETS])
def test_so_it_is_in_the_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f'model: /models/tiny\n{name}: ""\n')
    assert Settings.load(file).model_dump() == made().model_dump()


def test_an_empty_variable_is_no_second_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("a-key-of-the-file-that-is-long")
    monkeypatch.setenv("LORAPLEX_SERVICE_KEY", "")
    monkeypatch.setenv("LORAPLEX_SERVICE_KEY_FILE", str(tmp_path / "key"))
    key = made().service_key
    assert key is not None
    assert key.get_secret_value() == "a-key-of-the-file-that-is-long"


def test_a_folder_may_be_below_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = made(data_dir="~/loraplex", backup_dir="~/backups")
    assert (settings.data_dir, settings.backup_dir) == (Path("/home/me/loraplex"), Path("/home/me/backups"))
    assert settings.database_url.endswith("/home/me/loraplex/loraplex.db")


@pytest.mark.parametrize(
    "name", ["acme", "acme/", "/support", "acme/support@1", "Acme/support", "Base", "acme/*"]
)
def test_a_price_that_nobody_would_pay_is_refused(name: str) -> None:
    price = {"input": 1.0, "output": 2.0}
    assert made(prices={"acme/support": price, "base": price, "*": price})
    field, said = refusal(prices={name: price})
    assert (field, repr(name) in said) == ("prices", True)


def test_an_argument_is_given_once() -> None:
    assert "twice" in refusal(engine_args={"max-num-seqs": 4, "max_num_seqs": 8})[1]


def test_dashes_and_underscores_are_the_same_to_the_engine() -> None:
    assert made(engine_args={"max-num-seqs": 4}).engine_args == {"max_num_seqs": 4}


# --- what they refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWNED_ENGINE_ARGS)
def test_what_has_a_setting_of_its_own_is_no_engine_argument(name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        field, message = refusal(engine_args={spelling: 1})
        assert field == "engine_args"
        assert repr(spelling) in message
        assert OWNED_ENGINE_ARGS[name] in message


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": None}, "model"),
        ({"gpu_slots": 0}, "gpu_slots"),
        ({"gpu_slots": "many"}, "gpu_slots"),
        ({"gpu_slots": "-1"}, "gpu_slots"),
        ({"gpu_slots": True}, "gpu_slots"),
        ({"gpu_slots": [8]}, "gpu_slots"),
        ({"host_slots": "many"}, "host_slots"),
        ({"host_slots": [8]}, "host_slots"),
        ({"host_slots": -1}, "host_slots"),
        ({"adapter_gpu_memory": 0}, "adapter_gpu_memory"),
        ({"adapter_host_memory": "plenty"}, "adapter_host_memory"),
        ({"gpu_slots": 4, "host_slots": 3}, ""),
        ({"port": 70_000}, "port"),
        ({"slot_patience": 0}, "slot_patience"),
        ({"log_level": "loud"}, "log_level"),
        ({"gpu_slot": 4}, "gpu_slot"),
        ({"data_dir": 5}, "data_dir"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, Any], name: str) -> None:
    assert refusal(**fields)[0] == name


def test_they_do_not_change() -> None:
    settings = made()
    with pytest.raises(ValidationError):
        settings.port = 9  # type: ignore[misc]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_its_help(name: str) -> None:
    told = Settings.model_fields[name].description or ""
    assert told[-1] == "."
    assert 10 < len(told) < 140


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "file", "said"),
    [
        ({}, None, "LORAPLEX_MODEL"),
        ({"MODEL": "m", "PORT": "x"}, None, "LORAPLEX_PORT"),
        ({"MODEL": "m", "ENGINE_ARGS": "{"}, None, "engine_args"),
        ({"MODEL": "m", "ENGINE_ARGS": "[]"}, None, "LORAPLEX_ENGINE_ARGS"),
        ({"MODEL": "m", "ENGINE_ARGS": '{"max_loras": 2}'}, None, "GPU_SLOTS"),
        ({}, "model: m\nport: {", "settings.yaml"),
        ({}, "- model\n- port", "settings.yaml"),
        ({}, "just words", "settings.yaml"),
        ({}, "model: m\nmodle: m", "modle"),
        ({}, "model: m\ngpu_slots: [8]", "LORAPLEX_GPU_SLOTS"),
    ],
)
def test_a_wrong_setting_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], file: str | None, said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"LORAPLEX_{name}", value)
    arguments = ["serve"]
    if file is not None:
        (tmp_path / "settings.yaml").write_text(file)
        arguments += ["--config", str(tmp_path / "settings.yaml")]
    monkeypatch.setattr(command_line, "_serve", lambda _: pytest.fail("it was served"))
    done = Commands().invoke(command_line.cli, arguments)
    assert done.exit_code == 2, done.exception
    assert isinstance(done.exception, SystemExit)
    assert said.lower() in done.output.lower().replace("\n", "")
    assert "Traceback" not in done.output


def test_a_file_that_does_not_exist_is_said_in_a_line() -> None:
    done = Commands().invoke(command_line.cli, ["serve", "--config", "nowhere.yaml"])
    assert done.exit_code == 2
    assert "nowhere.yaml" in done.output


def test_settings_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", str(tmp_path))
    monkeypatch.setenv("LORAPLEX_ENGINE_ARGS", json.dumps({"dtype": "float32"}))
    served: list[Settings] = []
    monkeypatch.setattr(command_line, "_serve", lambda settings, config: served.append(settings) or 7)
    assert Commands().invoke(command_line.cli, ["serve"]).exit_code == 7
    assert served[0].engine_args == {"dtype": "float32"}


@pytest.mark.parametrize("prefix", ["", "/models", "https://", "file:///", "://x"])
def test_a_prefix_to_import_from_is_a_url(prefix: str) -> None:
    with pytest.raises(ValidationError, match="must be a URL"):
        Settings(model="m", import_prefixes=(prefix,))


@pytest.mark.parametrize("name", REFUSED_ENGINE_ARGS)
def test_engine_arguments_that_do_nothing_or_break_isolation_are_refused_with_the_reason(name: str) -> None:
    for spelling in (name, name.replace("_", "-")):
        field, message = refusal(engine_args={spelling: "x"})
        assert field == "engine_args"
        assert repr(name) in message
        assert REFUSED_ENGINE_ARGS[name] in message


@pytest.mark.parametrize("name", REFUSED_EXECUTORS)
def test_workers_are_processes_of_this_machine(name: str) -> None:
    field, message = refusal(engine_args={"distributed-executor-backend": name})
    assert field == "engine_args"
    assert REFUSED_EXECUTORS[name] in message
    kept = {"distributed_executor_backend": "mp"}
    assert made(engine_args=kept).engine_args == kept


@pytest.mark.parametrize("name", ONE_ENGINE_ARGS)
def test_there_is_one_engine(name: str) -> None:
    for value in (2, "1", 0):
        field, message = refusal(engine_args={name: value})
        assert (field, repr(name) in message) == ("engine_args", True)
    assert made(engine_args={name: 1}).engine_args == {name: 1}


def test_the_prefix_cache_has_a_hash_that_nobody_can_make_collide() -> None:
    for value in ("xxhash", "xxhash_cbor", "builtin", None):
        field, message = refusal(engine_args={"prefix-caching-hash-algo": value})
        assert (field, "sha256" in message) == ("engine_args", True)
    kept = {"prefix_caching_hash_algo": "sha256_cbor"}
    assert made(engine_args=kept).engine_args == kept


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        (tmp_path / name).write_text(f"{name}-of-the-file-{name}\n")
        monkeypatch.setenv(f"LORAPLEX_{name.upper()}_FILE", str(tmp_path / name))
    monkeypatch.setenv("LORAPLEX_MODEL", "/m")
    (tmp_path / "database_url").write_text("postgresql+asyncpg://me:pass@h/db")
    yaml = tmp_path / "settings.yaml"
    yaml.write_text("service_key: one-of-the-yaml-file\n")
    for file in (None, yaml):
        settings = Settings.load(file)
        assert settings.service_key is not None
        assert settings.service_key.get_secret_value() == "service_key-of-the-file-service_key"
        assert settings.database_url == "postgresql+asyncpg://me:pass@h/db"
        assert "of-the-file" not in repr(settings)


def test_a_secret_file_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_MODEL", "/m")
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="LORAPLEX_ADMIN_KEY_FILE"):
        Settings.load()
    (tmp_path / "none").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        Settings.load()
    monkeypatch.setenv("LORAPLEX_ADMIN_KEY", "k" * 16)
    with pytest.raises(ValueError, match="both"):
        Settings.load()


@pytest.mark.parametrize(
    ("url", "beside"),
    [
        ("sqlite+aiosqlite:///{other}/x.db", True),
        ("sqlite+aiosqlite:///{other}/missing/x.db", False),
        ("postgresql+asyncpg://me:x@db/x", False),
    ],
)
def test_the_reserve_is_kept_beside_a_database_too(tmp_path: Path, url: str, beside: bool) -> None:
    (data := tmp_path / "data").mkdir()
    (other := tmp_path / "other").mkdir()
    settings = Settings(model="/m", data_dir=data, database_url=url.format(other=other))
    assert settings.written_folders() == ({data, other} if beside else {data})
