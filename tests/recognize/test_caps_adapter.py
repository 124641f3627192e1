from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch.nn.functional import normalize, one_hot

from grainwise.recognize.caps_adapter import CapSAdapter, Range, TipAdapter, TipX
from grainwise.recognize.feature_bank import FeatureBank
from grainwise.recognize.support_set import DiffusersGenerator, SupportItem, TransformersCaptioner, build_support
from grainwise.recognize.text_classifier import TextClassifier

D, K, N = 16, 4, 24


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float(), dim=-1)


@pytest.fixture
def text():
    return TextClassifier(unit(K, D, seed=0).T.contiguous(), tuple("abcd"))


@pytest.fixture
def bank(text):
    labels = torch.arange(N) % K
    near = normalize(unit(N, D, seed=1) + 0.8 * text.weights.T[labels], dim=1)
    captions = normalize(unit(N, D, seed=2) + 0.8 * text.weights.T[labels], dim=1)
    return FeatureBank(near[:, None], labels, captions)


def rows(text, count=30, seed=5):
    y = torch.arange(count) % K
    return normalize(unit(count, D, seed=seed) + 0.5 * text.weights.T[y], dim=1), y


def test_without_terms_it_is_zero_shot(text, bank):
    x, _ = rows(text)
    assert torch.equal(CapSAdapter(text, bank, alpha=0, gamma=0)(x), text.logits(x))


@pytest.mark.parametrize("delta", [0.0, 1.0, 0.3])
def test_the_cache_term_is_tip_adapters_formula(text, bank, delta):
    x, _ = rows(text)
    keys = (1 - delta) * bank.keys + delta * bank.texts
    expected = 100 * x @ text.weights + 2 * torch.exp(-4 * (1 - x @ keys.T)) @ one_hot(bank.labels, K).float()
    torch.testing.assert_close(CapSAdapter(text, bank, alpha=2, beta=4, gamma=0, delta=delta)(x), expected)
    if delta == 0:
        torch.testing.assert_close(TipAdapter(text, bank, alpha=2, beta=4)(x), expected)


def test_sharp_and_flat_caches(text, bank):
    x = bank.keys[:3]
    sharp = TipAdapter(text, bank, alpha=1, beta=1e4)
    torch.testing.assert_close(sharp(x) - text.logits(x), one_hot(bank.labels[:3], K).float(), atol=2e-2, rtol=0)
    flat = TipAdapter(text, bank, alpha=1, beta=0)
    torch.testing.assert_close(flat(x) - text.logits(x), torch.full((3, K), N / K), atol=1e-4, rtol=0)


def test_profiles_are_compared_by_their_divergence(text, bank):
    model = TipX(text, bank, alpha=0, gamma=1.5)
    x, _ = rows(text, 7)
    own = ((x @ text.weights) / 0.5).softmax(1).double().numpy()
    theirs = ((bank.keys @ text.weights) / 0.5).softmax(1).double().numpy()
    divergence = np.array([[entropy(s, t) for t in theirs] for s in own])
    np.testing.assert_allclose(model._divergences(x).numpy(), divergence, atol=1e-5)
    assert float(model._divergences(bank.keys).diagonal().abs().max()) < 1e-5
    known = Range(0.1, 0.9, 0.2, 0.7)
    model.range = known
    scaled = 0.2 + (divergence - 0.1) * (0.7 - 0.2) / (0.9 - 0.1)
    expected = text.logits(x).numpy() - 1.5 * scaled @ one_hot(bank.labels, K).numpy()
    np.testing.assert_allclose(model(x).numpy(), expected, atol=1e-3)


def test_a_row_is_the_same_alone_and_in_any_batch(text, bank, monkeypatch):
    x, y = rows(text, 23)
    model = CapSAdapter(text, bank).search(x[:12], y[:12], grids={"beta": (1.0, 5.0), "alpha": (1.0, 2.0), "gamma": (0.5,)})
    whole = model(x)
    torch.testing.assert_close(torch.cat([model(r[None]) for r in x]), whole, atol=1e-4, rtol=1e-6)
    monkeypatch.setattr("grainwise.recognize.caps_adapter.CHUNK", 5 * N)
    torch.testing.assert_close(model(x), whole, atol=1e-4, rtol=1e-6)


def test_the_order_of_the_support_means_nothing_and_doubling_doubles_the_terms(text, bank):
    x, _ = rows(text)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = FeatureBank(bank.views[order], bank.labels[order], bank.texts[order])
    double = FeatureBank(bank.views.repeat(2, 1, 1), bank.labels.repeat(2), bank.texts.repeat(2, 1))
    settings = {"alpha": 1.3, "beta": 3.0, "gamma": 0.7, "delta": 0.4}
    plain, other, twice = (CapSAdapter(text, b, **settings) for b in (bank, shuffled, double))
    other.range = twice.range = plain.range
    torch.testing.assert_close(other(x), plain(x), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(twice(x) - text.logits(x), 2 * (plain(x) - text.logits(x)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_equals_four_nested_loops(text, bank, seed):
    x, y = rows(text, 40, seed=20 + seed)
    grids = {"delta": (0.0, 0.5, 1.0), "beta": (1.0, 4.0, 9.0), "alpha": (0.5, 3.0, 20.0), "gamma": (0.0, 1.0, 6.0)}
    model = CapSAdapter(text, bank).search(x, y, grids=grids, exhaustive=True)
    best, where = -1, None
    for delta, beta, alpha, gamma in itertools.product(*grids.values()):
        one = CapSAdapter(text, bank, alpha=alpha, beta=beta, gamma=gamma, delta=delta)
        one.range = one._measured(x, delta)
        right = int((one(x).argmax(1) == y).sum())
        if right > best:
            best, where = right, (delta, beta, alpha, gamma)
    assert (model.delta, model.beta, model.alpha, model.gamma) == where
    assert int((model.predict(x) == y).sum()) == best


def test_the_coarse_search_loses_next_to_nothing(text, bank):
    x, y = rows(text, 60)
    grids = {"delta": (0.0, 0.5, 1.0), "alpha": (0.5, 2.0, 8.0), "gamma": (0.1, 1.0)}
    fine = CapSAdapter(text, bank).search(x, y, grids=grids, exhaustive=True)
    quick = CapSAdapter(text, bank).search(x, y, grids=grids)
    assert (quick.predict(x) == y).float().mean() >= (fine.predict(x) == y).float().mean() - 0.02


def test_rotations_leave_logits_in_class_mode_only(text, bank):
    x, _ = rows(text)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0].float()
    turned_text = TextClassifier((text.weights.T @ turn).T.contiguous())
    turned = FeatureBank(bank.views @ turn, bank.labels, bank.texts @ turn)
    for signature, same in (("class", True), ("feature", False)):
        before = CapSAdapter(text, bank, gamma=2.0, signature=signature)(x)
        after = CapSAdapter(turned_text, turned, gamma=2.0, signature=signature)(x @ turn)
        assert bool(torch.allclose(before, after, atol=1e-3)) is same


def test_explanations_add_up(text, bank):
    x, _ = rows(text, 3)
    model = CapSAdapter(text, bank, alpha=1.5, gamma=0.4)
    for found, logits in zip(model.explain(x, top=2), model(x)):
        assert found["class"] == int(logits.argmax())
        assert sum(found["terms"].values()) == pytest.approx(found["logit"], rel=1e-4)
        assert found["logit"] == pytest.approx(float(logits.max()), rel=1e-4)
        assert len(found["nearest"]) == 2
        assert all(k == found["class"] for _, k, _ in found["nearest"])
        assert found["nearest"][0][2] >= found["nearest"][1][2] > 0


def test_saving_and_reloading(text, bank, tmp_path):
    x, y = rows(text)
    model = CapSAdapter(text, bank).search(x, y, grids={"beta": (1.0, 5.0), "alpha": (1.0, 2.0), "gamma": (0.5, 2.0)})
    model.save(tmp_path / "caps.safetensors")
    again = CapSAdapter.load(tmp_path / "caps.safetensors")
    torch.testing.assert_close(again(x), model(x))
    assert (again.alpha, again.beta, again.gamma, again.delta) == (model.alpha, model.beta, model.gamma, model.delta)
    with pytest.raises(ValueError, match="expected a saved TipX"):
        TipX.load(tmp_path / "caps.safetensors")


def test_a_bank_tells_whether_it_is_any_good(text, bank):
    noise = FeatureBank(unit(N, D, seed=9)[:, None], bank.labels)
    assert bank.self_accuracy() > noise.self_accuracy()
    labels = torch.arange(8) % 4
    assert FeatureBank(torch.eye(4)[labels][:, None], labels).self_accuracy() == 1.0


def test_bad_input_is_named(text, bank):
    x, y = rows(text)
    with pytest.raises(ValueError, match=r"no item of classes \['d'\]"):
        CapSAdapter(text, FeatureBank(bank.views[bank.labels < 3], bank.labels[bank.labels < 3], bank.texts[bank.labels < 3]))
    with pytest.raises(ValueError, match="no item of classes"):
        TipAdapter(text, FeatureBank(bank.views, torch.zeros(N, dtype=torch.long)))
    with pytest.raises(ValueError, match="dimension 8, the text weights 16"):
        TipAdapter(text, FeatureBank(unit(N, 8, seed=0)[:, None], bank.labels))
    with pytest.raises(ValueError, match="from 0 to 3, but there are 2"):
        TipAdapter(TextClassifier(text.weights[:, :2]), bank)
    with pytest.raises(ValueError, match="no caption features"):
        CapSAdapter(text, FeatureBank(bank.views, bank.labels))
    with pytest.raises(ValueError, match="needs labels"):
        TipAdapter(text, FeatureBank(bank.views))
    with pytest.raises(ValueError, match="unit length.*normalise"):
        CapSAdapter(text, bank)(2 * x)
    with pytest.warns(UserWarning, match="no validation rows"):
        assert CapSAdapter(text, bank, alpha=3.0).search(x[:0], y[:0]).alpha == 3.0
    with pytest.raises(ValueError, match=r"classes in 0\.\.3"):
        CapSAdapter(text, bank).search(x, y + 1)
    with pytest.raises(ValueError, match="grids may name beta, alpha"):
        TipAdapter(text, bank).search(x, y, grids={"gamma": (1.0,)})
    with pytest.raises(ValueError, match="TipX fixes delta"):
        TipX(text, bank, delta=0.5)
    with pytest.raises(ValueError, match="Did you mean 'class'"):
        CapSAdapter(text, bank, signature="clas")
    with pytest.raises(ValueError, match="delta must lie"):
        CapSAdapter(text, bank, delta=1.5)
    same = FeatureBank(text.weights.T[:1].expand(N, D)[:, None], bank.labels)
    with pytest.warns(UserWarning, match="profile term is dropped"):
        model = TipX(text, same, gamma=5.0)
    assert torch.isfinite(model(x)).all()


class Painter:
    """A generator for tests: the colour of an image says which prompt and seed made it."""

    def __init__(self, black_first=0):
        self.calls, self.black_first = [], black_first

    def __call__(self, prompts, seeds):
        self.calls.append(list(zip(prompts, seeds)))
        value = torch.tensor([(len(p) * 7 + s) % 200 for p, s in zip(prompts, seeds)]) / 255 + 0.1
        images = value[:, None, None, None].expand(-1, 3, 8, 8).clone()
        if len(self.calls) <= self.black_first:
            images[0] = 0
        return images


def captioner(images):
    return [f"seen number {i} with many words" for i in range(len(images))]


@pytest.fixture
def few():
    return {"robin": torch.rand(2, 3, 8, 8), "wren": torch.rand(3, 3, 8, 8)}


def test_a_support_set_names_its_classes_and_takes_captions_in_turn(few):
    support = build_support(few, captioner, Painter(), per_class=4, words=3)
    assert support.images.shape == (8, 3, 8, 8)
    assert support.labels.tolist() == [0] * 4 + [1] * 4
    assert all(f"A photo of {i.class_name}. {i.caption}" == c for i, c in zip(support.items, support.captions))
    assert sorted(i.source for i in support.items[:4]) == [0, 0, 1, 1]
    assert {i.caption for i in support.items} == {"seen number 0", "seen number 1", "seen number 2"}
    table = support.to_dataset()
    assert table.column_names == ["image", "label", "class", "caption", "prompt"]
    assert table[5]["class"] == "wren"


def test_what_is_there_is_not_made_again(few, tmp_path):
    first = build_support(few, captioner, Painter(), per_class=3, folder=tmp_path)
    painter = Painter()
    again = build_support(few, captioner, painter, per_class=3, folder=tmp_path)
    assert (first.made, again.made, painter.calls) == (6, 0, [])
    assert torch.equal(first.images, again.images)
    (tmp_path / first.items[2].file).unlink()
    assert build_support(few, captioner, Painter(), per_class=3, folder=tmp_path).made == 1
    assert build_support(few, captioner, Painter(), per_class=3, folder=tmp_path, prompt="In {c}. {caption}").made == 6
    (tmp_path / "support.json").write_text("{")
    with pytest.raises(ValueError, match="no records of a support set"):
        build_support(few, captioner, Painter(), per_class=3, folder=tmp_path)


def test_black_images_are_drawn_again(few):
    painter = Painter(black_first=2)
    support = build_support(few, captioner, painter, per_class=2)
    assert float(support.images.flatten(1).amax(1).min()) > 0.05
    assert [len(c) for c in painter.calls] == [4, 1, 1]
    assert painter.calls[1][0][1] == painter.calls[0][0][1] + 1
    with pytest.raises(ValueError, match="only black images in 5 tries"):
        build_support(few, captioner, Painter(black_first=99), per_class=2)


def test_items_can_be_filtered(few):
    support = build_support(few, captioner, Painter(), per_class=4, keep=lambda images, labels: torch.arange(8) % 2 == 0)
    assert len(support.items) == len(support.captions) == len(support.images) == 4
    assert isinstance(support.items[0], SupportItem)


def test_bad_support_is_named(few):
    with pytest.raises(ValueError, match="'wren' has no image"):
        build_support(few | {"wren": torch.zeros(0, 3, 8, 8)}, captioner, Painter())
    with pytest.raises(ValueError, match="must hold {c} and {caption}"):
        build_support(few, captioner, Painter(), prompt="A photo of {c}.")
    with pytest.raises(ValueError, match="1 captions for 2 images of 'robin'"):
        build_support(few, lambda images: ["one"], Painter())
    with pytest.raises(ValueError, match="at least one class"):
        build_support({}, captioner, Painter())


def test_wrappers_call_their_libraries_as_these_expect(few):
    def pipeline(prompts, generator, output_type, guidance_scale, num_inference_steps):
        assert (output_type, guidance_scale, num_inference_steps) == ("pt", 9.5, 10)
        return SimpleNamespace(images=torch.stack([torch.rand(3, 4, 4, generator=g) * 2 for g in generator]))

    made = DiffusersGenerator(pipeline, num_inference_steps=10)(["a", "b"], [1, 1])
    assert torch.equal(made[0], made[1])
    assert float(made.max()) <= 1

    class Model(torch.nn.Module):
        device = "cpu"

        def generate(self, pixel_values, num_beams, **_):
            assert num_beams == 3
            return pixel_values.flatten(1)[:, :2].long()

    class Inputs(dict):
        def to(self, device):
            return self

    class Processor:
        def __call__(self, images, return_tensors):
            return Inputs(pixel_values=torch.stack([torch.tensor(np.asarray(i)) for i in images]))

        def batch_decode(self, ids, skip_special_tokens):
            return [f" {i} " for i in range(len(ids))]

    assert TransformersCaptioner(Model(), Processor())(few["wren"]) == ["0", "1", "2"]


def test_the_microworld_renders_what_a_prompt_says():
    from grainwise.recognize.microworld_support import MicroworldGenerator, scene_of
    from grainwise.world import World

    world = World(seed=3, genera=2, species_per_genus=1)
    generator = MicroworldGenerator(world, {"robin": 0, "robin king": 1}, size=16)
    assert scene_of("A photo of robin. red head, ink on sand.") == ("ink", "sand")
    assert scene_of("A photo of robin.") == ("plain", "")
    plain, ink, king, again = generator(["a robin", "a robin, ink on snow", "a robin king", "a robin"], [5, 5, 5, 5])
    assert torch.equal(plain, again)
    assert not torch.equal(plain, ink)
    expected = world.draw(np.array([1]), np.array([5]), size=16).images[0]
    assert torch.equal((255 * king).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(expected))
    with pytest.raises(ValueError, match="names none of the 2 species"):
        generator(["a wren"], [0])
