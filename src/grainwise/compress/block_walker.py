"""Layer-by-layer calibration: one layer's activations of all calibration text are resident, never those of two.

`BlockWalker` runs the embeddings once, keeps the residual streams of every batch, and then moves them through the model
one step at a time; in between, the caller measures them (`second_moment`), watches the inputs of chosen modules
(`advance(..., observe=...)`), or replaces what a layer does (`update`). Padding never counts: its rows are held at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grainwise.compress.architecture import Context, architecture_of

Step = Callable[[Tensor, Context], Tensor]  # (stream (batch, length, width), context) -> new stream
Visit = Callable[[Tensor], None]  # gets rows (tokens, features)


class SecondMoment:
    """Running sum of x x^T over rows, uncentred, in float64 whatever the rows' type."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """rows: (tokens, width)."""
        exact = rows.double()
        self.total.addmm_(exact.T, exact)
        self.count += len(rows)


class BlockWalker:
    """The residual streams of calibration text on their way through a causal LM.

    model: any model of the architecture map; it is run in evaluation mode and not changed.
    batches: mappings with `input_ids` and `attention_mask`, each (batch, length), as `calibration_batches` makes them.
    dtype: what the streams are held in; the model's own when None.

    streams: one (batch, length, width) tensor a batch. kept: one boolean (batch, length) tensor a batch, False at padding.
    contexts: what the model passes to its layers for each batch (masks, positions).
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], dtype: torch.dtype | None = None) -> None:
        self.layers = architecture_of(model).layers_of(model)
        self.streams: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.contexts: list[dict[str, Any]] = []
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            for batch in batches:
                kept = batch["attention_mask"].to(device).bool()
                stream, context = _enter(model, self.layers[0], batch["input_ids"].to(device), kept)
                self.streams.append(stream.to(dtype or stream.dtype).masked_fill(~kept[..., None], 0.0))
                self.contexts.append({k: _cast(v, dtype) for k, v in context.items()})
                self.kept.append(kept)
        finally:
            model.train(was_training)
        if not self.streams:
            raise ValueError("the calibration data has no batches")
        self._check("the embeddings")

    @property
    def tokens(self) -> int:
        """How many tokens count (padding left out)."""
        return sum(int(kept.sum()) for kept in self.kept)

    @torch.no_grad()
    def update(self, step: Step, where: str) -> None:
        """Replace every stream by `step(stream, context)`. Raises FloatingPointError naming `where` if one is not finite."""
        for i, (stream, kept, context) in enumerate(zip(self.streams, self.kept, self.contexts)):
            self.streams[i] = step(stream, context).masked_fill(~kept[..., None], 0.0)
        self._check(where)

    @torch.no_grad()
    def advance(self, layer: nn.Module, where: str, observe: Mapping[str, Visit] | None = None) -> None:
        """Move the streams through `layer`, an original decoder layer or its replacement.

        observe: names of modules inside the layer -> function that gets each batch's input rows (tokens, features) of it.
        """
        rows_of: list[Tensor] = []  # the batch in flight; hooks read it

        def watch(visit: Visit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, inputs: visit(inputs[0].reshape(-1, inputs[0].shape[-1])[rows_of[-1]])

        handles = [layer.get_submodule(n).register_forward_pre_hook(watch(visit)) for n, visit in (observe or {}).items()]
        try:
            for i, (stream, kept, context) in enumerate(zip(self.streams, self.kept, self.contexts)):
                rows_of[:] = [kept.flatten()]
                moved = layer(stream, **context)
                moved = moved[0] if isinstance(moved, tuple) else moved
                self.streams[i] = moved.masked_fill(~kept[..., None], 0.0)
        finally:
            for handle in handles:
                handle.remove()
        self._check(where)

    def second_moment(self) -> Tensor:
        """Sum of h h^T over all counted tokens, float64 (width, width)."""
        moment = SecondMoment(self.streams[0].shape[-1], self.streams[0].device)
        for stream, kept in zip(self.streams, self.kept):
            moment.add(stream[kept])
        return moment.total

    def _check(self, where: str) -> None:
        if not all(torch.isfinite(stream).all() for stream in self.streams):
            raise FloatingPointError(f"activations after {where} are not finite: check the weights and the calibration text")


class _FirstLayerReached(Exception):
    pass


@torch.no_grad()
def _enter(model: nn.Module, first: nn.Module, ids: Tensor, kept: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the model hands to its first layer: the stream and the keyword arguments."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _FirstLayerReached

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    # Explicit positions make left and right padding equal; no mask at all lets attention take its fast causal path.
    positions = (kept.long().cumsum(-1) - 1).clamp(min=0)
    mask = None if bool(kept.all()) else kept.long()
    try:
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    except _FirstLayerReached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
        return value.to(dtype)
    return value
