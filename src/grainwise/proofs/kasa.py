"""KaSA beside LoRA: how well a model learns something new from few, partly wrong examples, and what is left of what it knew.

A small Llama first learns 160 facts (a tenth of the answers it sees are wrong) and four rules on strings; then adapters of
one rank learn a new rule from 128 strings, a tenth of their answer tokens wrong, read many times; three new rules, each by
an adapter of its own. Two steps of the paper's ladder are recorded beside: the truncated base with plain LoRA, and KaSA
without its penalties. A second experiment looks at the mechanism: which singular values stay when the change to be learnt
has a known rank.
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
NEW_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "swap": lambda x: x[:, [1, 0, 2, 4, 3]],
    "turn": lambda x: x.roll(2, 1),
    "reverse and shift": lambda x: (x.flip(1) - 8 + 1) % SYMBOLS + 8,
}
MARKS = {"copy": 3, "reverse": 4, "shift": 5, "rotate": 6} | dict.fromkeys(NEW_RULES, 7)
WRONG_ANSWERS = 0.1
RANK, EXAMPLES, STEPS = 4, 128, 150
OPTIONS: dict[str, dict[str, float]] = {  # each the best of eight trials on seeds 10-12
    "lora": {"rate": 2e-2, "alpha": 8},
    "kasa": {"rate": 1e-2, "alpha": 8, "beta": 1e-2, "gamma": 1e-1},
}
KEPT_SHARE = 0.1  # of the largest |ds|, for counting the singular values that stay


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
        answer = (OLD_RULES | NEW_RULES)[name](strings)
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

    def new(self, name: str, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of one new rule from few examples, some answers wrong, the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        prompts, answers = self.rule(name, EXAMPLES, generator)
        wrong = torch.rand(answers.shape, generator=generator) < WRONG_ANSWERS
        answers = torch.where(wrong, torch.randint(8, 8 + SYMBOLS, answers.shape, generator=generator), answers)
        for _ in range(0, steps, EXAMPLES // 32):
            for chosen in torch.randperm(EXAMPLES, generator=generator).split(32):
                yield batch(prompts[chosen], answers[chosen], width=12)


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
def measure(model: nn.Module, world: World, name: str) -> dict[str, float]:
    """Errors and loss on a new rule, accuracy on facts and on the old rules; rules on rows never trained on."""
    model.eval()
    fresh = torch.Generator().manual_seed(10_000)
    tested = world.rule(name, 400, fresh)
    old = sum(accuracy(model, *world.rule(rule, 200, fresh)) for rule in OLD_RULES) / len(OLD_RULES)
    facts = accuracy(model, *world.all_facts())
    return {
        "errors": 1 - accuracy(model, *tested),
        "loss": model(**batch(*tested, width=12)).loss.item(),
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


def adapted(
    base: LlamaForCausalLM, world: World, method: str, name: str, seed: int, steps: int, **options: float
) -> dict[str, float]:
    """Train one adapter on a new rule and measure. options: instead of those in OPTIONS."""
    torch.manual_seed(seed)
    model: Any = copy.deepcopy(base)
    chosen = OPTIONS["kasa" if method.startswith("kasa") else "lora"] | options
    if method == "truncated_lora":
        model = get_peft_model(model, KasaConfig(r=RANK, target_modules="all-linear")).unload(restore=False)
    config: LoraConfig | KasaConfig
    if method.endswith("lora"):
        config = LoraConfig(r=RANK, lora_alpha=int(chosen["alpha"]), target_modules="all-linear")
    else:
        config = KasaConfig(
            r=RANK, alpha=chosen["alpha"], beta=chosen["beta"], gamma=chosen["gamma"], target_modules="all-linear", seed=seed
        )
    model = get_peft_model(model, config)
    penalty = (lambda: kasa_regulariser(model)) if method == "kasa" else None
    train_lm(model, world.new(name, steps, seed + 1), steps=steps, lr=chosen["rate"], penalty=penalty)
    return measure(model, world, name)


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
    """One seed: each method on each new rule, averaged over the rules."""
    world = World.of(seed)
    base = pretrained(world, seed, 10 if smoke else 300)
    found: dict[str, float] = {}
    for method in ("lora", "kasa", "truncated_lora", "kasa_without_penalties"):
        figures = [adapted(base, world, method, name, seed, 3 if smoke else STEPS) for name in NEW_RULES]
        found |= {f"{method}_{k}": sum(f[k] for f in figures) / len(figures) for k in figures[0]}
    found["values_left_with_beta"] = values_left(seed, 1e-2, smoke)
    found["values_left_without_beta"] = values_left(seed, 0.0, smoke)
    return {"baseline": found["lora_errors"], "ours": found["kasa_errors"], **found}


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
    claim="learns a new task from few noisy examples with fewer errors than LoRA of the same rank in the same steps",
    substrate="a 3-layer Llama (d = 64) pre-trained on 160 facts (10% of the answers wrong) and four string rules",
    baseline="LoRA: same rank, layers, data, steps, and as many trials on other seeds to choose its rate and alpha",
    metric="share of wrong answer tokens on fresh strings, mean over three rules learnt from 128 strings in 150 steps",
    higher_is_better=False,
    margin=0.1,
    modules=("grainwise.adapt.kasa", "grainwise.adapt.tuner", "grainwise.adapt.spectral", "grainwise.training"),
    run=run,
    conditions=conditions,
    note="Not shown on every seed: on seeds 0 and 2 KaSA makes fewer errors (0.29 against 0.53, 0.23 against 0.39) and keeps "
    "more of the old facts and rules, on seed 1 neither learns the rules (0.62 against 0.55). The code follows the paper (and "
    "PEFT's port, which the tests compare). Four rates with two settings of alpha (LoRA) or of beta and gamma (KaSA) were "
    "tried on seeds 10-12, where LoRA's best (0.076 at 2e-2) was ahead of KaSA's (0.093 at 1e-2): results vary more between "
    "seeds than between methods. Truncation does little: rank 4 of 64 is 6% of the components, with next to no energy. The "
    "mechanism, singular values that switch off, shows on every seed.",
)
