"""What `/v1/files` and `/v1/batches` answer with: OpenAI's, whose documentation says what all fields mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from adapters.store.batches import State
from server.inference.dialects.answers import Answer, Count

Seconds = Annotated[int, Field(description="Since 1970.")]


class File(Answer):
    """A file; `bytes` is the size of its content."""

    id: str
    object: Literal["file"]
    bytes: Count
    created_at: Seconds
    expires_at: Seconds | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FilePage(Answer):
    """One page of files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(Answer):
    """It is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class LineError(Answer):
    """What is wrong with a line of a batch's input; `line` is null where it is the file as a whole."""

    code: str
    message: str
    line: Count | None
    param: str | None


class LineErrors(Answer):
    """The first hundred."""

    object: Literal["list"]
    data: list[LineError]


class LineCounts(Answer):
    """Lines of a batch."""

    total: Count
    completed: Count
    failed: Count


class CachedTokens(Answer):
    """Of the input tokens."""

    cached_tokens: Count


class ReasoningTokens(Answer):
    """Not told apart."""

    reasoning_tokens: Count


class BatchUsage(Answer):
    """Tokens of all lines that were answered."""

    input_tokens: Count
    input_tokens_details: CachedTokens
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class Batch(Answer):
    """A batch of requests."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: LineErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: State
    output_file_id: str | None
    error_file_id: str | None
    created_at: Seconds
    in_progress_at: Seconds | None
    expires_at: Seconds
    finalizing_at: Seconds | None
    completed_at: Seconds | None
    failed_at: Seconds | None
    expired_at: Seconds | None
    cancelling_at: Seconds | None
    cancelled_at: Seconds | None
    request_counts: LineCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchPage(Answer):
    """One page of batches, newest first."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TenantBatch(Batch):
    """As the operator sees it."""

    tenant: str


class TenantBatches(Answer):
    """One page of all customers' batches, newest first; without what is in them."""

    object: Literal["list"]
    data: list[TenantBatch]
    next: str | None
