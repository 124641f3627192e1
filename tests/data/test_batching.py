import torch

from grainwise.data.batching import shuffled_rows


def test_every_epoch_shows_every_row_once():
    rows = torch.cat(list(shuffled_rows(12, 4, 6, torch.Generator().manual_seed(0))))
    assert sorted(rows[:12].tolist()) == sorted(rows[12:].tolist()) == list(range(12))
    small = list(shuffled_rows(3, 8, 2, torch.Generator().manual_seed(0)))
    assert [len(b) for b in small] == [8, 8]
