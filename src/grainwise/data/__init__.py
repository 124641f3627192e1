"""Real text for training, selecting and measuring.

`load(source, split)` gives a `datasets.Dataset` from `pydoc` (the reference text inside every Python
installation), a local file or folder, the shared data folder (`shared/...`), or a hub id.
`blocks` turns its rows into equal token blocks; `CompletionCollator` batches prompt/response rows.
Everything is split by document with a stable hash, so that held-out text stays held out on every machine.
"""

from grainwise.data.blocks import CompletionCollator, blocks, row_text
from grainwise.data.sources import load, shared_folder

__all__ = ["CompletionCollator", "blocks", "load", "row_text", "shared_folder"]
