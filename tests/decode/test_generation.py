import functools

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from grainwise.decode import TokenTree, TreeDecoder

VOCABULARY = 41


class Nothing:
    def begin(self, text, vocabulary):
        self.vocabulary = vocabulary

    def draft(self, text, depth):
        return TokenTree.single(int(text[-1]))


class Guesses(Nothing):
    """Random trees; `oracle`, a known continuation, is one of the paths."""

    def __init__(self, oracle=(), seed=0):
        self.oracle, self.rng = np.asarray(oracle, dtype=np.int64), np.random.default_rng(seed)
        self.depths = []

    def draft(self, text, depth):
        self.depths.append(depth)
        paths = self.rng.integers(0, self.vocabulary, (6, 4))
        paths[:, 0] = self.rng.integers(0, 3, 6)
        known = self.oracle[len(text) : len(text) + self.rng.integers(0, 5)]
        paths[3, : len(known)] = known
        return TokenTree.from_paths(int(text[-1]), paths, budget=30).within(depth)


def plain(model, prompt, **options):
    return model.generate(prompt, **{"max_new_tokens": 24, "do_sample": False, **options})


class StopAtMultiple(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([int(input_ids.sum()) % 11 == 0])


GREEDY = {
    "plain": {},
    "one token": {"max_new_tokens": 1},
    "max_length": {"max_new_tokens": None, "max_length": 17},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "eos": {"eos_token_id": list(range(0, 41, 7))},
    "eos not before": {"eos_token_id": list(range(0, 41, 7)), "min_new_tokens": 9},
    "stopping criterion": {"stopping_criteria": StoppingCriteriaList([StopAtMultiple()])},
}


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_greedy_output_is_that_of_plain_generate(model, prompt, options):
    expected = plain(model, prompt, **options)
    unstopped = plain(model, prompt, **{k: v for k, v in options.items() if "eos" not in k and "stop" not in k})
    for drafter in (Nothing(), Guesses(), Guesses(unstopped[0].tolist(), seed=1)):
        decoder = TreeDecoder(drafter)
        got = plain(model, prompt, custom_generate=decoder, **options)
        assert torch.equal(got, expected)
        assert sum(decoder.record.emitted) + 1 == got.shape[1] - prompt.shape[1]  # the prompt's pass gives the first
    if len(decoder.record.emitted) > 3 and torch.equal(expected, unstopped[:, : expected.shape[1]]):
        assert decoder.record.tokens_per_forward > 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5, "repetition_penalty": 1.3}])
def test_sampled_output_is_that_of_plain_generate_under_the_same_seed(model, prompt, options):
    options = {"do_sample": True, **options}
    torch.manual_seed(3)
    expected = plain(model, prompt, **options)
    for oracle in ([], expected[0].tolist()):
        torch.manual_seed(3)
        decoder = TreeDecoder(Guesses(oracle))
        assert torch.equal(plain(model, prompt, custom_generate=decoder, **options), expected)
    assert decoder.record.tokens_per_forward > 1


def test_drafts_never_reach_beyond_the_asked_length(model, prompt):
    drafter = Guesses()
    plain(model, prompt, custom_generate=TreeDecoder(drafter))
    assert drafter.depths[0] == 22  # 24, less the token of the prompt's pass and the target's own
    assert min(drafter.depths) >= 0


def test_scores_logits_and_cache_are_those_of_plain_generate(model, prompt):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.5}
    expected = plain(model, prompt, **options)
    got = plain(model, prompt, custom_generate=TreeDecoder(Guesses(expected.sequences[0].tolist())), **options)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_continues_from_a_given_cache(model, prompt):
    first = plain(model, prompt, return_dict_in_generate=True, custom_generate=TreeDecoder(Guesses()))
    longer = torch.cat([first.sequences, prompt], dim=1)
    expected = plain(model, longer)
    got = plain(model, longer, past_key_values=first.past_key_values, custom_generate=TreeDecoder(Guesses()))
    assert torch.equal(got, expected)


class Collector(TextStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_gets_prompt_and_tokens(model, prompt):
    streamer = Collector()
    out = TreeDecoder(Guesses()).generate(model, prompt, streamer, max_new_tokens=9, do_sample=False)
    assert streamer.ids == out[0].tolist()
    assert streamer.ended


def test_a_peft_model_decodes_with_its_adapter(model, prompt):
    import copy

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = adapted.generate(input_ids=prompt, max_new_tokens=24, do_sample=False)
    got = adapted.generate(
        input_ids=prompt, max_new_tokens=24, do_sample=False, custom_generate=TreeDecoder(Guesses(expected[0].tolist()))
    )
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain(model, prompt))


def test_requests_that_cannot_be_honoured_are_refused(model, prompt):
    decoder = TreeDecoder(Guesses())
    ask = functools.partial(model.generate, custom_generate=decoder, max_new_tokens=4)
    with pytest.raises(ValueError, match="got B=2"):
        ask(prompt.repeat(2, 1))
    with pytest.raises(ValueError, match="num_beams=3"):
        ask(prompt, num_beams=3)
    with pytest.raises(ValueError, match="without padding"):
        ask(prompt, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="use_cache"):
        ask(prompt, use_cache=False)
    with pytest.raises(ValueError, match="StaticLayer"):
        ask(prompt, cache_implementation="static")
    with pytest.raises(ValueError, match="output_hidden_states"):
        ask(prompt, output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="inputs_embeds"):
        ask(prompt, inputs_embeds=torch.zeros(1, 7, 16, dtype=torch.float64))
    with torch.no_grad():
        cache = model(prompt, past_key_values=DynamicCache(config=model.config)).past_key_values
    with pytest.raises(ValueError, match="at least one token longer"):
        ask(prompt, past_key_values=cache)


def test_prompt_tuning_is_refused(model, prompt):
    import copy

    tuned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning"):
        tuned.generate(input_ids=prompt, max_new_tokens=4, custom_generate=TreeDecoder(Guesses()))
