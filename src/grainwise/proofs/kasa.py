"""KaSA beside LoRA: how well a model learns something new in equal steps, and what is left of what it knew.

A small Llama first learns 160 facts (a tenth of the answers it sees are wrong) and four rules on strings; then adapters of
one rank learn a fifth rule. Two steps of the paper's ladder are recorded beside: the truncated base with plain LoRA, and
KaSA without its penalties. A second experiment looks at the mechanism: which singular values stay when the change to be
learnt has a known rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from grainwise.adapt.kasa import KasaConfig, kasa_regulariser
from grainwise.proofs.frame import Proof
from grainwise.training import train_lm

SYMBOLS = 40  # tokens 8 .. 47; a string is five of them
FACT_MARK, RELATION, RULE_END = 2, 48, 1
OLD_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "shift": lambda x: (x - 8 + 1) % SYMBOLS + 8,
    "rotate": lambda x: x.roll(1, 1),
}
MARKS = {"copy": 3, "reverse": 4, "shift": 5, "rotate": 6, "swap": 7}
WRONG_ANSWERS = 0.1
RANK, RATES = 4, (5e-3, 1e-2, 2e-2, 4e-2)
KEPT_SHARE = 0.1  # of the largest |ds|, for counting the singular values that stay


def swap(x: Tensor) -> Tensor:
    """The new rule: the first two symbols change places, and so do the last two."""
    return x[:, [1, 0, 2, 4, 3]]


@dataclass
class World:
    """The facts of one seed and the rows made of them; a row is (prompt, answer), the loss is on the answer."""

    facts: Tensor  # (SYMBOLS entities, 4 relations) -> value token
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randint(8, 8 + SYMBOLS, (SYMBOLS, 4), generator=generator), generator)

    def all_facts(self) -> tuple[Tensor, Tensor]:
        """Prompts (160, 3) and answers (160, 1)."""
        entity = torch.arange(SYMBOLS).repeat_interleave(4)
        relation = torch.arange(4).repeat(SYMBOLS)
        prompt = torch.stack([torch.full_like(entity, FACT_MARK), entity + 8, relation + RELATION], dim=1)
        return prompt, self.facts[entity, relation][:, None]

    def rule(self, name: str, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Prompts (count, 7) and answers (count, 5) of fresh strings."""
        strings = torch.randint(8, 8 + SYMBOLS, (count, 5), generator=generator or self.generator)
        mark, end = torch.full((count, 1), MARKS[name]), torch.full((count, 1), RULE_END)
        answer = swap(strings) if name == "swap" else OLD_RULES[name](strings)
        return torch.cat([mark, strings, end], dim=1), answer

    def old(self, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of facts, some answers wrong, and of the old rules."""
        prompts, answers = self.all_facts()
        for _ in range(steps):
            chosen = torch.randint(len(prompts), (48,), generator=self.generator)
            wrong = torch.rand((48, 1), generator=self.generator) < WRONG_ANSWERS
            noise = torch.randint(8, 8 + SYMBOLS, (48, 1), generator=self.generator)
            facts = batch(prompts[chosen], torch.where(wrong, noise, answers[chosen]), width=12)
            rules = [batch(*self.rule(name, 12), width=12) for name in OLD_RULES]
            yield {key: torch.cat([part[key] for part in (facts, *rules)]) for key in facts}

    def new(self, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of the new rule, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield batch(*self.rule("swap", 32, generator), width=12)


def batch(prompts: Tensor, answers: Tensor, width: int) -> dict[str, Tensor]:
    """Rows padded on the right to `width`, with labels on the answer alone."""
    ids = torch.cat([prompts, answers], dim=1)
    labels = torch.cat([torch.full_like(prompts, -100), answers], dim=1)
    room = (0, width - ids.shape[1])
    return {"input_ids": functional.pad(ids, room), "labels": functional.pad(labels, room, value=-100)}


@torch.no_grad()
def accuracy(model: nn.Module, prompts: Tensor, answers: Tensor) -> float:
    """Share of answer tokens that are the most likely ones, given the right ones before them."""
    model.eval()
    ids = torch.cat([prompts, answers], dim=1)
    guessed = model(input_ids=ids).logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
    return (guessed == answers).float().mean().item()


@torch.no_grad()
def measure(model: nn.Module, world: World) -> dict[str, float]:
    """Loss and accuracy on the new rule, accuracy on facts and on the old rules, on rows never trained on."""
    model.eval()
    fresh = torch.Generator().manual_seed(10_000)
    validation = world.rule("swap", 200, fresh)
    old = sum(accuracy(model, *world.rule(name, 200, fresh)) for name in OLD_RULES) / len(OLD_RULES)
    facts = accuracy(model, *world.all_facts())
    return {
        "loss": model(**batch(*validation, width=12)).loss.item(),
        "new": accuracy(model, *world.rule("swap", 200, fresh)),
        "facts": facts,
        "old_rules": old,
        "kept": (facts + old) / 2,
    }


def pretrained(world: World, seed: int, steps: int) -> LlamaForCausalLM:
    """A small Llama that knows the facts and the old rules."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **shape))
    train_lm(model, world.old(steps), steps=steps, lr=3e-3)
    return model


def adapted(base: LlamaForCausalLM, world: World, method: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Train one adapter on the new rule and measure."""
    torch.manual_seed(seed)
    model: Any = copy.deepcopy(base)
    if method == "truncated_lora":
        model = get_peft_model(model, kasa_config(seed)).unload(restore=False)
    if method.endswith("lora"):
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    else:
        model = get_peft_model(model, kasa_config(seed))
    penalty = (lambda: kasa_regulariser(model)) if method == "kasa" else None
    train_lm(model, world.new(steps, seed + 1), steps=steps, lr=rate, penalty=penalty)
    return measure(model, world)


def kasa_config(seed: int) -> KasaConfig:
    """The paper's defaults for beta and gamma."""
    return KasaConfig(r=RANK, alpha=2 * RANK, target_modules="all-linear", seed=seed)


class Teacher(nn.Module):
    """A linear layer that is asked to follow another one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)
        nn.init.normal_(self.linear.weight, std=size**-0.5)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.linear(x) - y).square().mean())


def values_left(seed: int, beta: float, smoke: bool) -> float:
    """How many |ds| of eight stay above a tenth of the largest when the change to learn has rank 2; mean of three teachers."""
    draws = range(1 if smoke else 3)
    return sum(_values_left(100 * seed + draw, beta, steps=30 if smoke else 300) for draw in draws) / len(draws)


def _values_left(seed: int, beta: float, steps: int, size: int = 32, q: int = 2) -> int:
    torch.manual_seed(seed)
    config = KasaConfig(r=8, alpha=8, beta=beta, gamma=3e-2, target_modules=["linear"], seed=seed)
    model = get_peft_model(Teacher(size), config)
    layer = model.base_model.model.linear
    left, right = (torch.linalg.qr(torch.randn(size, q))[0] for _ in range(2))
    target = layer.base_layer.weight.detach() + 2 * left @ right.T

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(steps):
            x = torch.randn(64, size)
            yield {"x": x, "y": x @ target.T}

    train_lm(model, batches(), steps=steps, lr=2e-2, penalty=lambda: kasa_regulariser(model))
    ds = layer.kasa_diag["default"].detach().abs()
    return int((ds > KEPT_SHARE * ds.max()).sum())


def run(seed: int, smoke: bool) -> dict[str, float]:
    """One seed: each method at the rate of its lowest validation loss on the new rule."""
    world = World.of(seed)
    base = pretrained(world, seed, 10 if smoke else 300)
    rates, steps = (RATES[1:2], 3) if smoke else (RATES, 60)
    found: dict[str, float] = {"kept_before": measure(base, world)["kept"]}
    chosen = {}
    for method in ("lora", "kasa"):
        runs = {rate: adapted(base, world, method, rate, seed, steps) for rate in rates}
        chosen[method] = min(runs, key=lambda rate, runs=runs: runs[rate]["loss"])  # type: ignore[misc]
        found |= {f"{method}_{k}": v for k, v in runs[chosen[method]].items()} | {f"{method}_rate": chosen[method]}
    for method, rate in (("truncated_lora", chosen["lora"]), ("kasa_without_penalties", chosen["kasa"])):
        figures = adapted(base, world, method, rate, seed, steps)
        found |= {f"{method}_{k}": figures[k] for k in ("new", "kept")}
    found["values_left_with_beta"] = values_left(seed, 1e-2, smoke)
    found["values_left_without_beta"] = values_left(seed, 0.0, smoke)
    return {"baseline": found["lora_loss"], "ours": found["kasa_loss"], **found}


def conditions(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What must hold besides: old knowledge is kept at least as well, and the penalty on ds does what it is for."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {
        "old facts and rules kept at least as well as by LoRA on average": mean["kasa_kept"] >= mean["lora_kept"],
        "a change of rank 2 keeps at most 3 of 8 singular values with beta": all(r["values_left_with_beta"] <= 3 for r in rows),
        "and at least 4 of 8 without beta": all(r["values_left_without_beta"] >= 4 for r in rows),
    }


PROOF = Proof(
    system="kasa",
    claim="learns a new task to a lower loss than LoRA of the same rank in the same steps",
    substrate="a 3-layer Llama (d = 64) pre-trained on 160 facts (10% of the answers wrong) and four string rules",
    baseline="LoRA: same rank, layers, scale, data, steps and grid of learning rates",
    metric="validation loss on the new rule after 60 steps, each method at the rate where it is lowest, nats",
    higher_is_better=False,
    margin=0.1,
    modules=("grainwise.adapt.kasa", "grainwise.adapt.tuner", "grainwise.adapt.spectral", "grainwise.training"),
    run=run,
    conditions=conditions,
    note="Not shown at this size. The paper shows task accuracy on GLUE and commonsense sets with large models. Here the seed "
    "decides which method learns faster: on seeds 20-22 KaSA had the lower loss and kept more (0.25 against 0.34 nats on "
    "average), on seeds 0-2 LoRA did; with 100 steps both reach the ceiling and neither the loss nor what is kept tells them "
    "apart. The mechanism, singular values that switch off, does show. Rank 4 of 64 is 6% of the components.",
)
