"""The engine-side half of paging: a mix-in for vLLM's worker (``worker_extension_cls``).

Every method is called with ``collective_rpc`` and so runs between two engine steps, on the worker's
own thread. What is slow about a load (reading, parsing, packing, pinning) runs in threads of its own,
which touch neither the GPU nor the engine's tables:

    stage        start reading into host memory      a thread; the call returns at once
    (collect)    enter what is read into the tables  a dictionary insert
    activate     copy host -> slot                   begins, and goes on a slice at each call
    deactivate   free the slot, keep host memory
    evict        free both

This file reaches into vLLM's LoRA managers in the places listed in ``_Pager``; the tests on the real
engine fail when one of them changes. On a CPU it puts ``adapters.worker.cpu``'s ``kernels`` and ``ranks`` in
place of vLLM's own.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from adapters.worker import dora_gpu
from adapters.worker.activation import (
    SLICE_ON_CPU_S,
    SLICE_S,
    Copies,
    CopiesOnCPU,
    CopiesOnGPU,
    SlotFiller,
    can_be_sliced,
)
from adapters.worker.cpu import ranks
from adapters.worker.cpu.onednn import make_kernels
from adapters.worker.cpu.packed import know_the_device
from adapters.worker.dora import DoraScales
from adapters.worker.experts import expert_shapes, has_stacked_experts, largest_pairs
from adapters.worker.heads import head_of
from adapters.worker.host_memory import BufferPool, Loader, stay_beside_the_engine, take_short_turns
from adapters.worker.host_pool import HostPool, pin_for_cuda
from adapters.worker.names import Names, checkpoint_modules, names_of
from adapters.worker.not_finite import NotFiniteGuard
from adapters.worker.notices import Teller, teller
from adapters.worker.prompts import PromptHeads
from adapters.worker.sampling import FairSampling
from adapters.worker.shards import cut_when_read, is_divided, is_merged, pin_nothing
from adapters.worker.shared_filling import SharedFiller
from adapters.worker.shared_rows_gpu import offer
from adapters.worker.sizes import allocated, size_of
from adapters.worker.vocabulary import vocabulary_shape

logger = logging.getLogger(__name__)

STAGING = 8  # loads at once
KEPT_FOR_READING = 2  # buffers for whole adapters, where a worker keeps a part of each
PREFAULTED_BYTES = 1 << 30  # host memory that is touched ahead for the first loads on a GPU machine
PREFAULTED_BYTES_ON_CPU = 4 << 30  # where an adapter stays in the memory that it is read into

# A paging operation: (verb, load id, internal name, absolute folder). Name and folder matter to "stage" only.
WireOp = tuple[str, int, str, str]


class LoraplexWorker:
    """Methods are prefixed: vLLM refuses an extension that shares an attribute with its worker.

    Of the two names that vLLM calls by itself from 0.33 on, ``init_worker_extension`` comes before the model
    is loaded, which paging needs, and is not used.
    """

    _loraplex_state: _Pager
    _loraplex_guard: NotFiniteGuard

    def loraplex_open(
        self,
        gpu_slots: int,
        host_slots: int,
        *,
        shards: bool = True,
        shared: bool = False,
        pool: bool = True,
        slice_s: float | None = None,
        notices: tuple[str, str] | None = None,
    ) -> dict[str, Any]:
        """Starts paging within these caps; returns the base model's adaptable layers, as plain data.

        ``shards``: where several workers share the model, each keeps its part of an adapter only.
        ``shared``: as many adapters as ``gpu_slots`` share vLLM's slots, each on ranks of its own.
        ``pool``: host memory for adapters is made now, and pinned where there is a GPU.
        ``slice_s``: seconds for which filling a slot may hold the engine at a time; 0: until it is full.
        ``notices``: where, and by which token, to say that a load has left its thread.

        ``modules``: checkpoint name -> [in_features, out_features]; ``aliases``: another name for one of them
        -> its checkpoint name; ``fused``: suffix -> its parts; ``slot_bytes``: what one slot takes here;
        ``entry_bytes``: what the largest adapter takes in host memory here, None where that is all of it;
        ``dora``: whether DoRA is computed; ``vocabulary``: as ``modules``, of the head and the embedding;
        ``head``: that of a classifier, see ``adapters.worker.heads``, or None;
        ``notices``: whether they are heard.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        model = runner.model_config
        self._loraplex_state = _Pager(
            runner.lora_manager,
            gpu_slots,
            host_slots,
            model,
            shards=shards,
            shared=shared,
            pool=pool,
            slice_s=slice_s,
            workers=runner.vllm_config.parallel_config.world_size,
            notices=teller(notices),
        )
        self._loraplex_state.make_kernels(runner.scheduler_config)
        PromptHeads(runner, self._loraplex_state.tables)
        FairSampling(runner)
        self._loraplex_guard = NotFiniteGuard(runner)
        self._loraplex_guard.zero_new_blocks()
        return self._loraplex_state.describe()

    def destroy_worker_extension(self) -> None:
        """Called by vLLM, from 0.33 on, before the worker ends: no load of ours keeps it from that."""
        if hasattr(self, "_loraplex_state"):
            self._loraplex_state.close()

    def loraplex_page(self, ops: list[WireOp]) -> dict[str, Any]:
        """Carries out ``ops`` in order, then reports which loads have reached host memory since.

        ``results``: one ``[error or None, seconds]`` per operation; ``staged``: ``[load id, error or None,
        seconds, bytes, ranks]`` per load; ``staging``: how many loads go on. ``activated``: ``[load id, error
        or None, seconds]`` per slot that has been filled, or could not be; ``filling``: how many go on with
        the next call. An operation that fails changes nothing and does not stop the next.
        """
        return self._loraplex_state.page(ops)

    def loraplex_report(self) -> dict[str, Any]:
        """What this worker holds: ``host`` and ``slots`` by load id, ``staging``, ``in_step_loads``;
        ``kernels``, how many of oneDNN's it has made ahead, with the tokens of a step that they reach to;
        ``pool``, of the memory made at the start: bytes, how many are free, whether pinned, and how many
        adapters did not fit in; ``held``, the longest time for which a call has held the engine, in seconds.
        """
        return self._loraplex_state.report()


offer()
know_the_device()


class _Pager:
    """Owns the loads of one worker. Uses, of vLLM's ``LRUCacheWorkerLoRAManager`` (``manager``) and its
    ``LRUCacheLoRAModelManager`` (``tables``): ``_load_adapter``, ``_create_merged_loras_inplace``,
    ``_registered_adapters``, ``_active_adapters``, ``lora_index_to_id``, ``activate_adapter``,
    ``deactivate_adapter``, ``remove_adapter``, ``model``, ``modules`` and ``packed_modules``; and replaces
    what opens files in ``vllm.lora.lora_model`` (``adapters.worker.host_memory``).
    """

    def __init__(
        self,
        manager: Any,
        gpu_slots: int,
        host_slots: int,
        model: Any,
        *,
        shards: bool = True,
        shared: bool = False,
        pool: bool = True,
        slice_s: float | None = None,
        workers: int = 1,
        notices: Teller | None = None,
    ) -> None:
        from vllm.platforms import current_platform

        self.manager = manager
        self.tables = manager._adapter_manager
        self.gpu_slots = gpu_slots
        self.host_slots = host_slots
        self._checkpoint = Path(model.model)
        self._dora: DoraScales | None = None
        self._on_cpu = on_cpu = current_platform.is_cpu()
        self._on_cuda = current_platform.is_cuda_alike()
        self._kernels = (0, 0)
        self._slots = self.tables.lora_slots
        self._shared = None
        if shared:
            from adapters.worker.shared_slots import share_slots

            self._shared = share_slots(self.tables, gpu_slots)
        self._wrappers: list[Any] = []  # that refer to adapters where they lie in host memory
        if not shared and on_cpu:
            from adapters.worker.cpu.kernels import install

            self._wrappers += install(self.tables)
            if model.quantization is None and not manager.lora_config.fully_sharded_loras:
                self._dora = DoraScales(self.tables)
        elif self._on_cuda and dora_gpu.serves(self.tables):
            self._dora = dora_gpu.DoraTables(self.tables, model.quantization)
        self._cuts = shards and is_divided(self.tables)
        self._pool = self._make_room(pool, workers)
        self._copies: Copies = CopiesOnGPU() if self._on_cuda else CopiesOnCPU()
        self._filler: SlotFiller | SharedFiller | None = None
        seconds = (SLICE_ON_CPU_S if on_cpu else SLICE_S) if slice_s is None else slice_s
        ordered = on_cpu or self._on_cuda  # elsewhere what is copied when is not known
        if seconds and ordered and self._shared is not None:
            self._filler = SharedFiller(self._shared, seconds)
        elif seconds and ordered and can_be_sliced(self.tables):
            self._filler = SlotFiller(self.tables, self._copies, seconds, self._scale)
        self._held = 0.0
        self._notices = notices
        self._load = manager._load_adapter
        take_short_turns()
        self._threads = ThreadPoolExecutor(STAGING, "loraplex-stage", initializer=stay_beside_the_engine)
        self._staging: dict[int, Future[tuple[Any, float]]] = {}
        self._evicted_while_staging: set[int] = set()
        self.in_step_loads = 0
        manager._load_adapter = self._load_inside_a_step

    def _make_room(self, pooled: bool, workers: int) -> HostPool:
        """Memory that adapters are read into, and, where this worker keeps a part of them, for those parts.

        On a GPU machine and not ``pooled`` vLLM copies what is read into pinned memory, tensor by tensor, and
        its buffer is free at once.
        """
        dtype = self.manager.lora_config.lora_dtype
        entry = allocated(self.tables.model) // self._slots
        available = psutil.virtual_memory().available
        most = min(PREFAULTED_BYTES_ON_CPU if self._on_cpu else PREFAULTED_BYTES, available // 4)
        size = self.host_slots * entry
        if self._on_cpu:
            size = min(size, most) if pooled else 0
            beside = max(KEPT_FOR_READING, self.host_slots - size // entry)
        else:
            # What is read is as large as all workers' parts together, and free again as soon as it is cut.
            size += KEPT_FOR_READING * entry * workers if self._cuts else STAGING * entry
            size = min(size, available // (2 * workers)) if pooled and self._on_cuda else 0
            beside = STAGING
        pool = HostPool(size, entry, beside, None if self._on_cpu else pin_for_cuda)
        pool.touch()
        if not pool.size:
            pool.prefault(most)
        # Experts that are put together lie in memory that vLLM pins by itself, unless it is pinned already.
        if self._cuts or (pool.pinned and is_merged(self.tables)):
            cut_when_read(self.tables, lambda elements: pool.tensor(elements, dtype))
            if pool.pinned:
                pin_nothing()
        reads_into_parts = self._cuts and not pool.pinned
        read_with(Loader(BufferPool(1, KEPT_FOR_READING) if reads_into_parts else pool, dtype))
        return pool

    def make_kernels(self, steps: Any) -> None:
        """``steps``: vLLM's ``SchedulerConfig``."""
        if self._on_cpu:
            ranks.install()
            most = steps.max_num_batched_tokens, steps.max_num_seqs
            self._kernels = make_kernels(self.tables.model, *most)

    def _load_inside_a_step(self, request: Any) -> Any:
        """Only reached when the engine was asked to run what is not resident, which must never happen.

        It is counted rather than refused: an exception in a step ends the engine for everybody.
        """
        self.in_step_loads += 1
        logger.error("adapter %s was loaded inside an engine step", request.lora_name)
        return self._load(request)

    def describe(self) -> dict[str, Any]:
        shapes: dict[str, list[int]] = {}
        for name, layer in self.tables.modules.items():
            sizes = _part_shapes(layer)
            parts = self.tables.packed_modules.get(name) or [name]
            shapes |= expert_shapes(self.tables, name, layer)
            if sizes is None or len(parts) not in (1, len(sizes)):
                continue
            if len(parts) == 1:
                sizes = [(sizes[0][0], sum(out for _, out in sizes))]
            shapes |= {part: list(size) for part, size in zip(parts, sizes, strict=True)}
        head = head_of(self.tables, alone=self._shared is None and not self._cuts)
        if head is not None:
            shapes.pop(head[0], None)
        words = self._vocabulary()
        names = self._names([*shapes, *words])
        fused = {
            suffix: list(parts)
            for suffix, parts in self.tables.packed_modules_mapping.items()
            if len(parts) > 1 and not suffix.startswith("experts")
        }
        return {
            "modules": {name: shapes[module] for module, name in names.canonical.items() if module in shapes},
            "vocabulary": {
                name: words[module] for module, name in names.canonical.items() if module in words
            },
            "aliases": dict(names.aliases),
            "dora": self._dora is not None,
            "head": head,
            "notices": self._notices is not None,
            "fused": fused,
            "max_lora_rank": self.manager.lora_config.max_lora_rank,
            "slot_bytes": allocated(self.tables.model) // self._slots,
            "entry_bytes": self._largest_entry() if self._cuts else None,
        }

    def _vocabulary(self) -> dict[str, list[int]]:
        """The head and the embedding, where each adapter has slots of its own in one worker."""
        if self._shared is not None or self._cuts:
            return {}
        return {
            name: sizes
            for name, layer in self.tables.modules.items()
            if (sizes := vocabulary_shape(layer)) is not None
        }

    def _names(self, modules: list[str]) -> Names:
        model = self.tables.model
        language = getattr(self.tables, "mm_mapping", None)
        return names_of(
            modules,
            getattr(model, "hf_to_vllm_mapper", None),
            known=checkpoint_modules(self._checkpoint),
            language_model=language.language_model[0] if language is not None else None,
            model_type=getattr(getattr(model, "config", None), "model_type", None),
        )

    def _largest_entry(self) -> int:
        """Bytes of an adapter of the largest rank on all layers that are served, of this worker's part."""
        served = [layer for layer in self.tables.modules.values() if _part_shapes(layer) is not None]
        stacked = [t for layer in served for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
        lora = self.manager.lora_config
        experts = sum(largest_pairs(layer, lora.max_lora_rank) for layer in self.tables.modules.values())
        return int(sum(t.nbytes for t in stacked) // self._slots) + experts * int(lora.lora_dtype.itemsize)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def page(self, ops: list[WireOp]) -> dict[str, Any]:
        began = time.perf_counter()
        results = []
        for verb, load_id, name, path in ops:
            started = time.perf_counter()
            error: str | None = None
            try:
                if verb == "stage":
                    self._stage(load_id, name, path)
                elif verb == "activate":
                    self._activate(load_id)
                elif verb == "deactivate":
                    self._leave_slot(load_id)
                elif verb == "evict":
                    self._evict(load_id)
                else:
                    error = f"unknown paging operation {verb!r}"
            except Exception as exc:  # whatever vLLM raises belongs to this operation alone
                logger.exception("paging operation %s %d failed", verb, load_id)
                error = f"{type(exc).__name__}: {exc}"
            results.append([error, time.perf_counter() - started])
        activated = self._filler.go_on() if self._filler is not None else []
        for load_id, error, _ in activated:
            if error is not None:
                logger.error("filling a slot with load %d failed: %s", load_id, error)
        staged = self._collect()
        self._pool.settle(self._copies.fence)
        self._held = max(self._held, time.perf_counter() - began)
        return {
            "results": results,
            "staged": staged,
            "staging": len(self._staging),
            "activated": [list(one) for one in activated],
            "filling": len(self._filler or ()),
        }

    def report(self) -> dict[str, Any]:
        return {
            "host": sorted(self.tables.list_adapters()),
            "slots": list(self.tables.lora_index_to_id),
            "staging": sorted(self._staging),
            "in_step_loads": self.in_step_loads,
            "kernels": self._kernels,
            "pool": self._pool.account(),
            "held": self._held,
        }

    def _stage(self, load_id: int, name: str, path: str) -> None:
        reading = self._threads.submit(self._read, load_id, name, path)
        self._staging[load_id] = reading
        if (notices := self._notices) is not None:
            reading.add_done_callback(lambda _: notices.tell())

    def _read(self, load_id: int, name: str, path: str) -> tuple[Any, float]:
        """Runs in a thread: files -> packed, scaled (and on a GPU machine pinned) host tensors."""
        from vllm.lora.request import LoRARequest

        started = time.perf_counter()
        stacked = self.tables._is_moe and has_stacked_experts(path)
        request = LoRARequest(lora_name=name, lora_int_id=load_id, lora_path=path, is_3d_lora_weight=stacked)
        lora = self._load(request)
        self.tables._create_merged_loras_inplace(lora)
        lora.loraplex_scales = self._dora.read(path) if self._dora is not None else {}
        return lora, time.perf_counter() - started

    def _collect(self) -> list[list[Any]]:
        """Enters finished loads into vLLM's tables, on the engine's own thread."""
        staged: list[list[Any]] = []
        for load_id in [i for i, future in self._staging.items() if future.done()]:
            future = self._staging.pop(load_id)
            if load_id in self._evicted_while_staging:
                self._evicted_while_staging.discard(load_id)
                continue
            error = future.exception()
            if error is not None:
                staged.append([load_id, f"{type(error).__name__}: {error}", 0.0, 0, 0])
                continue
            lora, seconds = future.result()
            if len(self.tables._registered_adapters) >= self.host_slots:
                staged.append([load_id, "host memory holds host_slots adapters already", 0.0, 0, 0])
                continue
            self.tables._registered_adapters[load_id] = lora
            staged.append([load_id, None, seconds, size_of(lora), self._ranks_of(lora)])
        return staged

    def _ranks_of(self, lora: Any) -> int:
        return 0 if self._shared is None else self._shared.ranks_of(lora)

    def _activate(self, load_id: int) -> None:
        if load_id not in self.tables._registered_adapters:
            raise LookupError(f"load {load_id} is not in host memory")
        if load_id in self.tables._active_adapters:
            return
        if len(self.tables._active_adapters) + len(self._filler or ()) >= self.gpu_slots:
            raise LookupError("no slot is free")
        if self._filler is not None:
            self._filler.begin(load_id)
            return
        try:
            self.tables.activate_adapter(load_id)
            self._scale(self.tables.lora_index_to_id.index(load_id), load_id)
        except BaseException:
            # vLLM marks the slot before it copies: half an adapter must not be mistaken for a whole one.
            self.tables.remove_adapter(load_id)
            raise

    def _scale(self, slot: int, load_id: int) -> None:
        if self._dora is not None:
            self._dora.fill(slot, self.tables._registered_adapters[load_id].loraplex_scales)

    def _leave_slot(self, load_id: int) -> None:
        slots = self.tables.lora_index_to_id
        index = slots.index(load_id) if load_id in slots else None
        if self._filler is not None:
            self._filler.give_up(load_id)
        self.tables.deactivate_adapter(load_id)
        for wrapper in self._wrappers if index is not None else ():
            wrapper.forget(index)

    def _evict(self, load_id: int) -> None:
        if load_id in self._staging:
            self._evicted_while_staging.add(load_id)
            return
        self._leave_slot(load_id)
        self.tables.remove_adapter(load_id)


def read_with(loader: Loader) -> None:
    """From now on vLLM's own code for adapters opens their files with ``loader``, in this process."""
    from vllm.lora import lora_model

    lora_model.safetensors = SimpleNamespace(safe_open=loader.open)


def _part_shapes(layer: Any) -> list[tuple[int, int]] | None:
    """(in_features, out_features) of each checkpoint layer inside ``layer``, whole, not the local shard.

    None for embeddings and the language-model head, which no adapters are served on, and for experts, of
    which ``adapters.worker.experts`` tells.
    """
    from vllm.model_executor.layers.linear import LinearBase

    base = getattr(layer, "base_layer", None)
    if not isinstance(base, LinearBase):
        return None
    inputs = int(base.input_size)
    if hasattr(base, "total_num_heads") and hasattr(base, "total_num_kv_heads"):
        keys = base.total_num_kv_heads * base.head_size
        values = base.total_num_kv_heads * getattr(base, "v_head_size", base.head_size)
        return [(inputs, base.total_num_heads * base.head_size), (inputs, keys), (inputs, values)]
    sizes = getattr(base, "output_sizes", None)
    if sizes:
        return [(inputs, int(size)) for size in sizes]
    return [(inputs, int(base.output_size))]
