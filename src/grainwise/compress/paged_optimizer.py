"""An optimizer whose state is paged out under a byte budget (the paged optimizer of QLoRA, arXiv 2305.14314).

`PagedOptimizer(inner, budget_bytes=...)` wraps any torch optimizer that treats each parameter on its own (Adam and its kin).
Parameters are stepped bucket by bucket; the state of the buckets used least recently moves to memory-mapped safetensors files
in a folder, or to (pinned) host memory, and comes back when its turn comes. The arithmetic is the inner optimizer's own.

The paper lets the driver page unified memory; here buckets move explicitly, which needs no CUDA and keeps the stated budget.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

State = dict[str, Tensor]
INDEX = "paged_optimizer.json"


class FileStore:
    """Bucket states as `bucket_<n>.safetensors` in a folder, written whole or not at all, read through a memory map."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, bucket: int) -> Path:
        """Where a bucket lies when it is paged out."""
        return self.folder / f"bucket_{bucket}.safetensors"

    def put(self, bucket: int, tensors: State) -> None:
        temporary = self.path(bucket).with_suffix(".partial")
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, self.path(bucket))

    def get(self, bucket: int) -> State:
        return load_file(self.path(bucket))


class HostStore:
    """Bucket states in host memory, pinned where they come from a CUDA device."""

    def __init__(self) -> None:
        self.kept: dict[int, State] = {}

    def put(self, bucket: int, tensors: State) -> None:
        pages = self.kept.get(bucket) or {
            key: torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda) for key, value in tensors.items()
        }
        for key, value in tensors.items():
            pages[key].copy_(value, non_blocking=True)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.current_stream().synchronize()  # the device memory is given back as soon as this returns
        self.kept[bucket] = pages

    def get(self, bucket: int) -> State:
        return self.kept[bucket]


class PagedOptimizer(Optimizer):
    """Wraps `inner`; at most `budget_bytes` of its state are resident between and during steps.

    budget_bytes: bytes of optimizer state kept where the parameters are. folder: page to memory-mapped files there (a
    temporary folder, removed with the optimizer, when `store` is "file" and no folder is given). store: "file" or "host".
    `evictions` counts the buckets moved out so far. It is a torch Optimizer: schedulers and `Trainer(optimizers=(opt, None))`
    take it. Raises ValueError for a budget below the state of the largest parameter, found at the first step.
    """

    def __init__(self, inner: Optimizer, *, budget_bytes: int, folder: str | Path | None = None, store: str = "file") -> None:
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected a torch optimizer to wrap, got {type(inner).__name__}")
        if isinstance(inner, torch.optim.LBFGS):
            raise ValueError("LBFGS couples all parameters: it cannot be stepped bucket by bucket")
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        if store not in ("file", "host") or (store == "host" and folder is not None):
            raise ValueError(f"store must be 'file', or 'host' without a folder, got {store!r} with folder {folder}")
        self.inner, self.budget_bytes, self.evictions = inner, budget_bytes, 0
        super().__init__(inner.param_groups, inner.defaults)  # shares the group dicts: schedulers act on both
        self.state = inner.state
        self._own = tempfile.TemporaryDirectory(prefix="paged_optimizer_") if store == "file" and folder is None else None
        self.store = HostStore() if store == "host" else FileStore(Path(folder or self._own.name))  # type: ignore[union-attr]
        self.buckets = self._make_buckets()
        self.resident: OrderedDict[int, int] = OrderedDict()  # bucket -> bytes, least recently used first
        self.paged: dict[int, int] = {}
        self._settle_all()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is being built: buckets are fixed from then on."""
        if hasattr(self, "buckets"):
            raise ValueError("add parameter groups to the inner optimizer before wrapping it")
        super().add_param_group(param_group)

    def _make_buckets(self) -> list[list[tuple[int, Tensor]]]:
        """(group, parameter) runs whose two moments take about a quarter of the budget."""
        buckets: list[list[tuple[int, Tensor]]] = [[]]
        size = 0
        for g, group in enumerate(self.inner.param_groups):
            for parameter in group["params"]:
                need = 2 * parameter.numel() * parameter.element_size()
                if buckets[-1] and size + need > self.budget_bytes // 4:
                    buckets.append([])
                    size = 0
                buckets[-1].append((g, parameter))
                size += need
        return buckets

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the inner optimizer, bucket after bucket."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, bucket in enumerate(self.buckets):
            if all(parameter.grad is None for _, parameter in bucket):
                continue
            self._bring_in(number)
            self._step_only(bucket)
            self._settle(number)
        return loss

    def _step_only(self, bucket: list[tuple[int, Tensor]]) -> None:
        whole = [group["params"] for group in self.inner.param_groups]
        try:
            for g, group in enumerate(self.inner.param_groups):
                group["params"] = [parameter for owner, parameter in bucket if owner == g]
            self.inner.step()
        finally:
            for group, parameters in zip(self.inner.param_groups, whole):
                group["params"] = parameters

    def _bring_in(self, number: int) -> None:
        """Make room for a bucket and load its state if it is paged out."""
        if number in self.resident:
            self.resident.move_to_end(number)
            return
        bucket = self.buckets[number]
        expected = 2 * sum(p.numel() * p.element_size() for _, p in bucket)  # two moments, until the first step tells
        self._make_room(self.paged.get(number, expected))
        if number in self.paged:
            tensors = self.store.get(number)
            for i, (_, parameter) in enumerate(bucket):
                for key, value in self.state[parameter].items():
                    if value is None:
                        page = tensors[f"{i}.{key}"]
                        device = parameter.device if page.ndim else page.device  # step counters stay on the CPU
                        self.state[parameter][key] = page.to(device, copy=True, non_blocking=True)
            self.resident[number] = self.paged.pop(number)

    def _settle(self, number: int) -> None:
        """Count the state that the step may have created, and keep the budget."""
        tensors = self._tensors(number)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > self.budget_bytes:
            raise ValueError(
                f"the state of {len(self.buckets[number])} parameter(s) takes {size} bytes, more than the budget of "
                f"{self.budget_bytes}: raise budget_bytes"
            )
        self.resident[number] = size
        self.resident.move_to_end(number)
        self._make_room(0)

    def _settle_all(self) -> None:
        for number in range(len(self.buckets)):
            if self._tensors(number):
                self._settle(number)

    def _make_room(self, size: int) -> None:
        while self.resident and sum(self.resident.values()) + size > self.budget_bytes:
            self._page_out(next(iter(self.resident)))

    def _tensors(self, number: int) -> State:
        """The state tensors of a bucket as `<place in the bucket>.<name>`."""
        return {
            f"{i}.{key}": value
            for i, (_, parameter) in enumerate(self.buckets[number])
            for key, value in self.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _page_out(self, number: int) -> None:
        tensors = self._tensors(number)
        self.store.put(number, tensors)
        for name in tensors:
            i, key = name.split(".", 1)
            self.state[self.buckets[number][int(i)][1]][key] = None
        self.paged[number] = self.resident.pop(number)
        self.evictions += 1

    @property
    def resident_bytes(self) -> int:
        """Bytes of state that are not paged out."""
        return sum(self.resident.values())

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict, whole: pages are read (memory-mapped when in files) but stay paged out."""
        filled = self.inner.state_dict()
        numbers = {id(p): n for n, p in enumerate(p for group in self.inner.param_groups for p in group["params"])}
        states = {key: dict(value) for key, value in filled["state"].items()}
        for number in self.paged:
            for name, value in self.store.get(number).items():
                i, key = name.split(".", 1)
                states[numbers[id(self.buckets[number][int(i)][1])]][key] = value
        return {**filled, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this or of a plain optimizer of the inner kind, paging out what exceeds the budget."""
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.resident.clear()
        self.paged.clear()
        self._settle_all()

    def save(self, folder: str | Path) -> None:
        """Write the whole state to a folder: one safetensors file for each bucket and an index, none of it half written."""
        target = Path(folder)
        partial = FileStore(target.with_name(target.name + ".partial"))
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.inner.param_groups]
        other: list[list[dict[str, Any]]] = []
        for number, bucket in enumerate(self.buckets):
            tensors = self.store.get(number) if number in self.paged else self._tensors(number)
            if tensors:
                partial.put(number, tensors)
            other.append([self._other(parameter) for _, parameter in bucket])
        shapes = [[list(parameter.shape) for _, parameter in bucket] for bucket in self.buckets]
        index = {"groups": groups, "other": other, "shapes": shapes}
        (partial.folder / INDEX).write_text(json.dumps(index))
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial.folder, target)

    def _other(self, parameter: Tensor) -> dict[str, Any]:
        """State that is no tensor."""
        return {k: v for k, v in self.state.get(parameter, {}).items() if v is not None and not isinstance(v, Tensor)}

    def resume(self, folder: str | Path) -> None:
        """Take up the state that `save` wrote; the pages are copied into this optimizer's own store.

        Raises ValueError if it was written for other parameters or another budget (buckets differ), FileNotFoundError if
        there is no index.
        """
        source = FileStore(Path(folder))
        index = json.loads((Path(folder) / INDEX).read_text())
        shapes = [[list(parameter.shape) for _, parameter in bucket] for bucket in self.buckets]
        if index["shapes"] != shapes:
            raise ValueError(
                f"{folder} holds the state of other parameters or of another budget: build the optimizer as before"
            )
        for group, saved in zip(self.inner.param_groups, index["groups"]):
            group.update(saved)
        self.resident.clear()
        self.paged.clear()
        for number, bucket in enumerate(self.buckets):
            tensors = source.get(number) if source.path(number).exists() else {}
            for i, (_, parameter) in enumerate(bucket):
                paged = {name.split(".", 1)[1]: None for name in tensors if name.startswith(f"{i}.")}
                if paged:
                    self.state[parameter] = {**index["other"][number][i], **paged}
            if tensors:
                self.store.put(number, tensors)
                self.paged[number] = sum(t.numel() * t.element_size() for t in tensors.values())
