"""How large a change an adapter may make: far beyond any training, and within the serving type.

Two bounds for each module, on the matrices as the engine holds them (cast, lora_B times the scaling):

    size       ||BA||₂ is at most ``LIMIT`` times ``typical_norm`` of the module's shape: the spectral norm of
               a weight as transformers initialise it, N(0, 0.02²) of (m, n), is about 0.02 (√m + √n)
               (Davidson and Szarek 2001). Only the shape decides, so that a quantized, sharded or remote base
               has the same bound. Measured, as multiples of ``typical_norm``: the demo's three adapters at
               most 3.5; the 176 of the zoo that are served, whose effect is a third of a layer's output, at
               most 15; the weights of SmolLM2-135M themselves 4.5 to 86. With the limit, the product of gate
               and up and its square in the next norm stay within float32 and bfloat16 up to the shapes of a
               70B Llama.
    overflow   Behind a norm an input x has a root mean square of at most ``INPUT_RMS``, so a row a of A makes
               at most ||a||₂ INPUT_RMS √n of it, and a row of BA alike. Neither may leave the serving type:
               float16 ends at 65,504, and what overflows once becomes NaN in a step. Inputs that come from
               elsewhere (of o_proj, of down_proj) are not bounded by this, so it is a proof for the others.

An infinity in one request's answer would reach the KV cache and from there other requests.
"""

from __future__ import annotations

import math

import torch

from adapters.inspection.tensor_stats import largest_product_row, largest_row, spectral_norm
from adapters.model import ModuleShape

LIMIT = 1000.0
INPUT_RMS = 8.0
_INITIAL_DEVIATION = 0.02


def typical_norm(shape: ModuleShape) -> float:
    """The spectral norm of a weight of ``shape`` before its training."""
    return _INITIAL_DEVIATION * (math.sqrt(shape.in_features) + math.sqrt(shape.out_features))


def implausible(a: torch.Tensor, b: torch.Tensor, shape: ModuleShape, norm: float) -> str | None:
    """Why nobody trained ``b @ a`` for a weight of ``shape``, as the end of a sentence; None if it may be.

    ``a`` (rank, in) and ``b`` (out, rank) are as served, ``norm`` is the Frobenius norm of the product.
    """
    allowed = LIMIT * typical_norm(shape)
    # The Frobenius norm is never smaller than the spectral one, and known already.
    if norm > allowed and (spectral := spectral_norm(a, b)) > allowed:
        return f"has the spectral norm {spectral:.3g}, and {allowed:.3g} is the most that is plausible"
    dtype = a.dtype
    most = torch.finfo(dtype).max / (INPUT_RMS * math.sqrt(shape.in_features))
    # A row of BA is at most as long as the Frobenius norm: look closer only where that is not enough.
    row = norm if norm <= most else largest_product_row(a, b)
    for what, length in (("lora_A", largest_row(a)), ("lora_B times lora_A", row)):
        if length > most:
            return (
                f"may overflow {str(dtype).removeprefix('torch.')}: a row of {what} is {length:.3g} long, and"
                f" with a normalised input only up to {most:.3g} are safe"
            )
    return None
