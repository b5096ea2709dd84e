"""DoRA (arXiv:2402.09353): what a served adapter needs beyond its two matrices, computed at the intake.

PEFT makes of a layer's output Wx + bias

    y = d * (Wx + s BAx) + bias      d = m / |W + s BA|, one number for each row of W, s the scaling

with m, the magnitudes, among the adapter's tensors. An engine has no time for d, nor the weights any more, so
it is computed here from the base's checkpoint, in float32 and some rows at a time, and stored beside what
PEFT wrote: PEFT passes over the tensors that it does not know. d belongs to one base model, whose fingerprint
is kept with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapters.errors import AdapterRejected, fault
from adapters.inspection.rewritten import write_beside
from adapters.inspection.safetensors_header import DTYPES, TensorHeader
from adapters.inspection.strict_json import show
from adapters.inspection.tensor_stats import TORCH_DTYPES
from adapters.model import WEIGHTS_FILE, BaseModel

MAGNITUDE = ".lora_magnitude_vector"  # PEFT's name for m
SCALE = ".lora_dora_scale"  # ours for d
FINGERPRINT = "loraplex_dora_base"  # in the file's metadata: the base that d is for
# No training turns a row into a hundred times itself; a wrong base or wrong magnitudes do.
MOST = 100.0
NOTE = "DoRA's scale of each output was computed from the base model's weights and is stored beside it"

_ROWS = 1 << 20  # elements of a weight that are in memory at once
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Layer:
    """An adapted layer: its two tensors by name, and what B is multiplied with."""

    a_name: str
    b_name: str
    scaling: float
    outputs: int

    @property
    def stem(self) -> str:
        return self.a_name.removesuffix(".lora_A.weight")


def is_doras(name: str) -> bool:
    """Whether a tensor is one that DoRA has beside lora_A and lora_B."""
    return name.removesuffix(".weight").endswith((MAGNITUDE, SCALE))


def without_doras(tensors: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    return {name: tensor for name, tensor in tensors.items() if not is_doras(name)}


def check_stored(path: Path, tensors: Mapping[str, TensorHeader], base: BaseModel) -> None:
    """Raises AdapterRejected where the stored d of the file ``path`` is not for ``base``, or not there."""
    with safe_open(path, framework="pt") as weights:
        made_for = (weights.metadata() or {}).get(FINGERPRINT)
    if not any(name.endswith(SCALE) for name in tensors) or made_for != (base.fingerprint or ""):
        raise _refuse("its scale was computed for another base model; upload it again.")


def complete(
    path: Path, tensors: Mapping[str, TensorHeader], layers: Mapping[str, Layer], base: BaseModel, into: Path
) -> None:
    """Writes the file ``path`` to ``into`` with a ``SCALE`` for each of ``layers``, by module.

    Reads every adapted weight of ``base`` once. Raises AdapterRejected where magnitudes are missing, of
    another shape or not plausible, and where the base's weights cannot be read; OSError.
    """
    magnitudes = _magnitudes(tensors, layers)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    try:
        with Checkpoint(base) as checkpoint, safe_open(path, framework="pt") as weights:
            scales = {
                f"{layer.stem}{SCALE}": _scale(module, layer, magnitudes[module], weights, checkpoint)
                for module, layer in layers.items()
            }
    except SafetensorError as error:
        raise fault("weights_invalid", f"{WEIGHTS_FILE}: safetensors cannot read it: {error}.") from None
    write_beside(path, kept, scales, into, **{FINGERPRINT: base.fingerprint or ""})


def _refuse(message: str) -> AdapterRejected:
    return fault("dora_unsupported", f"{WEIGHTS_FILE}: {message}", param=WEIGHTS_FILE)


def _magnitudes(tensors: Mapping[str, TensorHeader], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Module -> the name of its magnitudes; each layer has them, and nothing else does."""
    given = {name for name in tensors if is_doras(name) and not name.endswith(SCALE)}
    found = {}
    for module, layer in layers.items():
        names = {f"{layer.stem}{MAGNITUDE}", f"{layer.stem}{MAGNITUDE}.weight"} & given
        if len(names) != 1:
            raise fault("tensor_unpaired", f"{WEIGHTS_FILE}: {show(module)} has no {MAGNITUDE[1:]}.")
        (found[module],) = names
        shape = tensors[found[module]].shape
        if shape != (layer.outputs,):
            raise fault(
                "shape_mismatch",
                f"{WEIGHTS_FILE}: tensor {show(found[module])} is {shape}, and ({layer.outputs},) is needed.",
            )
    if beyond := sorted(given - set(found.values())):
        raise fault("tensor_unpaired", f"{WEIGHTS_FILE}: {show(beyond[0])} has no lora_A and lora_B.")
    return found


def _scale(module: str, layer: Layer, magnitude: str, weights: Any, checkpoint: Checkpoint) -> torch.Tensor:
    a = weights.get_tensor(layer.a_name).float()
    b = weights.get_tensor(layer.b_name).float() * layer.scaling
    norms = torch.cat(
        [torch.addmm(w, b[at : at + len(w)], a).norm(dim=1) for at, w in checkpoint.rows(module)]
    )
    if len(norms) != layer.outputs:
        raise _refuse(f"the base's weight {show(module)} has another shape than it is served in.")
    scale: torch.Tensor = weights.get_tensor(magnitude).float() / norms
    if not scale.isfinite().all():
        raise fault("weights_not_finite", f"{WEIGHTS_FILE}: DoRA's scale of {show(module)} is not finite.")
    if (largest := scale.abs().max().item()) > MOST:
        raise fault(
            "adapter_implausible",
            f"{WEIGHTS_FILE}: DoRA multiplies a row of {show(module)} by {largest:.4g}: its magnitudes are"
            " those of another base model.",
        )
    return scale


class Checkpoint:
    """The weights of the base model's folder, some rows at a time."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._folder = Path(base.source or "")
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}

    def __enter__(self) -> Checkpoint:
        index = self._folder / _INDEX
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: self._folder / Path(file).name for name, file in names.items()}
        elif self._folder.is_dir():
            for path in self._folder.glob("*.safetensors"):
                self._files |= dict.fromkeys(self._open(path).keys(), path)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._opened[path]

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self._files

    def dtype(self, module: str) -> torch.dtype:
        """Of a weight that ``rows`` has read."""
        weight = self._open(self._files[f"{module}.weight"]).get_slice(f"{module}.weight")
        return TORCH_DTYPES[DTYPES[weight.get_dtype()][0]]

    def shape(self, module: str) -> list[int]:
        """Of a weight that is there."""
        name = f"{module}.weight"
        shape: list[int] = self._open(self._files[name]).get_slice(name).get_shape()
        return shape

    def picked(self, module: str, rows: Sequence[int]) -> torch.Tensor:
        """These rows of a module's weight, in float32. Raises as ``rows`` does."""
        found: dict[int, torch.Tensor] = {}
        for at, block in self.rows(module):
            found |= {row: block[row - at].clone() for row in rows if at <= row < at + len(block)}
        return torch.stack([found[row] for row in rows])

    def rows(self, module: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the first row, rows in float32) of a module's weight, block by block."""
        whole, begin, end = self._place(module)
        weight = self._open(self._files[f"{whole}.weight"]).get_slice(f"{whole}.weight")
        if weight.get_dtype() not in DTYPES or len(weight.get_shape()) != 2:
            raise _refuse(f"the base's weight of {show(module)} is quantized, {weight.get_dtype()}.")
        rows, columns = weight.get_shape()
        end = rows if end is None else end
        step = max(1, _ROWS // columns)
        for at in range(begin, end, step):
            yield at - begin, weight[at : min(at + step, end)].float()

    def _place(self, module: str) -> tuple[str, int, int | None]:
        """Whose weight holds that of ``module``, and its rows there, all of them if the last is None.

        A checkpoint may keep layers in one that are served apart, as GLM-4 its gate_up_proj.
        """
        if self.has(module):
            return module, 0, None
        parent, _, last = module.rpartition(".")
        for fused, parts in self._base.fused.items():
            shapes = [self._base.modules.get(f"{parent}.{part}") for part in parts]
            if last in parts and None not in shapes and self.has(f"{parent}.{fused}"):
                sizes = [shape.out_features for shape in shapes if shape is not None]
                begin = sum(sizes[: parts.index(last)])
                return f"{parent}.{fused}", begin, begin + sizes[parts.index(last)]
        raise _refuse(f"the base's folder has no weight of {show(module)}; it may be quantized.")
