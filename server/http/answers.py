"""What Loraplex's own calls answer with: the models that routes name and that the OpenAPI document shows.

A model lists every field of its answer, which tests hold against real ones; one that is not listed still
passes through. What vLLM answers is in `server/inference/dialects/answers.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from adapters.model import Tier
from server.accounts.keys import KeyScope
from server.accounts.tenants import Priority
from server.inference.dialects.answers import Answer, Count

Number = Annotated[int, Field(ge=1, description="A version's number.")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="SHA-256 over the version's files.")]
# As text, since that is what it is stored and answered as.
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Report = dict[str, JsonValue]


# --- errors -----------------------------------------------------------------------------------------


class Closed(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Closed):
    """`code` is for programs, `message` for people; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Closed):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(Closed):
    """Anthropic's `type`, with Loraplex's `code` beside it."""

    type: str
    message: str
    code: str


class AnthropicError(Closed):
    """Every error of the calls that Anthropic's clients make."""

    type: Literal["error"]
    error: AnthropicErrorDetail


# --- tenants and keys -------------------------------------------------------------------------------


class Tenant(Answer):
    """A customer, with the limits and budgets that are set."""

    id: str
    name: str
    weight: float
    priority: Priority
    base_allowed: bool
    max_queued: Count | None
    max_running: Count | None
    suspended: bool
    sample_prompts: Annotated[
        bool, Field(description="Whether rollouts may keep some prompts, encrypted, to replay them.")
    ]
    limits: dict[str, JsonValue]
    budgets: dict[str, JsonValue]
    created_at: Time


class ListedTenant(Tenant):
    """A customer, and what it stores."""

    stored_bytes: Annotated[
        Count | None,
        Field(description="Of its versions and files, as its quota counts them. Only with `stored=true`."),
    ] = None


class Tenants(Answer):
    """All customers."""

    object: Literal["list"]
    data: list[ListedTenant]
    next: Annotated[str | None, Field(description="What `after` of the next page is; null at the end.")]


class Key(Answer):
    """A key without its secret."""

    id: str
    name: str | None
    scopes: list[KeyScope]
    limits: dict[str, JsonValue]
    created_at: Time
    expires_at: Time | None
    last_used_at: Time | None


class Keys(Answer):
    """A tenant's keys."""

    object: Literal["list"]
    data: list[Key]


class NewKey(Answer):
    """The only answer that shows the key."""

    id: str
    key: str
    name: str | None


class RotatedKey(NewKey):
    """A key that takes the place of another."""

    replaces: Key


# --- adapters ---------------------------------------------------------------------------------------


class AdapterVersion(Answer):
    """A version, and what its inspection and its probe found. `quarantine` says why it is out of service."""

    version: Number
    digest: Digest
    tier: Tier
    created_at: Time
    uploader: Annotated[str | None, Field(description="Who uploaded it, as in the audit.")]
    note: str | None
    quarantine: dict[str, JsonValue] | None
    problem: dict[str, str] | None
    report: Report


class Adapter(Answer):
    """An adapter with all its versions. `live`, or `split` in percent by version, answers to its name."""

    name: str
    tenant: str
    live: Number | None
    default: bool
    pinned: bool
    split: dict[int, Number] | None
    keep_versions: Count | None
    defaults: dict[str, float | str] | None
    tier: Tier
    created_at: Time
    versions: list[AdapterVersion]


class DamagedFiles(Answer):
    digest: Digest
    reason: Literal["missing", "changed"]
    versions: list[str]


class UnlinkedFiles(Answer):
    digest: Digest
    whole: bool
    age_seconds: Count


class IncompleteFile(Answer):
    file: str
    tenant: str
    size_bytes: Count
    stored_bytes: Count


class UnfitVersion(Answer):
    tenant: str
    adapter: str
    version: Number
    code: str
    message: str


class Checked(Answer):
    """Rows against bytes, both ways, and versions against the engine."""

    ok: bool
    versions: Count
    files: Count
    seconds: float
    damaged: list[DamagedFiles]
    unlinked: list[UnlinkedFiles]
    strays: list[str]
    moved: list[str]
    incomplete: list[IncompleteFile]
    unfit: list[UnfitVersion]


class BackedUp(Answer):
    folder: str
    copied: Count
    present: Count
    broken: list[Digest]
    missing: list[Digest]
    verified: Count
    repaired: list[Digest]
    seconds: float


class Adapters(Answer):
    """A tenant's adapters, by name. `next` is what the next page comes after, null where there is none."""

    object: Literal["list"]
    data: list[Adapter]
    next: str | None


class NewVersion(Answer):
    """A version that was uploaded and accepted."""

    adapter: str
    version: Number
    digest: Digest
    live: Number | None
    report: Report
    rollout: Annotated[
        dict[str, JsonValue] | None, Field(description="Only where one was asked for; see rollouts.")
    ] = None


class Warmed(Answer):
    """Where the version is now."""

    adapter: str
    version: Number
    tier: Tier


class Verified(Answer):
    """A version held against the golden probes that it came with."""

    adapter: str
    version: Number
    matches: bool
    prompts: Count
    tolerance: float
    largest_difference: float
    worst_prompt: Count
    base: Annotated[str | None, Field(description="The base model's fingerprint.")]
    dtype: str | None
    engine: Annotated[str | None, Field(description="vLLM's version.")]
    device: Annotated[str | None, Field(description="Only with BATCH_INVARIANT, as what follows.")] = None
    bits: Annotated[str | None, Field(description="A digest of the engine's log-probabilities.")] = None
    identical: Annotated[
        bool | None,
        Field(description="Whether they have the bits of before; null where there is nothing to compare."),
    ] = None


# --- reports and operations -------------------------------------------------------------------------


class UsageSum(Answer):
    """Sums of one group; the names that were asked for with `by` stand beside them."""

    requests: Count
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    total_tokens: Count
    queue_seconds: float
    first_token_seconds: float
    seconds: float
    load_seconds: float
    cost: float
    queue_seconds_p50: Annotated[float | None, Field(description="Only with `percentiles=true`.")] = None
    queue_seconds_p95: float | None = None
    queue_seconds_p99: float | None = None
    first_token_seconds_p50: float | None = None
    first_token_seconds_p95: float | None = None
    first_token_seconds_p99: float | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None
    seconds_p99: float | None = None


class Usage(Answer):
    """One sum for each group that was asked for."""

    object: Literal["list"]
    data: list[UsageSum]


class AuditEntry(Answer):
    """One change: who made it, of what, and how it was before and after."""

    id: Count
    at: Time
    actor: str
    action: str
    tenant: str | None
    target: str | None
    before: JsonValue
    after: JsonValue
    request_id: str | None


class Audit(Answer):
    """One page of changes, oldest first."""

    object: Literal["list"]
    data: list[AuditEntry]
    next: Annotated[Count | None, Field(description="What `after` of the next page is; null at the end.")]


_WHOSE = Field(description="Only in a fleet.")


class ResidentSlot(Answer):
    """A GPU slot; all null when it is free. `running` counts requests."""

    replica: Annotated[str | None, _WHOSE] = None
    tenant: str | None
    name: Annotated[str | None, Field(description="`adapter@version`.")]
    number: Number | None
    version: str | None
    load_id: Count | None
    state: str | None
    running: Count
    draining: bool


class ResidentVersion(Answer):
    """A version that takes room in host memory."""

    replica: Annotated[str | None, _WHOSE] = None
    tenant: str | None
    name: Annotated[str | None, Field(description="`adapter@version`.")]
    number: Number | None
    version: str
    load_id: Count
    state: str
    tier: Tier
    pinned: bool
    size_bytes: Count


class Rates(Answer):
    """How fast the server is now; null where nothing was seen, as at the first look."""

    seconds: Annotated[float, Field(description="How long the tokens were counted.")]
    output_tokens_per_second: float | None
    first_tokens: Annotated[Count, Field(description="Streams of the last minute, those that began.")]
    first_token_p50: Annotated[float | None, Field(description="Seconds.")]
    first_token_p99: Annotated[float | None, Field(description="Seconds.")]


class ResidentReplica(Answer):
    """One replica of a fleet; null what it has not told. `answered` is false of one that does not answer."""

    id: str
    url: str
    state: str
    answered: bool
    gpu_slots: Count | None
    host_slots: Count | None
    max_running: Count | None
    backlog_seconds: float | None
    running: Count | None
    queued: Count | None
    aside: Count | None
    drains: Count | None
    preemptions: Count | None
    rates: Rates | None


class Residency(Answer):
    """The scheduler's state: slots, host memory, and requests and counters of fairness by tenant.

    Of a fleet, that of all replicas together: counts are sums, tokens per second too, and the times to the
    first token are of this gateway's clients.
    """

    slots: list[ResidentSlot]
    host: list[ResidentVersion]
    queued: dict[str, Count]
    running: dict[str, Count]
    counters: dict[str, float]
    aside: Count
    drains: Count
    preemptions: Count
    draining: bool
    rates: Rates
    replicas: Annotated[list[ResidentReplica] | None, _WHOSE] = None
    events: Annotated[list[JsonValue] | None, Field(description="Only where they were asked for.")] = None
    checkpoint: Annotated[
        list[JsonValue] | None,
        Field(
            description="The state before the first of `events`; only where all that are kept were asked for."
        ),
    ] = None


_NAMED = Field(description="`tenant/adapter@version`; the digest in place of a version that is deleted.")


class Replica(Answer):
    """A replica as it last announced itself, every 2 s."""

    id: str
    url: str
    state: Literal["ready", "verifying", "restarting", "draining", "lost"]
    started_at: Time
    beat_at: Time
    base: str
    fingerprint: str | None
    engine: str
    dtype: str
    max_model_len: Count
    max_running: Count
    gpu_slots: Count
    host_slots: Count
    running: Count
    queued: Count
    busy_slots: Count
    backlog_seconds: Annotated[float | None, Field(description="Until all that waits has a place.")]
    pressure: Annotated[float | None, Field(description="0 idle, 1 full; as `loraplex_pressure`.")]
    in_slots: Annotated[list[str], _NAMED]
    in_host: Annotated[list[str], _NAMED]


class Replicas(Answer):
    object: Literal["list"]
    data: list[Replica]


class Health(Answer):
    """The process is alive."""

    status: Literal["alive"]


class Readiness(Answer):
    """Whether requests are answered; for each part "ok" or the reason why not."""

    status: Literal["ready", "not ready"]
    inference: Annotated[str, Field(description='"ok", or which check fails; then the status is 503.')]
    writes: Annotated[str, Field(description="The same for changes by the API; the status stays 200.")]
    uploads: Annotated[str, Field(description="The same for uploads; the status stays 200.")]
    checks: dict[str, str]


class Model(Answer):
    """What a request may name as `model`."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: str
    parent: Annotated[str | None, Field(description="The base model; not there on its own card.")] = None


class Models(Answer):
    """The customer's adapters, and the base model where it is allowed."""

    object: Literal["list"]
    data: list[Model]
