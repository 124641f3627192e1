"""Documents: charts, tables, posters, collages and code panes, each with its text, numbers, layout, questions and captions.

`page` is the sheet of paper that remembers where everything is; `charts`, `tables`, `pictures` and `code_panes` draw one
kind each and answer questions about it; `generator` draws any of them by seed and index.
"""

from grainwise.world.documents.generator import KINDS, Documents, document_sheet
from grainwise.world.documents.page import Document, Element, Question

__all__ = ["KINDS", "Document", "Documents", "Element", "Question", "document_sheet"]
