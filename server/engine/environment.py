"""Variables of the environment that vLLM reads, as this server needs them: set before vLLM is imported."""

from __future__ import annotations

import os

# Name -> (what it must be, why no other value is taken). What an adapter makes of NaN would reach others.
REQUIRED = {
    "VLLM_COMPUTE_NANS_IN_LOGITS": ("1", "what one adapter makes of NaN would reach everybody's answers"),
    "VLLM_RAISE_ON_LOGIT_NANS": ("0", "one adapter that makes NaN would end the engine for everybody"),
}
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    # We stop the engine when nothing runs any more, so its workers have nothing to finish.
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    # Threads of a step that wait for each other by spinning take the processor from this process and from
    # loads, and then have to wait for these: with two cores every load is felt in every stream.
    "OMP_WAIT_POLICY": "passive",
}


def settle() -> None:
    """Sets what is not set. ValueError, with what to do, for a value that breaks isolation."""
    for name, (value, why) in REQUIRED.items():
        given = os.environ.setdefault(name, value)
        if not given.strip().isdigit() or bool(int(given)) != bool(int(value)):
            raise ValueError(f"{name} is {given!r} in the environment, with which {why}: unset it")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from adapters.worker.cpu import onednn  # which imports torch, and with it what reads the others

    os.environ.setdefault(onednn.CAPACITY, str(onednn.KERNELS))
