"""What the calls answer with that look at a server as a whole, or at what is left of limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from adapters.model import Tier
from adapters.store.upload_jobs import State
from server.accounts.keys import KeyScope
from server.http.answers import Digest, Key, NewVersion, Number, Time
from server.inference.dialects.answers import Answer, Count
from server.metrics import Outcome

Next = Annotated[str | None, Field(description="What `after` of the next page is; null at the end.")]


class ServedBase(Answer):
    """The base model, as it was loaded."""

    name: str
    source: str | None
    fingerprint: str | None
    pooling: bool
    modules: Count


class ServerCapacity(Answer):
    """What the engine has room for; a slot's bytes are on each worker.

    Where ``gpu_slots`` adapters share fewer slots by their ranks, ``shared_slots`` is how many there are, and
    ``slot_ranks`` the ranks of all of them; else both are 0.
    """

    gpu_slots: Count
    shared_slots: Count
    slot_ranks: Count
    host_slots: Count
    slot_bytes: Count
    entry_bytes: Count
    max_lora_rank: Count
    max_running: Count
    max_model_len: Count


class Disk(Answer):
    """The file system that the data lies on, in bytes."""

    path: str
    total: Count
    used: Count
    free: Count
    reserve: Annotated[Count, Field(description="Uploads get 507 where they would leave less than this.")]


class ServedParsers(Answer):
    """vLLM's parsers of tool calls and of reasoning, chosen by the base's template or by settings.

    `tools_shown` is whether the template shows tools to the model, `tools_guessed` whether in a form
    that is none of those known: then calls may come back as text.
    """

    tool_parser: str | None
    reasoning_parser: str | None
    tools_shown: bool
    tools_guessed: bool


class Server(Answer):
    """What runs, on what, and since when."""

    version: str
    engine: Annotated[str, Field(description="vLLM's version.")]
    base: ServedBase
    dtype: str
    parsers: ServedParsers
    capacity: ServerCapacity
    settings: dict[str, JsonValue]
    started_at: Time
    uptime_seconds: float
    draining: bool
    disk: Disk
    engine_restarts: Annotated[Count, Field(description="Since the server started.")]
    engine_state: Literal["running", "restarting"]


class ListedAdapter(Answer):
    """An adapter without reports; what is of a version is of the live one."""

    tenant: str
    name: str
    live: Number | None
    default: bool
    pinned: bool
    split: dict[int, Number] | None
    tier: Tier
    versions: Count
    digest: Digest | None
    rank: Count | None
    size_bytes: Count | None
    warnings: Count
    quarantine: dict[str, JsonValue] | None
    created_at: Time
    updated_at: Time | None


class ListedAdapters(Answer):
    """One page of them, by tenant and name."""

    object: Literal["list"]
    data: list[ListedAdapter]
    next: Next


class SingleRequest(Answer):
    """One request, and where its time went."""

    id: Count
    request_id: str
    client_request_id: str | None
    at: Time
    tenant: str
    key: str | None
    adapter: str | None
    version: Number | None
    endpoint: str
    outcome: Outcome
    code: Annotated[str | None, Field(description="The error that it ended with.")]
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    cold: Annotated[bool, Field(description="Whether it waited for its adapter to be loaded.")]
    queue_seconds: float
    load_seconds: Annotated[float, Field(description="Those of `queue_seconds` that the load took.")]
    first_token_seconds: float | None
    seconds: float
    cost: float


class Requests(Answer):
    """One page of them, newest first."""

    object: Literal["list"]
    data: list[SingleRequest]
    next: Annotated[Count | None, Field(description="What `after` of the next page is; null at the end.")]


class Limit(Answer):
    """One limit; the last three where it is counted by the minute."""

    of: Annotated[str, Field(description="`tenant`, or `key` and its id.")]
    limit: str
    allowed: JsonValue
    used: int | None = None
    remaining: int | None = None
    resets_at: Time | None = None


class BudgetLeft(Answer):
    """One budget. What requests under way may still use is `reserved`, and not in `remaining`."""

    period: Literal["day", "month"]
    unit: Literal["tokens", "cost"]
    allowed: float | None
    soft: float | None
    used: float
    reserved: float
    remaining: float | None
    resets_at: Time


class Limits(Answer):
    """A tenant's limits and budgets, and what waits and runs of it."""

    tenant: str
    limits: list[Limit]
    budgets: list[BudgetLeft]
    queued: Count
    running: Count


class Customer(Answer):
    """Whose key it is."""

    id: str
    name: str
    created_at: Time


class UsableBase(Answer):
    """The base model, whether the customer may ask it, and what adapters for it are held to."""

    name: str
    allowed: bool
    fingerprint: str | None
    max_lora_rank: Count
    dtype: Annotated[str, Field(description="What adapters are cast to.")]


class Me(Answer):
    """What a key is and may do, and what is left of its limits."""

    tenant: Customer
    key: Key | None
    scopes: list[KeyScope]
    sample_prompts: Annotated[
        bool, Field(description="Whether rollouts may keep some prompts, encrypted, to replay them.")
    ]
    base: UsableBase
    max_model_len: Count
    limits: list[Limit]
    budgets: list[BudgetLeft]
    queued: Count
    running: Count


class UploadError(Answer):
    """Why an upload was refused, as its answer says it."""

    code: str
    message: str | None


class Upload(Answer):
    """An upload that is answered later, or one that was refused."""

    id: str
    tenant: str
    adapter: str
    state: State
    received_bytes: Count
    by: Annotated[str, Field(description="Who uploads it, as in the audit.")]
    request_id: str | None
    created_at: Time
    updated_at: Time
    result: Annotated[NewVersion | None, Field(description="What the upload would have been answered.")]
    error: UploadError | None


class Uploads(Answer):
    """One page of them, newest first."""

    object: Literal["list"]
    data: list[Upload]
    next: Next
