"""ADED against plain decoding and prompt look-up: tokens per second on three kinds of prompts, in float32 and bfloat16.

The model is `zoo/llama-mini` inflated to four times its width, so that a forward pass costs what it does in real models.
The table is counted from the training split of the documentation; prompts come from the test split (documentation, lists
of signatures) and from program code, which the table has never seen. All candidates continue the same prompts, greedily and
sampled: the greedy text of so small a model runs into loops, which look-up copies whole, sampled text does not. ADED's table
forgets between runs what it has learned in one.
"""

import re
import statistics
import time
from collections import Counter, defaultdict

import numpy as np
import torch

from grainwise import zoo
from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.data import blocks, load
from grainwise.decode import TokenTree, TreeVerifier
from grainwise.decode.aded import AdaptiveDraftDecoder, TrigramTable
from grainwise.proofs.aded import CODE_PACKAGES, program_code

PROMPTS, PROMPT, NEW = 2, 96, 64  # prompts of a kind, tokens of each, new tokens
BUDGET = 16  # drafted nodes: a pass over 8 to 16 tokens costs about the same, from 24 on it costs more (see "ms of a pass")
NODES = (1, 8, 16, 24, 32)
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 0}  # as in the proof
SEARCH = {"depth": 8, "paths": 48, "increment": 0.08}  # as in the proof


def run(runs: int) -> Benchmark:
    small, tokenizer = zoo.load("llama-mini")
    model = zoo.inflate(small, width=4).eval()
    table = TrigramTable.from_rows(load("pydoc", "train"), tokenizer)
    settings, spread = [], {}
    for dtype, way in ((torch.float32, "greedy"), (torch.bfloat16, "greedy"), (torch.bfloat16, "sampled")):
        model.to(dtype)
        options = SAMPLED if way == "sampled" else {"do_sample": False}
        for kind, ids in prompts(tokenizer).items():
            name = f"{kind}, {str(dtype).removeprefix('torch.')}, {way}"
            decoder = AdaptiveDraftDecoder(table, budget=BUDGET, **SEARCH)
            candidates = {
                "ours": lambda d=decoder, i=ids, o=options: decode(model, i, d, **o),
                "plain": lambda i=ids, o=options: decode(model, i, **o),
                "prompt look-up": lambda i=ids, o=options: decode(model, i, prompt_lookup_num_tokens=10, **o),
            }
            times = alternate(candidates, runs=runs)
            settings.append(setting(name, times, model, ids, decoder, options))
            spread |= {f"{name}, {n}": round(t.spread, 3) for n, t in times.items()}
        settings[-3].extra = dict(settings[-3].extra) | {"ms of a pass by tokens": pass_costs(model)}
    settings[0].extra = dict(settings[0].extra) | {"seconds to build the table": build_times(tokenizer, runs)}
    means = {
        way: f"{way}: {mean_ratio(chosen, None):.2f}x plain, {mean_ratio(chosen, 'prompt look-up'):.2f}x prompt look-up"
        for way in ("greedy", "sampled")
        if (chosen := [s for s in settings if s.name.endswith(way)])
    }
    note = f"ours drafts at most {BUDGET} nodes; means over kinds: " + "; ".join(means.values())
    return Benchmark("aded", "tokens/s", settings, runs, lower_is_better=False, spread=spread, note=note)


def prompts(tokenizer):
    """kind -> long tensor (PROMPTS, PROMPT)."""
    held_out = load("pydoc", "test")
    headings = [h for row in held_out for h in re.findall(r"^(?:def|class) .*$", row["text"], re.MULTILINE)]
    kinds = {
        "documentation": held_out,
        "signature lists": [{"text": "\n".join(headings)}],
        "program code": [{"text": t} for t in program_code(CODE_PACKAGES[:1])],
    }
    chosen = {}
    for kind, rows in kinds.items():
        pool = blocks(rows, tokenizer, PROMPT)
        chosen[kind] = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:PROMPTS]]
    return chosen


def decode(model, ids, decoder=None, **options):
    """Continue every prompt by NEW tokens; the end-of-text token does not stop it."""
    torch.manual_seed(0)
    if decoder is not None:
        decoder.table.reset()
        options["custom_generate"] = decoder
    made = []
    for prompt in ids.split(1):
        made.append(
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, eos_token_id=None,
                pad_token_id=1, **options,
            )
        )  # fmt: skip
    return torch.cat(made)


def setting(name: str, times: dict[str, Timing], model, ids, decoder, options: dict[str, object]) -> Setting:
    tokens = PROMPTS * NEW
    same = (decode(model, ids, decoder, **options) == decode(model, ids, **options)).float().mean().item()
    record = decoder.record
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Setting(
        name=name,
        ours=tokens / times["ours"].median,
        naive=tokens / times["plain"].median,
        peers={"prompt look-up": tokens / times["prompt look-up"].median},
        limit={
            "what": "tokens/s if a forward only read the weights once, at the bandwidth measured now",
            "figure": round(record.tokens_per_forward * bandwidth() / weights, 1),
        },
        extra={
            "tokens per forward (last prompt)": round(record.tokens_per_forward, 3),
            "draft ms": round(record.draft_ms, 3),
            "target ms": round(1e3 * record.target_seconds / len(record.emitted), 2),
        }
        | ({} if options["do_sample"] else {"tokens equal to plain decoding": round(same, 4)}),
    )


@torch.inference_mode()
def pass_costs(model) -> dict[int, float]:
    """Milliseconds (median of five) of verifying trees of so many nodes after 128 tokens of text."""
    found = {}
    for count in NODES:
        verifier, seconds = TreeVerifier(model), []
        verifier.prefill(torch.arange(128)[None])
        nodes = np.arange(count)
        tree = TokenTree(nodes, (nodes + 1) // 2 - 1)
        for _ in range(5):
            started = time.perf_counter()
            verifier.verify(tree)
            seconds.append(time.perf_counter() - started)
            verifier.keep([0])
        found[count] = round(1e3 * statistics.median(seconds), 2)
    return found


def build_times(tokenizer, runs: int) -> dict[str, float]:
    """Counting the tri-grams of the training split: ours and a dictionary of counters."""
    lists = tokenizer(list(load("pydoc", "train")["text"]), add_special_tokens=False, verbose=False)["input_ids"]

    def counters():
        counts = defaultdict(Counter)
        for tokens in lists:
            for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
                counts[a, b][c] += 1
        return {k: [(t, n / c.total()) for t, n in c.most_common(12)] for k, c in counts.items()}

    times = alternate({"ours": lambda: TrigramTable.from_token_lists(lists, len(tokenizer)), "counters": counters}, runs=runs)
    return {"tokens": sum(map(len, lists)), **{n: round(t.median, 3) for n, t in times.items()}}


def bandwidth() -> float:
    """Bytes per second of reading memory with all threads, best of a few."""
    block = torch.ones(2**26)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - started)
    return block.nbytes / min(seconds)


def mean_ratio(settings: list[Setting], peer: str | None) -> float:
    """Geometric mean over the settings of ours / the other."""
    ratios = torch.tensor([s.ours / (s.naive if peer is None else s.peers[peer]) for s in settings])
    return ratios.log().mean().exp().item()
