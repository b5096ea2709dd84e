"""Arguments of vLLM that are not for ``ENGINE_ARGS``, and why."""

from __future__ import annotations

# Engine arguments that the dispatcher depends on; setting them twice could only contradict.
OWNED_ENGINE_ARGS = {
    "model": "MODEL",
    "served_model_name": "SERVED_MODEL_NAME",
    "enable_lora": "GPU_SLOTS",
    "max_loras": "GPU_SLOTS",
    "max_cpu_loras": "HOST_SLOTS",
    "max_lora_rank": "MAX_LORA_RANK",
    "max_model_len": "MAX_MODEL_LEN",
    "worker_extension_cls": "nothing: it is how adapters are paged",
    "lora_modules": "the admin API",
}

_NO_FRONT_END = "Loraplex has its own HTTP server, and it would do nothing"
_TLS = "TLS ends in a proxy in front of Loraplex, and it would do nothing"
_KV = "the KV cache would leave the engine, where nothing keeps customers apart"
# Arguments of vLLM that do nothing here, or that would break paging or isolation; and why.
REFUSED_ENGINE_ARGS = {
    "ssl_keyfile": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_ciphers": _TLS,
    "enable_ssl_refresh": _TLS,
    "api_key": "keys are those of customers, made by the admin API",
    "allowed_origins": _NO_FRONT_END,
    "allowed_methods": _NO_FRONT_END,
    "allowed_headers": _NO_FRONT_END,
    "allow_credentials": _NO_FRONT_END,
    "root_path": _NO_FRONT_END,
    "middleware": _NO_FRONT_END,
    "host": "HOST is a setting of its own",
    "port": "PORT is a setting of its own",
    "uds": _NO_FRONT_END,
    "uvicorn_log_level": _NO_FRONT_END,
    "disable_uvicorn_access_log": _NO_FRONT_END,
    "disable_fastapi_docs": _NO_FRONT_END,
    "enable_request_id_headers": _NO_FRONT_END,
    "sse_keep_alive_interval": _NO_FRONT_END,
    "kv_transfer_config": _KV,
    "kv_events_config": _KV,
    "kv_offloading_size": _KV,
    "kv_offloading_backend": _KV,
    "ec_transfer_config": _KV,
}
# Refused above 1: adapters are paged in the first engine only.
ONE_ENGINE_ARGS = ("data_parallel_size", "data_parallel_size_local", "api_server_count")
