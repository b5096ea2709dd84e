"""What can be wrong with an adapter, each with a code and a cure.

AdapterError
├── AdapterRejected        the files are not something this base can serve faithfully
├── UploadTooLarge         more bytes than ``max_upload_bytes``
├── UploadIncomplete       a file is missing, or the stream broke off
├── StorageFull            the disk has no room
├── StorageFailed          the disk fails otherwise
├── StorageBusy            another process holds the database; later it goes
├── DatabaseUnavailable    PostgreSQL does not answer
├── StoreUnavailable       the object store does not answer
│   └── BlobMissing        it answers, and has not the files
├── AdapterNotFound        no such adapter or version of this tenant
│   ├── FileNotFound       no such file
│   └── BatchNotFound      no such batch
├── AdapterConflict        a name taken, or a version still needed
│   ├── FileInUse          a batch still reads the file
│   ├── BatchEnded         it cannot be cancelled any more
│   ├── AdapterQuarantined it harmed the server, and is out of service until an operator releases it
│   └── AdapterUnfit       the engine that runs now cannot serve it faithfully
├── QuotaExceeded          more adapters or bytes than the tenant may have
└── AdapterUnavailable     it exists, but cannot be brought into memory now
    └── AdapterDamaged     its files are not those that were uploaded
"""

from __future__ import annotations

from asyncio import CancelledError


def printable(text: str, longest: int = 200) -> str:
    """``text``, which may repeat what a client sent, as an answer may show it.

    Of at most ``longest`` characters and an ellipsis, and valid UTF-8 whatever came in.
    """
    short = text if len(text) <= longest else f"{text[:longest]}…"
    return short.encode("utf-8", "replace").decode()


def cause_of(error: BaseException) -> str:
    """What lies at the bottom of ``error``, in one line: an error of the system, or of a database's driver.

    Never what SQLAlchemy adds to it, which repeats statements and their values.
    """
    while (below := getattr(error, "orig", None) or error.__cause__) is not None:
        if isinstance(below, CancelledError):  # how asyncio.timeout ended what it waited for
            return "no answer came in time"
        error = below
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class AdapterError(Exception):
    """``code`` is stable and for programs; the message says what is wrong and what to do."""

    code = "adapter_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class AdapterRejected(AdapterError):
    """Refused at upload. Build it with ``fault()``, so that every code has its cure.

    ``reason`` is the message without that cure.
    """

    code = "adapter_invalid"
    reason = ""


class UploadTooLarge(AdapterError):
    """The files together have more bytes than ``max_upload_bytes``."""

    code = "upload_too_large"


class UploadIncomplete(AdapterError):
    """A file is missing, or the stream broke off."""

    code = "upload_incomplete"


class StorageFull(AdapterError):
    """The disk has no room."""

    code = "storage_full"


class StorageFailed(AdapterError):
    """The disk fails otherwise."""

    code = "storage_failed"
    retry_after = 30.0


class StorageBusy(AdapterError):
    """Nothing was changed; ``retry_after`` is in seconds."""

    code = "storage_busy"
    retry_after = 2.0


class DatabaseUnavailable(AdapterError):
    """PostgreSQL does not answer; nothing was changed. ``retry_after`` is in seconds."""

    code = "database_unavailable"
    retry_after = 2.0


class StoreUnavailable(AdapterError):
    """The object store does not answer; ``retry_after`` is in seconds."""

    code = "store_unavailable"
    retry_after = 5.0


class BlobMissing(StoreUnavailable):
    """The object store answers, and has no whole blob of this digest, or other bytes under its name."""

    code = "adapter_files_missing"
    retry_after = 60.0


class AdapterNotFound(AdapterError):
    """The tenant has no such adapter or version."""

    code = "adapter_not_found"


class FileNotFound(AdapterNotFound):
    """The tenant has no such file, or it has expired."""

    code = "file_not_found"


class BatchNotFound(AdapterNotFound):
    """The tenant has no such batch."""

    code = "batch_not_found"


class AdapterConflict(AdapterError):
    """A name is taken, or a version still needed."""

    code = "adapter_conflict"


class FileInUse(AdapterConflict):
    """A batch that has not ended reads the file."""

    code = "file_in_use"


class BatchEnded(AdapterConflict):
    """The batch has ended otherwise."""

    code = "batch_ended"


class AdapterQuarantined(AdapterConflict):
    """A version that made NaN or was running when the engine died; the message names the reason.

    ``version`` is the adapter's name and the number.
    """

    code = "adapter_quarantined"
    version: tuple[str, int] | None = None


class AdapterUnfit(AdapterConflict):
    """Fine when it was uploaded, and not what the engine of now can serve; the message says why.

    ``version`` as of ``AdapterQuarantined``, where a request asked for it.
    """

    code = "adapter_unfit"
    version: tuple[str, int] | None = None


class QuotaExceeded(AdapterError):
    """The tenant would have more adapters, files, batches or bytes than it may."""

    code = "quota_exceeded"


class AdapterUnavailable(AdapterError):
    """It exists, but cannot be brought into memory now."""

    code = "adapter_unavailable"


class AdapterDamaged(AdapterUnavailable):
    """Its files are gone, cannot be read, or have changed on the disk."""

    code = "adapter_damaged"
    retry_after = 60.0


# code -> what to do about it. Every refusal of an upload names one of these.
CURES: dict[str, str] = {
    "config_invalid": "Upload the adapter_config.json that PEFT's save_pretrained wrote, unchanged.",
    "not_lora": "Only PEFT adapters with peft_type LORA can be served; train or export one.",
    "dora_unsupported": "Merge the adapter into the base model, or retrain with use_dora=False.",
    "bias_unsupported": "Retrain with bias='none' and lora_bias=False.",
    "modules_to_save_unsupported": "Retrain without it, or merge the adapter into the base model.",
    "init_unsupported": (
        "Convert it to a plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...), or"
        " upload the weights from before the training beside it as initial_adapter_model.safetensors."
    ),
    "feature_unsupported": "Retrain without this feature, or merge the adapter into the base model.",
    "rank_too_large": "Retrain with a smaller r, or ask the operator to raise LORAPLEX_MAX_LORA_RANK.",
    "rank_mismatch": "Upload the config and the weights of the same training run.",
    "alpha_zero": "With lora_alpha 0 the adapter does nothing; retrain with lora_alpha > 0.",
    "pattern_not_literal": "Use literal module names in the patterns, not regular expressions.",
    "pattern_too_long": (
        "Use fewer keys, as q_proj covers every layer, or merge the adapter into the base model."
    ),
    "weights_invalid": "Upload the adapter_model.safetensors that PEFT's save_pretrained wrote, unchanged.",
    "weights_not_safetensors": "Save with safe_serialization=True; pickled weights are never opened.",
    "dtype_unsupported": "Save the weights as float32, float16 or bfloat16.",
    "tensor_unknown": "Export the adapter with PEFT's save_pretrained; other tensors cannot be served.",
    "tensor_unpaired": "Export the adapter again: every module needs its lora_A and its lora_B.",
    "module_unknown": "Retrain on the base model that is served here, with target_modules that it has.",
    "experts_incomplete": (
        "Adapt the experts of a layer all together: both parameters with PEFT's target_parameters, or every"
        " expert's gate, up and down projection with one rank each."
    ),
    "module_fused": "Export the adapter with the parts split as the checkpoint names them.",
    "head_mismatch": (
        "Upload the config and the weights of the same run, as PEFT's save_pretrained wrote them, with the"
        " head of a classifier as score.weight. For more labels ask the operator for max_lora_cls_labels in"
        " LORAPLEX_ENGINE_ARGS."
    ),
    "shape_mismatch": "Retrain on the base model that is served here; this one was trained on another.",
    "tensor_empty": (
        "DeepSpeed's ZeRO-3 leaves such behind: save with stage3_gather_16bit_weights_on_model_save=true, or"
        " gather the parameters before save_pretrained."
    ),
    "module_prefixed": (
        "It was trained on the multimodal model around this one. Train on the text model that is served here,"
        " or, if its weights are the same, take 'language_model.' out of the tensors' names."
    ),
    "target_mismatch": (
        "Upload the config and the weights of the same training run: PEFT would ignore these tensors."
    ),
    "base_mismatch": (
        "Retrain on the base model that is served here, or upload it to a server of the base it names."
    ),
    "weights_not_finite": "The training diverged; retrain with a lower learning rate or longer warm-up.",
    "unexpected_file": (
        "Upload adapter_config.json and adapter_model.safetensors, and nothing else but probes.json, the"
        " tokenizer's files, and for PiSSA and its kin initial_adapter_model.safetensors."
    ),
    "layout_foreign": (
        "Export it as PEFT saves it, adapter_config.json and adapter_model.safetensors; docs/adapters.md says"
        " how for the trainers that have a form of their own."
    ),
    "chat_file_invalid": "Save it with the trainer again, or upload the adapter without it.",
    "added_tokens": (
        "Train it with special tokens in rows that the base's embedding has; or, if it does without these"
        " tokens, upload it without its tokenizer's files; else merge it into a base that has them."
    ),
    "chat_template_invalid": (
        "Mend the template, or upload the adapter without it: then the base's is used for its chats."
    ),
    "probes_invalid": "Write the file with `loraplex probes make`.",
    "probes_unsupported": "Upload it without probes.json.",
    "probe_mismatch": (
        "Make the probes with this adapter on the base model that is served here, or, if only the precision"
        " differs, with a larger tolerance."
    ),
    "archive_invalid": (
        "Send a tar, tar.gz or zip of the adapter's folder, with adapter_config.json and"
        " adapter_model.safetensors once each, neither of them a link."
    ),
    "name_invalid": (
        "Use 1 to 128 letters, digits, '.', '_' or '-', with a letter or digit first;"
        " not `default`, and not the base model's name."
    ),
    "adapter_implausible": (
        "No training makes one like this: upload the config and the weights of the same run, with the"
        " lora_alpha of that run. An operator who means it says allow_implausible=true."
    ),
    "config_unknown_field": (
        "It may change what the adapter does, and is not served. If it does not matter, name it in the"
        " upload: ignore_fields=<name>,<name>."
    ),
    "adapter_no_effect": (
        "It would answer as the base does, as an untrained one would. Upload a trained one, or say"
        " allow_no_effect=true."
    ),
}


def fault(code: str, message: str, *, param: str | None = None) -> AdapterRejected:
    """An ``AdapterRejected`` whose message ends with the cure of ``code``."""
    error = AdapterRejected(f"{message} {CURES[code]}", code=code, param=param)
    error.reason = message
    return error
