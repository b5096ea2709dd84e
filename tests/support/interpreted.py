"""Adapters by vLLM's kernels for a GPU, in Triton's interpreter: ``python -m`` this, and one of the words.

    shared      in shared slots and in their own
    experts     on the experts of a mixture, and as PEFT computes them
    dora        DoRAs beside others, and as PEFT computes them

Triton is in no list of pins: ``pip install triton``, 290 MB, and 1 GB on the disk. Its interpreter runs the
kernels that a GPU would, one block after the other in numpy, so that ``SharedRowsOnGPU`` is tried as it is:
how it maps rows, what it masks, and that vLLM's shrink and expand then answer as with a slot for each, in
float16, which these kernels want. Ends with 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

# Outputs are about one, and float16 has eleven bits of them.
TOLERANCE = 5e-3


def find_triton() -> None:
    """Lets vLLM take Triton, which its CPU build does without. Raises SystemExit where there is none.

    With no card to be seen it needs none; that this is a CPU build it is not told while it looks.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import vllm.platforms

    assert vllm.platforms.current_platform.is_cpu(), "this is for the CPU build"
    usual = vllm.platforms.vllm_version_matches_substr
    vllm.platforms.vllm_version_matches_substr = lambda part: False
    from vllm.triton_utils import HAS_TRITON

    vllm.platforms.vllm_version_matches_substr = usual
    if not HAS_TRITON:
        raise SystemExit("Triton is not here: pip install triton")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["shared", "experts", "dora"])
    parser.add_argument("sets", nargs="?", type=int, default=8, help="sets of shared slots (8)")
    given = parser.parse_args()
    find_triton()
    if given.what == "shared":
        return try_shared(given.sets)
    return try_experts() if given.what == "experts" else try_dora()


def try_dora() -> int:
    import torch

    from tests.support.dora_in_triton import TOLERANCE, largest_difference

    torch.set_num_threads(1)
    found = largest_difference()
    print(f"DoRA: largest difference from PEFT {found:.1e} (float16; allowed {TOLERANCE:.0e})")
    return int(found > TOLERANCE)


def try_experts() -> int:
    import torch

    from tests.support.experts_in_triton import TOLERANCE, differences

    torch.set_num_threads(1)
    found = differences()
    for kind, difference in found.items():
        print(f"{kind}: largest difference from PEFT {difference:.1e}")
    return int(max(found.values()) > TOLERANCE)


def try_shared(sets: int) -> int:
    import torch
    from vllm.distributed import parallel_state

    from tests.service.worker.test_shared_slots import ONE_WORKER, SLOTS
    from tests.support.shared_in_triton import differences

    parallel_state._TP = ONE_WORKER  # type: ignore[assignment]
    torch.set_num_threads(1)
    began = time.monotonic()
    with torch.inference_mode():
        found = differences(sets)
    print(f"{len(found)} sets of adapters in {SLOTS} shared slots, {time.monotonic() - began:.0f} s:")
    print(f"largest difference from a slot for each: {max(found):.1e} (float16; allowed {TOLERANCE:.0e})")
    return int(max(found) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
