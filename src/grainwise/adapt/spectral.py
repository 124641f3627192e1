"""The strongest or weakest singular components of a weight, and plain LoRA folders made of low-rank factors.

With k = min(out, in), W = sum_i s_i u_i v_i^T. The components come from the eigenvectors of the smaller Gram matrix in
float64: with U_r the chosen left vectors, sum_i s_i u_i v_i^T = U_r (U_r^T W), a projection, so no small s_i is ever a
divisor of the result. An eigenvalue's error, 1e-16 s_1^2, corresponds to components below 1e-8 s_1, which is beneath the
rounding of a float32 weight. Only r eigenvectors are computed, several times faster than a full SVD.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import scipy.linalg
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """r singular components, float64: left (out, r) and right (r, in) orthonormal, values (r,) largest first.

    A value that is zero to rounding has a row of zeros in the factor that the weight maps it to.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The sum of the components, (out, in)."""
        return (self.left * self.values) @ self.right


def head(weight: Tensor, r: int) -> Factors:
    """The r largest components of a weight (out, in). Raises ValueError unless 1 <= r <= min(out, in)."""
    return _components(weight, r, largest=True)


def tail(weight: Tensor, r: int) -> Factors:
    """The r smallest components, of the min(out, in) that there are. Raises ValueError unless 1 <= r <= min(out, in)."""
    return _components(weight, r, largest=False)


def _components(weight: Tensor, r: int, largest: bool) -> Factors:
    check_matrix(weight)
    k = min(weight.shape)
    if not 1 <= r <= k:
        raise ValueError(f"r must be between 1 and min(out, in) = {k} for a weight of shape {tuple(weight.shape)}, got {r}")
    wide = weight.detach().double()
    transposed = wide.shape[0] > wide.shape[1]
    if transposed:
        wide = wide.T
    chosen = _eigenvectors(wide @ wide.T, k - r if largest else 0, r)  # (k, r), smallest value first
    image = chosen.T @ wide  # row i is s_i times the other side's singular vector
    values = torch.linalg.vector_norm(image, dim=1)
    order = values.argsort(descending=True)
    values, chosen, image = values[order], chosen[:, order], image[order]
    zero = values <= k * torch.finfo(torch.float64).eps * torch.linalg.vector_norm(wide)
    image = torch.where(zero[:, None], 0.0, image / torch.where(zero, 1.0, values)[:, None])
    if transposed:
        return Factors(image.T.contiguous(), values, chosen.T.contiguous())
    return Factors(chosen, values, image)


def _eigenvectors(gram: Tensor, first: int, count: int) -> Tensor:
    """Eigenvectors first .. first + count - 1, in ascending order, of a symmetric float64 matrix."""
    if gram.device.type != "cpu":  # no routine for a part of the spectrum there, but the whole is fast
        return torch.linalg.eigh(gram)[1][:, first : first + count]
    _, vectors = scipy.linalg.eigh(gram.numpy(), subset_by_index=[first, first + count - 1], check_finite=False)
    return torch.from_numpy(vectors)


def check_matrix(weight: Tensor) -> None:
    """Raise ValueError unless `weight` is a finite floating-point matrix with values."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a floating-point matrix (out, in), got {weight.dtype} of shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device: load the model's weights first")
    if not weight.isfinite().all():
        raise ValueError("the weight has values that are not finite: the checkpoint is broken")


def save_lora(
    folder: str | os.PathLike[str],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    others: Mapping[str, Tensor] | None = None,
    modules_to_save: list[str] | None = None,
) -> Path:
    """Write low-rank changes as a plain LoRA folder that PEFT alone can load, and return its path.

    factors: layer name in the base model -> (B (out, rank), A (rank, in)); the change of its weight is B A, with no
    further scaling. Ranks may differ. others: tensors of further trained modules by their names in a PEFT checkpoint,
    the modules being named in `modules_to_save`. Raises ValueError for no layer or factors that do not fit.
    """
    if not factors:
        raise ValueError("there are no factors to save")
    tensors = {name: value.detach().cpu().contiguous() for name, value in (others or {}).items()}
    for name, (b, a) in factors.items():
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"the factors of {name} do not fit: B is {tuple(b.shape)}, A is {tuple(a.shape)}")
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    ranks = {name: b.shape[1] for name, (b, _) in factors.items()}
    most = max(ranks.values())
    different = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=sorted(factors),
        task_type=task_type,
        base_model_name_or_path=base_model,
        modules_to_save=modules_to_save,
        inference_mode=True,
    )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as partial:
        config.save_pretrained(partial)
        save_file(tensors, Path(partial) / "adapter_model.safetensors", metadata={"format": "pt"})
        for file in Path(partial).iterdir():
            os.replace(file, target / file.name)
    return target
