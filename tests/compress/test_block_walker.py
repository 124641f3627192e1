"""The walker sees what the model computes, layer by layer, and padding never counts."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from grainwise.compress.architecture import architecture_of
from grainwise.compress.block_walker import BlockWalker, SecondMoment
from grainwise.compress.structural import calibration_batches

SHAPE = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=24)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=24, dropout=0.5)),
}


@pytest.fixture(scope="module", params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


def batches_of(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return calibration_batches(ids, vocabulary=97, longest=64)


def padded(rows: list[torch.Tensor], side: str) -> list[dict[str, torch.Tensor]]:
    """One batch of rows of unequal length, padded with token 5, which is also a word."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return [{"input_ids": ids, "attention_mask": mask}]


@torch.no_grad()
def test_streams_are_the_hidden_states_of_the_model(model):
    ids = torch.randint(0, 97, (10, 12), generator=torch.Generator().manual_seed(1))
    walker = BlockWalker(model.train(), batches_of(ids))
    assert model.training  # restored, although the walk itself runs without dropout
    model.eval()
    states = model(ids, output_hidden_states=True).hidden_states
    assert walker.tokens == 120
    for i, layer in enumerate(walker.layers):
        torch.testing.assert_close(torch.cat(walker.streams), states[i], atol=1e-6, rtol=1e-5)
        walker.advance(layer, f"layer {i}")
    final_norm = model.get_submodule(architecture_of(model).final_norm)
    torch.testing.assert_close(final_norm(torch.cat(walker.streams)), states[-1], atol=1e-5, rtol=1e-5)


def test_sublayers_of_the_map_make_up_the_layer(model):
    model.eval()
    ids = torch.randint(0, 97, (4, 9), generator=torch.Generator().manual_seed(2))
    whole, parts = BlockWalker(model, batches_of(ids)), BlockWalker(model, batches_of(ids))
    for layer in whole.layers:
        whole.advance(layer, "layer")
        for sub in architecture_of(model).sublayers:
            norm = layer.get_submodule(sub.norm)
            parts.update(lambda h, c, layer=layer, sub=sub, norm=norm: h + sub.branch(layer, norm(h), c), sub.kind)
        torch.testing.assert_close(parts.streams[0], whole.streams[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    model.eval()
    rows = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 7, 12)]
    alone = BlockWalker(model, [b for r in rows for b in batches_of(r[None])])
    together = BlockWalker(model, padded(rows, side))
    assert together.tokens == alone.tokens == 22
    for layer in alone.layers:
        alone.advance(layer, "layer")
        together.advance(layer, "layer")
        torch.testing.assert_close(together.second_moment(), alone.second_moment(), atol=1e-5, rtol=1e-5)


def test_observed_inputs_are_the_kept_rows_of_the_named_module(model):
    model.eval()
    layer = architecture_of(model).layers_of(model)[0]
    writer = architecture_of(model).sublayers[1].writer
    moment = SecondMoment(24)
    seen = []
    handle = layer.get_submodule(writer).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    rows = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 6)]
    walker = BlockWalker(model, padded(rows, "right"))
    walker.advance(layer, "layer 0", observe={writer: moment.add})
    handle.remove()
    kept = seen[0].reshape(-1, 24)[walker.kept[0].flatten()].double()
    assert moment.count == 10
    torch.testing.assert_close(moment.total, kept.T @ kept)
    before = moment.count
    walker.advance(layer, "layer 0 again")
    assert moment.count == before  # the watch ends with the step


def test_second_moment_is_uncentred_and_in_float64():
    moment = SecondMoment(3)
    for rows in torch.full((4, 2, 3), 3.0).half():
        moment.add(rows)
    assert moment.total.dtype == torch.float64
    assert torch.equal(moment.total, torch.full((3, 3), 72.0, dtype=torch.float64))


def test_activations_that_are_not_finite_name_the_place():
    torch.manual_seed(0)
    model = MAKERS["llama"]().eval()
    walker = BlockWalker(model, batches_of(torch.randint(0, 97, (2, 5))))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    walker.advance(walker.layers[0], "layer 0")
    with pytest.raises(FloatingPointError, match="after layer 1 are not finite"):
        walker.advance(walker.layers[1], "layer 1")
    with pytest.raises(ValueError, match="no batches"):
        BlockWalker(model, [])
