"""Recovery fine-tuning: the LoRA setting of the paper, for PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grainwise.compress.architecture import architecture_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def recovery_config(model: PreTrainedModel, *, r: int = 32, alpha: int = 10, dropout: float = 0.05) -> LoraConfig:
    """LoRA on the attention and feed-forward modules of a sliced model, the shortcuts left alone.

    Use it as `get_peft_model(sliced, recovery_config(sliced))` and train as usual; the paper takes 8000 instructions once.
    """
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(architecture_of(model).linear_names),
    )
