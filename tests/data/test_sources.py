"""Text sources: splits that stay apart, every local form, clear errors."""

import gzip
import json

import pytest

from grainwise.data import load, row_text, shared_folder, sources
from grainwise.data.docstrings import module_text, paragraphs, pydoc_split, without_overlap


@pytest.fixture(scope="module")
def pydoc():
    return {split: load("pydoc", split) for split in ("train", "validation", "test")}


def test_pydoc_is_there_and_its_splits_share_no_paragraph(pydoc):
    sizes = {k: sum(len(t) for t in v["text"]) for k, v in pydoc.items()}
    assert sizes["train"] > 1_000_000
    assert min(sizes["validation"], sizes["test"]) > 30_000
    held_out = {p for split in ("validation", "test") for t in pydoc[split]["text"] for p in paragraphs(t)}
    assert not held_out.intersection(p for t in pydoc["train"]["text"] for p in paragraphs(t))


def test_pydoc_is_the_same_every_time(pydoc):
    assert [d.text for d in pydoc_split("validation")] == pydoc["validation"]["text"]


def test_overlap_is_removed():
    document = sources_document("a", "one\n\ntwo\n\nthree")
    assert without_overlap([document], [sources_document("b", "zero\n\ntwo")])[0].text == "one\n\nthree"


def sources_document(name, text):
    from grainwise.data.docstrings import Document

    return Document(name, text)


def test_module_text_names_what_it_documents(tmp_path):
    file = tmp_path / "shop.py"
    long = "Return the price of everything in the basket, in cents."
    file.write_text(
        f'"""{long} Module."""\nclass A:\n    """{long} Class."""\n    def price(self, tax):\n        """{long}"""\n'
    )
    text = module_text(file)
    assert [p.splitlines()[0] for p in text.split("\n\n")] == ["module shop", "class A", "def price(self, tax)"]
    file.write_text("def broken(:\n")
    assert module_text(file) == ""


ROWS = [{"instruction": f"add {i}", "input": "", "output": str(i + 1), "answer": i} for i in range(64)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.parquet"])
def test_tables(tmp_path, name):
    file = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        text = "\n".join(map(json.dumps, ROWS)) if "jsonl" in name else json.dumps(ROWS)
        file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    parts = [load(file, s) for s in ("train", "validation", "test")]
    assert sorted(r for p in parts for r in p["prompt"]) == sorted(r["instruction"] for r in ROWS)
    assert row_text(parts[0][0]) == f"{parts[0][0]['prompt']}\n{parts[0][0]['response']}"
    assert load(file, "train").to_list() == parts[0].to_list()


def test_text_files_and_folders(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(f"Paragraph {i} {j} " + "word " * 400 for j in range(20)))
    (tmp_path / "picture.png").write_bytes(b"x")
    parts = {s: load(tmp_path, s) for s in ("train", "test")}
    assert len(parts["train"]) > 3 * len(parts["test"]) > 0
    assert not set(parts["train"]["text"]) & set(parts["test"]["text"])


def test_clear_errors(tmp_path, monkeypatch):
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n' * 20)
    (tmp_path / "bad.json").write_text('[{"text": "a"},')
    (tmp_path / "bad.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "short.txt").write_text("little")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="unknown split 'tset'. Did you mean 'test'"):
        load("pydoc", "tset")
    with pytest.raises(ValueError, match=r"row 0 of .* has fields \['a'\]"):
        load(tmp_path / "numbers.jsonl")
    for name in ("bad.json", "bad.txt.gz", "bad.parquet"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="at least 16 are needed"):
        load(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="no such file or folder: .*shrt.txt. Did you mean 'short.txt'"):
        load(tmp_path / "shrt.txt")
    with pytest.raises(ValueError, match="holds no readable file"):
        load(tmp_path / "empty")
    monkeypatch.setenv("GRAINWISE_DATA", str(tmp_path / "nowhere"))
    assert shared_folder() is None
    with pytest.raises(ValueError, match="set GRAINWISE_DATA"):
        load("shared/text/x.txt")


def test_shared_folder_is_read_by_name(tmp_path, monkeypatch):
    (tmp_path / "set.json").write_text(json.dumps(ROWS))
    monkeypatch.setenv("GRAINWISE_DATA", str(tmp_path))
    assert len(load("shared/set.json", "train")) > 40
    sources.check("shared/set.json")
