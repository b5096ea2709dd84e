"""The settings of the server itself, with their defaults and help texts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    SettingsConfigDict,
)
from sqlalchemy import URL

from adapters.model import ADAPTER_PATTERN, TENANT_PATTERN
from server.settings.addresses import is_every, url_of
from server.settings.engine_args import (
    CACHE_HASHES,
    ONE_ENGINE_ARGS,
    OWNED_ENGINE_ARGS,
    REFUSED_ENGINE_ARGS,
    REFUSED_EXECUTORS,
)

# The sizes that vLLM compiles its LoRA kernels for (vllm.config.lora.MaxLoRARanks).
ALLOWED_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PRICED = re.compile(f"{TENANT_PATTERN}/{ADAPTER_PATTERN}", re.ASCII)

# What host_slots 0 stands for.
HOST_PER_GPU_SLOT = 4


class Price(BaseModel):
    """Per million tokens. ``cached`` is for prompt tokens found in the cache; ``input`` if unset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    output: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    cached: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)

    def of(self, prompt: int, cached: int, output: int) -> int:
        """What these tokens cost, in 1e-9 of the currency; ``cached`` are some of ``prompt``."""
        kinds = (
            (prompt - cached, self.input),
            (cached, self.input if self.cached is None else self.cached),
            (output, self.output),
        )
        return sum(tokens * round(price * 1000) for tokens, price in kinds)


class Serving(BaseSettings):
    """What the server serves, and how."""

    # Compose, Kubernetes and .env hand on as empty what nobody has set.
    model_config = SettingsConfigDict(
        env_prefix="LORAPLEX_", env_ignore_empty=True, frozen=True, extra="forbid"
    )

    model: str = Field(min_length=1, description="Folder (or hub id) of the base model.")
    served_model_name: str = Field(
        "", description="The base model's public name; the last part of MODEL if empty."
    )
    role: Literal["all", "gateway", "replica"] = Field(
        "all",
        description="`all`: one process does everything. `gateway` answers clients by means of `replica`s,"
        " which have the engines.",
    )
    fleet_key: SecretStr | None = Field(
        None, description="Secret that gateways and replicas share; needed unless ROLE is `all`."
    )
    replica_url: str = Field(
        "", description="Where gateways reach this replica; `http://HOST:PORT` if empty."
    )
    replica_stall: float = Field(
        5.0,
        gt=0,
        description="Seconds that a replica may leave its gateways without a sign before what runs there goes"
        " on elsewhere.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("data"), description="Folder for adapter files and the SQLite database.")
    blobs_url: str = Field(
        "",
        description="Object store of the adapters' files: `s3://…`, `gs://…`, `az://…`, or `file:///…` for a"
        " folder; DATA_DIR alone if empty.",
    )
    blobs_cache: ByteSize = Field(
        ByteSize(64 << 30),
        ge=0,
        description="Bytes of adapters' files kept in DATA_DIR where they come from BLOBS_URL.",
    )
    database_url: str = Field(
        "",
        description="SQLAlchemy URL; SQLite in DATA_DIR if empty. `postgresql+asyncpg://…` for PostgreSQL.",
    )
    database_timeout: float = Field(
        5.0,
        gt=0,
        description="Seconds that PostgreSQL may take to connect or for a statement; then it counts as away."
        " A start waits 30 to connect.",
    )
    backup_dir: Path = Field(
        Path(),
        description="Folder for backups that the admin API makes; `backups` in DATA_DIR if empty. Another"
        " disk is better.",
    )
    limits_redis_url: SecretStr | None = Field(
        None,
        description="Redis in which all processes with this URL count limits and budgets together;"
        " in each process's memory if unset.",
    )
    limits_fail: Literal["closed", "open"] = Field(
        "closed",
        description="Without that Redis `closed` refuses requests with limits,"
        " `open` counts in each process.",
    )
    admin_key: SecretStr | None = Field(
        None, description="Key of the admin API. Without it the first start makes one and prints it once."
    )
    service_key: SecretStr | None = Field(
        None, description="Key of a trusted gateway, which names the customer in `X-Customer-ID`."
    )
    metrics_key: SecretStr | None = Field(
        None, description="Key of `/metrics`, which needs none if this is unset."
    )
    rollout_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="Secret of 32 characters or more that encrypts prompts which rollouts replay; none are"
        " kept if it is unset.",
    )
    auth_failures: int = Field(
        30,
        ge=0,
        description="Wrong keys a minute from one address; further ones get 429. 0: no bound.",
    )
    gpu_slots: int | Literal["auto"] = Field(
        8,
        description="Adapters that can run at the same time; `auto`: as many as ADAPTER_GPU_MEMORY holds.",
    )
    host_slots: int | Literal["auto"] = Field(
        0,
        description="Adapters kept in host memory; 0: four times GPU_SLOTS; `auto`: by ADAPTER_HOST_MEMORY.",
    )
    adapter_gpu_memory: ByteSize = Field(
        ByteSize(8 << 30),
        ge=1,
        description="Memory of each GPU that slots may take, where GPU_SLOTS is `auto`.",
    )
    adapter_host_memory: ByteSize = Field(
        ByteSize(16 << 30),
        ge=1,
        description="Main memory that adapters may take, where HOST_SLOTS is `auto`.",
    )
    rank_slots: int = Field(
        0,
        ge=0,
        description="Adapters that share GPU_SLOTS by their ranks; 0: none do. Not tried on a GPU yet.",
    )
    dora_on_gpu: bool = Field(
        False,
        description="DoRA is served on a GPU too, at some cost for each step. Not tried on a GPU yet.",
    )
    host_shards: bool = Field(True, description="Each of several GPUs' workers keeps its part of an adapter.")
    host_pool: bool = Field(
        True,
        description="Host memory for adapters is made once at the start; pinned where there is a GPU, where"
        " this has not been tried yet.",
    )
    activation_slice: float | None = Field(
        None,
        ge=0,
        description="Seconds for which filling a slot may hold the engine at a time; 0: until it is full."
        " 0.002 on a GPU, 0.02 on a CPU if unset.",
    )
    load_notices: bool = Field(
        True,
        description="Workers say by themselves that an adapter has been read; else they are asked each 5 ms.",
    )
    batch_invariant: bool = Field(
        False, description="An answer has the same bits whatever runs beside it, and is slower; on GPUs only."
    )
    max_lora_rank: int = Field(
        64, description=f"Largest rank served, one of {', '.join(map(str, ALLOWED_MAX_RANKS))}."
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt plus answer, in tokens; the model's own limit if unset."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description='Any field of vLLM\'s AsyncEngineArgs, as JSON: `{"max_num_seqs": 32}`.',
    )
    tool_parser: str = Field(
        "auto",
        description="vLLM's parser of tool calls (`hermes` …); `auto`: by the base's template; or `none`.",
    )
    reasoning_parser: str = Field(
        "auto",
        description="vLLM's parser of reasoning (`qwen3` …); `auto`: by the base's chat template; or `none`.",
    )
    max_running: int = Field(
        0, ge=0, description="Sequences in the engine at once; the engine's max_num_seqs if 0."
    )
    max_staging: int = Field(2, ge=1, description="Adapters read from disk at the same time.")
    slot_patience: float = Field(
        2.0, gt=0, description="Seconds a cold adapter waits before a slot is drained for it."
    )
    preempt_after: float = Field(
        10.0,
        ge=0,
        description="Seconds beyond SLOT_PATIENCE after which long answers are put aside for a cold adapter,"
        " to go on later.",
    )
    max_queued: int = Field(256, ge=1, description="Waiting requests per tenant; one more gets 429.")
    queue_timeout: float = Field(60.0, gt=0, description="Seconds a request may wait; then it gets 503.")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest upload, both files together, in bytes.")
    same_bases: tuple[str, ...] = Field(
        (),
        description="Fingerprints of base models that this one stands in for, as the same one quantized;"
        " adapters for them are served. A JSON list.",
    )
    scrub_rate: ByteSize = Field(
        ByteSize(1 << 20),
        ge=0,
        description="Bytes of stored adapters read again each second, to notice a failing disk; 0: none.",
    )
    max_uploads: int = Field(16, ge=1, description="Uploads at once; one more gets 503.")
    max_uploads_each: int = Field(4, ge=1, description="Uploads of one customer at once; one more gets 429.")
    disk_reserve: ByteSize = Field(
        ByteSize(512 << 20),
        ge=0,
        description="Room in DATA_DIR, and beside a SQLite database, that no upload takes; then it gets 507."
        " A backup that leaves less where it goes gets 507.",
    )
    keep_versions: int = Field(
        0, ge=0, description="Versions of an adapter that an upload leaves, beside those that answer; 0: all."
    )
    max_versions: int = Field(
        1000, ge=1, description="Versions of one adapter; one more gets 409, unless its oldest give way."
    )
    import_prefixes: tuple[str, ...] = Field(
        (),
        description="URLs (`https://…`, `s3://…`, `file://…`) under which adapters may be imported from, as a"
        " JSON list; none if empty.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may call this server from a browser, as `https://app.example`, with"
        " commas between or as a JSON list; `*` for all.",
    )
    root_path: str = Field(
        "", description="Prefix under which a proxy serves this server, and which it strips: `/llm`."
    )
    sse_keepalive: float = Field(
        15.0,
        ge=0,
        description="Seconds after which a stream that waits gets its status 200 and a comment, again and"
        " again; 0: never.",
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest inference request body, in bytes.")
    batch_running: int = Field(
        8,
        ge=0,
        le=4096,
        description="Lines of batches in the engine at once while nobody else asks for anything, and one"
        " beside others; 0: no batches.",
    )
    max_file_bytes: ByteSize = Field(
        ByteSize(200 << 20), ge=1024, description="Largest file of `/v1/files`, in bytes."
    )
    client_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds a client may take to send its request, or the next piece of an upload, or to"
        " take the next piece of an answer.",
    )
    schema_timeout: float = Field(
        3.0,
        gt=0,
        le=600,
        description="Seconds of processor time to compile a schema, pattern or grammar; then the request gets"
        " 400, or 503 after ten times as many by the clock.",
    )
    prices: dict[str, Price] = Field(
        default_factory=dict,
        description="Price of a million tokens by `tenant/adapter`, `base` or `*` (all others), as JSON:"
        ' `{"*": {"input": 0.2, "cached": 0.05, "output": 0.8}}`.',
    )
    keep_usage_days: int = Field(
        90, ge=1, description="Days after which usage is kept by day, no longer by request."
    )
    engine_stall: float = Field(
        60.0, gt=0, description="Seconds the engine may leave a call unanswered before it is started again."
    )
    engine_restarts: int = Field(
        3, ge=0, description="Restarts of a lost engine within 10 minutes; one more ends the server."
    )
    drain_timeout: float = Field(
        30.0, ge=0, description="Seconds that streams may go on after SIGTERM before they are cut."
    )
    metrics_tenants: int = Field(
        100, ge=0, description="Tenants with a metric label of their own; the rest share `other`."
    )
    metrics_adapters: int = Field(
        100, ge=0, description="Adapter versions with metrics of their own; the rest share `other`. 0: none."
    )
    traces_url: str = Field(
        "",
        description="Where spans are sent by OTLP over HTTP, without `/v1/traces`: `http://tempo:4318`; none"
        " if empty.",
    )
    traces_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of traces kept that begin here; of clients' traces those that they keep.",
    )
    console: bool = Field(True, description="Whether `/console` is there; see [console.md](console.md).")
    log_format: Literal["json", "text"] = Field("json", description="Form of the log lines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level logged."
    )

    @field_validator("gpu_slots", "host_slots", mode="plain")
    @classmethod
    def _number_or_auto(cls, slots: Any, field: ValidationInfo) -> Any:
        least = 1 if field.field_name == "gpu_slots" else 0
        if slots == "auto":
            return slots
        if isinstance(slots, int | str) and str(slots).strip().isdecimal() and int(slots) >= least:
            return int(slots)
        raise ValueError(f"must be a number, at least {least}, or `auto`")

    @field_validator("max_lora_rank")
    @classmethod
    def _rank_is_compiled(cls, rank: int) -> int:
        if rank not in ALLOWED_MAX_RANKS:
            raise ValueError(
                f"must be one of {', '.join(map(str, ALLOWED_MAX_RANKS))}; take the next larger one"
            )
        return rank

    @field_validator("blobs_url")
    @classmethod
    def _blobs_url_is_one(cls, url: str) -> str:
        if url:
            from adapters.store.objects import check_url  # with its library, which most starts do without

            check_url(url)
        return url

    @field_validator("cors_origins", mode="before")
    def _list_of_origins(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        return json.loads(given) if given.lstrip().startswith("[") else [o.strip() for o in given.split(",")]

    @field_validator("cors_origins")
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or not parts.hostname or origin.count("/") != 2
            ):
                raise ValueError(f"{origin!r} must be an origin, as https://app.example, or *")
            if origin != "*" and "*" in origin:
                raise ValueError(
                    f"{origin!r} must be an origin without *, which stands for all of them alone"
                )
        return tuple(origin.lower() for origin in origins)  # as browsers send them

    @field_validator("prices")
    def _prices_are_of_somebody(cls, prices: dict[str, Price]) -> dict[str, Price]:
        for name in prices:
            if name not in ("base", "*") and not _PRICED.fullmatch(name):
                raise ValueError(f"{name!r} must be tenant/adapter, as acme/support, or base, or *")
        return prices

    @field_validator("root_path")
    def _is_a_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or urlsplit(path).path != path):
            raise ValueError(f"{path!r} must be a path, as /llm")
        return path.rstrip("/")

    @field_validator("import_prefixes")
    @classmethod
    def _prefixes_are_urls(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            scheme, separator, rest = prefix.partition("://")
            if not (scheme.isalnum() and separator and rest.strip("/")):
                raise ValueError(f"{prefix!r} must be a URL with a host or folder, as https://host/folder/")
        return prefixes

    @field_validator("engine_args")
    @classmethod
    def _engine_args_are_not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        if len({name.replace("-", "_") for name in args}) < len(args):
            raise ValueError("an argument is given twice, with dashes and with underscores")
        for name in args:
            if name.replace("-", "_") in OWNED_ENGINE_ARGS:
                raise ValueError(f"{name!r} is set through {OWNED_ENGINE_ARGS[name.replace('-', '_')]}")
        given = {name.replace("-", "_"): value for name, value in args.items()}
        for name in given.keys() & REFUSED_ENGINE_ARGS.keys():
            raise ValueError(f"{name!r} is not accepted: {REFUSED_ENGINE_ARGS[name]}")
        if (executor := str(given.get("distributed_executor_backend"))) in REFUSED_EXECUTORS:
            why = REFUSED_EXECUTORS[executor]
            raise ValueError(f"'distributed_executor_backend' must not be {executor}: {why}")
        for name in ONE_ENGINE_ARGS:
            if given.get(name) not in (None, 1):
                raise ValueError(f"{name!r} must be 1: adapters are paged in one engine only")
        if given.get("prefix_caching_hash_algo", CACHE_HASHES[0]) not in CACHE_HASHES:
            raise ValueError(
                f"'prefix_caching_hash_algo' must be {' or '.join(CACHE_HASHES)}: of other hashes a customer"
                " can make two prompts that share their cache"
            )
        outputs = given.get("structured_outputs_config")
        backend = outputs.get("backend", "auto") if isinstance(outputs, dict) else "auto"
        if backend not in ("auto", "xgrammar"):
            raise ValueError(
                "'structured_outputs_config': backend must be xgrammar, the only one whose time and memory"
                " are bounded"
            )
        return given

    @classmethod
    def _unset_if_empty(cls) -> set[str]:
        """Folders, and what may be unset: no secret is empty."""
        return {"data_dir"} | {name for name, field in cls.model_fields.items() if field.default is None}

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Derived defaults are filled in before the model is frozen, so that readers see one value."""
        unset = cls._unset_if_empty()
        filled = {name: value for name, value in values.items() if value != "" or name not in unset}
        slots = str(filled.get("gpu_slots") or cls.model_fields["gpu_slots"].default)
        if filled.get("model") and not filled.get("served_model_name"):
            filled["served_model_name"] = str(filled["model"]).rstrip("/").rsplit("/", 1)[-1]
        if filled.get("host_slots") in (None, 0, "0", "") and slots.isdigit():
            filled["host_slots"] = HOST_PER_GPU_SLOT * int(slots)
        for name in ("data_dir", "backup_dir"):
            if isinstance(filled.get(name), str | Path):
                filled[name] = os.path.expanduser(filled[name])  # as it is without a home
        data_dir = Path(str(filled.get("data_dir") or cls.model_fields["data_dir"].default))
        if str(filled.get("backup_dir") or ".") == ".":
            filled["backup_dir"] = data_dir / "backups"
        if not filled.get("database_url"):
            file = data_dir.absolute() / "loraplex.db"
            filled["database_url"] = URL.create("sqlite+aiosqlite", database=str(file)).render_as_string()
        return filled

    @model_validator(mode="after")
    def _roles_fit(self) -> Self:
        if self.role != "all" and (self.fleet_key is None or len(self.fleet_key.get_secret_value()) < 16):
            raise ValueError(
                "LORAPLEX_FLEET_KEY must have at least 16 characters, the same for all gateways and replicas"
            )
        if self.role == "replica" and not self.replica_url and (self.port == 0 or is_every(self.host)):
            raise ValueError("LORAPLEX_REPLICA_URL must say where gateways reach this replica")
        return self

    @property
    def reached_at(self) -> str:
        """Where gateways reach this replica."""
        return self.replica_url or url_of(self.host, self.port)

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        known = isinstance(self.gpu_slots, int) and isinstance(self.host_slots, int)
        if known and self.host_slots < self.gpu_slots:  # type: ignore[operator]
            raise ValueError(
                f"host_slots ({self.host_slots}) must be at least gpu_slots ({self.gpu_slots}):"
                " an adapter in a slot stays in host memory"
            )
        return self
