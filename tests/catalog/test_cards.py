"""The catalogue: complete, consistent, and its state computed."""

import ast

import pytest

from grainwise import catalog
from grainwise.catalog import reading as module

HOUSE = {
    "adapt": "llm_adapters s2ft corda kasa loldu spiel mhr mosa pvp gradnormlorp sparse_mezo cofitune lemo meap canonical_examples",
    "merge": "model_soups compeft",
    "compress": "qlora dgq slicegpt cfsp finercut ecoflap stable_rps welore knowledge_concentration",
    "kernels": "smash",
    "select": "kmq gotd simcore",
    "annotate": "ultragen compcap gist verified",
    "pretrain": "mugs cmd seit ernie_gram geb grain villa",
    "decode": "medusa dyspec aded asap",
    "context": "hyperattention ape scbench",
    "serve": "s_lora",
    "parallel": "flexsp se_moe",
    "recognize": "metaformer glsim afgr glmix clca dcal sefar finecliper mixoe ccan ctl psa gda caps_adapter",
    "segment": "segic segprompt frozenseg segface ar_seg sccan u2seg ovseg mobilesamv2 asam trident foodseg filo",
    "detect": "d_fine fsaf smile segvg fgvp",
    "retrieve": "uncertain_cir rcar ufinebench ucofia glscl",
    "converse": "mglmm read ufo pix2cap llava_st vistallm comm texthawk sugar self_retrieval",
    "explain": "smdl",
    "evaluate": "evalmuse",
}


def test_the_hundred_are_there_in_their_rooms():
    found = {room: {c.slug for c in catalog.search(room=room)} for room in HOUSE}
    assert found == {room: set(slugs.split()) for room, slugs in HOUSE.items()}
    assert len(catalog.cards()) == 100


@pytest.mark.parametrize("card", catalog.cards().values(), ids=lambda c: c.slug)
def test_each_card_is_complete(card):
    for name in ("name", "title", "venue", "summary", "claim"):
        assert getattr(card, name).strip(), name
    assert len(card.summary) <= 200
    assert 2015 <= card.year <= 2027
    assert card.arxiv == "" or card.arxiv.split(".")[0].isdigit()
    assert card.needs
    assert set(card.extras) <= {"serve", "grammar", "vision", "index", "explain", "bench"}
    assert set(card.composes_with) <= set(catalog.cards()) - {card.slug}
    lines = [line for line in card.usage.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 12
    ast.parse(card.usage)


def test_state_follows_the_module(monkeypatch, tmp_path):
    card = catalog.card("medusa")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert card.state == "planned"
    (tmp_path / "decode" / "medusa").mkdir(parents=True)
    assert card.state == "planned"
    (tmp_path / "decode" / "medusa" / "__init__.py").touch()
    assert card.state == "built"
    assert card.proof is None


def test_search():
    assert [c.slug for c in catalog.search(room="decode", words="tri-gram")] == ["aded"]
    assert catalog.search(words="no such words at all") == []
    with pytest.raises(ValueError, match="Did you mean 'adapt'"):
        catalog.search(room="adpat")
    with pytest.raises(ValueError, match="planned or built"):
        catalog.search(state="done")


def test_a_wrong_slug_names_the_nearest():
    with pytest.raises(ValueError, match="'slicegpt'"):
        catalog.card("slicgpt")


def test_a_broken_card_is_named():
    with pytest.raises(ValueError, match=r"\[x\] in adapt.toml lacks or does not know: .*claim"):
        module._card("x", "adapt", {"name": "X"})
    with pytest.raises(ValueError, match="kind must be one of"):
        module._step("x", {"kind": "adpt"})
    with pytest.raises(ValueError, match="type must be one of"):
        module._step("x", {"kind": "adapt", "options": {"r": {"type": "integer"}}})
