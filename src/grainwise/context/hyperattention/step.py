"""HyperAttention as a step of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grainwise.context.attention_registration import chosen_layers, patch_attention
from grainwise.data import blocks
from grainwise.evaluate.language import perplexity

if TYPE_CHECKING:
    from grainwise.recipe_state import RecipeState

MEASURED_BLOCKS = 8  # long test blocks read before and after, enough to see a change of a percent


def recipe_step(
    state: RecipeState,
    *,
    layers: str = "all",
    block: int = 256,
    samples: int = 256,
    min_seq_len: int = 2048,
    length: int = 4096,
) -> dict[str, float | int | str]:
    """Switch `layers` of the model to hyper attention; figures: perplexity at `length` test tokens before and after.

    Raises ValueError when `length` would leave every layer exact or exceeds the model's window, or when the
    test text does not fill one block of it.
    """
    if length <= min_seq_len:
        raise ValueError(f"length {length} must exceed min_seq_len {min_seq_len}: up to there attention stays exact")
    config = state.model.config.get_text_config(decoder=True)
    if length > config.max_position_embeddings:
        raise ValueError(f"length {length} exceeds the model's window of {config.max_position_embeddings} tokens")
    texts = blocks(state.test, state.tokenizer, length)[:MEASURED_BLOCKS]
    state.progress(0, 2, f"perplexity at {length} tokens, exact")
    before = perplexity(state.model, texts, batch_size=1)
    state.progress(1, 2, f"perplexity at {length} tokens, hyper")
    patch_attention(state.model, layers=layers, block=block, samples=samples, min_seq_len=min_seq_len, seed=state.seed)
    after = perplexity(state.model, texts, batch_size=1)
    state.progress(2, 2, "done")
    return {
        "perplexity_exact": before,
        "perplexity_hyper": after,
        "length": length,
        "replaced_layers": len(chosen_layers(layers, config.num_hidden_layers)),
    }
