"""The decoding loop that every draft-and-verify system of this room runs in.

    model.generate(ids, custom_generate=decoder, max_new_tokens=128)

A system brings a `Drafter`; `TreeDecoder` does the rest: reads the prompt, has trees drafted and verified, and honours
what `generate` was asked for (length, end tokens, any stopping criterion and logits processor, sampling, scores).
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from grainwise.decode.acceptance import Acceptance, greedy, shared_sample
from grainwise.decode.token_tree import Integers, TokenTree
from grainwise.decode.tree_verifier import TreeVerifier


class Drafter(Protocol):
    """Guesses continuations. Both methods get the verified text so far, int64 (t,), prompt included."""

    def begin(self, text: Integers, vocabulary: int) -> None:
        """A new text starts; `vocabulary` is the number of tokens that the target can score."""

    def draft(self, text: Integers, depth: int) -> TokenTree:
        """A tree whose root is `text[-1]` and which guesses at most `depth` >= 0 tokens ahead."""


@dataclass
class DecodingRecord:
    """What one generation cost. The pass over the prompt is not counted.

    emitted: tokens that each verification yielded (accepted drafts and the target's own). drafted: its drafted nodes.
    draft_seconds, target_seconds: spent in drafting, and in forward passes with the upkeep of the cache.
    """

    emitted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens per target forward; plain decoding has 1. NaN before the first one."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else float("nan")

    @property
    def draft_ms(self) -> float:
        """Mean milliseconds of drafting for each forward."""
        return 1e3 * self.draft_seconds / max(1, len(self.emitted))


class TreeDecoder:
    """Draft, verify, keep: a callable for `model.generate(custom_generate=...)`.

    drafter: where the trees come from. sampling: the acceptance rule under `do_sample=True`; greedy decoding always goes
    by equality with the argmax. `record` holds the figures of the latest generation.
    """

    def __init__(self, drafter: Drafter, sampling: Acceptance = shared_sample) -> None:
        self.drafter, self.sampling = drafter, sampling
        self.record = DecodingRecord()

    def generate(self, model: PreTrainedModel, ids: Tensor, streamer: BaseStreamer | None = None, **options: Any) -> Any:
        """`model.generate(ids, custom_generate=self, **options)`, with a streamer.

        transformers 5 keeps the streamer from a `custom_generate` callable; this form hands it over.
        """
        return model.generate(ids, streamer=streamer, custom_generate=functools.partial(self, streamer=streamer), **options)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue input_ids (1, t); the arguments are those that `generate` prepares for its decoding methods.

        Returns ids (1, t + m), or a `GenerateDecoderOnlyOutput` under `return_dict_in_generate=True`. Raises ValueError
        for what tree decoding cannot honour: batches, beams, padding, caches that cannot be compacted, inputs beside ids.
        """
        check_request(model, input_ids, generation_config, synced_gpus, model_kwargs)
        text = Text(input_ids, generation_config, logits_processor, stopping_criteria, streamer)
        verifier = TreeVerifier(model, model_kwargs.get("past_key_values"))
        accept = self.sampling if generation_config.do_sample else greedy
        self.record = DecodingRecord()
        self.drafter.begin(text.tokens, model.config.get_text_config().vocab_size)
        logits = verifier.prefill(input_ids[:, verifier.past :].to(model.device))
        accept(text.at(TokenTree.single(int(text.tokens[-1])), logits[None]), text.scores, text.emit)
        while not text.finished:
            self._step(text, verifier, accept)
        if streamer is not None:
            streamer.end()
        return text.output(verifier)

    def _step(self, text: Text, verifier: TreeVerifier, accept: Acceptance) -> None:
        started = time.perf_counter()
        tree = self.drafter.draft(text.tokens, text.room - 1)  # the target adds one token to what is accepted
        drafted = time.perf_counter()
        logits = verifier.verify(tree)
        verified = time.perf_counter()
        kept = accept(text.at(tree, logits), text.scores, text.emit)
        accepted = time.perf_counter()
        verifier.keep(kept)
        self.record.draft_seconds += drafted - started
        self.record.target_seconds += verified - drafted + time.perf_counter() - accepted
        self.record.emitted.append(len(kept))
        self.record.drafted.append(len(tree) - 1)


class Text:
    """The text under generation: its tokens, and what `generate` wants done with each new one."""

    def __init__(
        self,
        input_ids: Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self.config, self.processors, self.criteria, self.streamer = config, processors, criteria, streamer
        self.device, self.length, self.finished = input_ids.device, input_ids.shape[1], False
        # accepted paths are written behind the end before they are emitted, hence room for the longest of them
        self.buffer = np.zeros(max(config.max_length, self.length + 1) + 1, dtype=np.int64)
        self.buffer[: self.length] = input_ids[0].cpu().numpy()
        self.kept_scores: list[Tensor] = []
        self.kept_logits: list[Tensor] = []

    @property
    def tokens(self) -> Integers:
        """Prompt and emitted tokens, int64 (length,)."""
        return self.buffer[: self.length]

    @property
    def room(self) -> int:
        """How many tokens may still be emitted."""
        return self.config.max_length - self.length

    def at(self, tree: TokenTree, logits: Tensor) -> TokenTree:
        """From now on `scores` speaks about this tree, whose root is the last token; logits (n, vocabulary)."""
        self.tree, self.logits, self.root = tree, logits, self.length
        self.scored: dict[int, Tensor] = {}  # processors may keep state, so each node is scored once
        return tree

    def ids(self, length: int) -> Tensor:
        """The first `length` tokens as a long tensor (1, length)."""
        return torch.from_numpy(self.buffer[None, :length]).to(self.device)

    def scores(self, node: int) -> Tensor:
        """Processed scores (1, vocabulary), float32, of the token behind `node`, computed as `generate` does."""
        if node not in self.scored:
            scores = self.logits[node][None].to(torch.float32, copy=True)
            if len(self.processors):
                end = self.root + int(self.tree.depths[node])
                self.buffer[self.root : end] = self.tree.tokens[self.tree.path(node)[1:]]
                scores = self.processors(self.ids(end).to(scores.device), scores)
            self.scored[node] = scores
        return self.scored[node]

    def emit(self, token: int) -> bool:
        """Append a token; False when a stopping criterion is met."""
        if self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits):
            self._keep_scores()
        self.buffer[self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        self.finished = bool(self.criteria(self.ids(self.length), self._scores_so_far()).all())
        return not self.finished

    def _keep_scores(self) -> None:
        node = 0  # where the text stands in the tree: at the node its emitted tokens lead to
        for token in self.buffer[self.root : self.length].tolist():
            found = self.tree.child(node, token)
            assert found is not None
            node = found
        if self.config.output_logits:
            self.kept_logits.append(self.logits[node][None].to(torch.float32, copy=True))
        if self.config.output_scores:
            self.kept_scores.append(self.scores(node))

    def _scores_so_far(self) -> tuple[Tensor, ...] | None:
        return tuple(self.kept_scores) if self.config.output_scores and self.config.return_dict_in_generate else None

    def output(self, verifier: TreeVerifier) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        sequences = self.ids(self.length).clone()
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._scores_so_far(),
            logits=tuple(self.kept_logits) if self.config.output_logits else None,
            past_key_values=verifier.cache,
        )


def check_request(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> None:
    """Raises ValueError for a request that tree decoding cannot honour."""
    if input_ids.shape[0] != 1 or config.num_beams != 1 or config.num_return_sequences != 1:
        raise ValueError(
            f"one sequence at a time, got B={input_ids.shape[0]} (num_beams={config.num_beams}, "
            f"num_return_sequences={config.num_return_sequences}): call generate once for each prompt, without beams"
        )
    if input_ids.shape[1] < 1:
        raise ValueError("the prompt is empty: give at least one token")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError(
            "the attention_mask has zeros: pass the prompt without padding (and with a mask of ones if its text holds the "
            "padding token, which generate otherwise masks)"
        )
    if not config.use_cache or synced_gpus:
        raise ValueError(f"tree decoding needs use_cache=True and synced_gpus=False, got {config.use_cache} and {synced_gpus}")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError("output_attentions and output_hidden_states are not available: a pass covers many drafted tokens")
    known = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    extra = sorted(k for k, v in model_kwargs.items() if k not in known and v is not None)
    if extra or "prepare_inputs_for_generation" in vars(model):
        what = ", ".join(extra) or "inputs prepared by a wrapper (a PEFT prompt-learning method)"
        raise ValueError(f"tree decoding reads token ids only and would leave out: {what}")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() >= input_ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {past.get_seq_length()} tokens of a prompt of {input_ids.shape[1]}: "
            "pass the whole prompt, at least one token longer than the cache"
        )
