"""Which drafted tokens stand: from greedy equality to exact tree rejection sampling.

Every rule walks the tree from the root and emits tokens one by one. It reads `scores(node)`, the processed scores of the
token that follows `node` (float tensor (1, vocabulary), after temperature, top-p and every other logits processor), and
calls `emit(token)`, which appends a token to the text and says whether generation goes on. It returns the nodes that the
text went through, the root included; one token more than that many drafts has been emitted: the target's own.

    rule              drafts needed             law of the output
    greedy            any                       the greedy text, token for token
    shared_sample     point masses              the target's, exactly
    tree_rejection    drawn, with proposals     the target's, exactly
    typical           any                       none is kept: a quality heuristic
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from grainwise.decode.token_tree import TokenTree

Scores = Callable[[int], Tensor]
Emit = Callable[[int], bool]
Acceptance = Callable[[TokenTree, Scores, Emit], list[int]]


def follow(tree: TokenTree, scores: Scores, emit: Emit, choose: Callable[[Tensor], int]) -> list[int]:
    """Let `choose` name the next token at each node, as plain decoding would, and go on where a child holds it."""
    node: int | None = 0
    kept: list[int] = []
    while node is not None:
        kept.append(node)
        token = choose(scores(node))
        if not emit(token):
            break
        node = tree.child(node, token)
    return kept


def greedy(tree: TokenTree, scores: Scores, emit: Emit) -> list[int]:
    """Accept a node if its token is the argmax at its parent."""
    return follow(tree, scores, emit, lambda s: int(s.argmax(dim=-1)))


def shared_sample(tree: TokenTree, scores: Scores, emit: Emit, generator: torch.Generator | None = None) -> list[int]:
    """Draw one token at each node and accept the child that holds it.

    All children of a node face the same draw, so what is emitted follows the target's law whatever was drafted. (One draw
    for each path of the tree, as the reference code of ADED and Medusa has it, gives siblings several chances and distorts
    the law.) generator: torch's global one when None, as in `generate`; the text is then the very one that plain sampling
    yields under the same seed.
    """

    def choose(s: Tensor) -> int:
        return int(torch.multinomial(s.softmax(dim=-1), 1, generator=generator))

    return follow(tree, scores, emit, choose)


def tree_rejection(tree: TokenTree, scores: Scores, emit: Emit, generator: torch.Generator | None = None) -> list[int]:
    """Multi-round rejection sampling for children drawn without replacement from `tree.proposals`.

    With P the target's law at a node and R the draft's: child y is accepted with probability min(1, P[y] / R[y]);
    otherwise P becomes the normalised positive part of P - R, and R loses y. When no child is accepted the token comes
    from the remaining P. Exact if the tree's shape was decided before its tokens were drawn (DySpec, arXiv 2410.11744).
    Raises ValueError for a tree without proposals, or a child that its proposal cannot have drawn.
    """
    if tree.proposals is None:
        raise ValueError("tree rejection sampling needs the drafts' distributions: build the TokenTree with `proposals`")
    kept = [0]
    while True:
        target = scores(kept[-1])[0].double().softmax(dim=-1)
        child, rest = try_children(tree, kept[-1], target, generator)
        if child is None:
            emit(int(torch.multinomial(rest, 1, generator=generator)))
            return kept
        if not emit(int(tree.tokens[child])):
            return kept
        kept.append(child)


def try_children(
    tree: TokenTree, node: int, target: Tensor, generator: torch.Generator | None = None
) -> tuple[int | None, Tensor]:
    """One node of `tree_rejection`: (the accepted child or None, what is left of the target's law (vocabulary,))."""
    assert tree.proposals is not None
    draft = tree.proposals[node].to(target)
    for child in tree.children(node).tolist():
        token = int(tree.tokens[child])
        mass = draft[token]
        if mass <= 0:
            raise ValueError(f"child {child} holds token {token}, which its proposal gives no probability")
        if torch.rand((), generator=generator, dtype=torch.float64).to(mass) < target[token] / mass:
            return child, target
        target = (target - draft).clamp(min=0)
        target = target / target.sum()
        draft = draft.clone()
        draft[token] = 0
        draft = draft / draft.sum().clamp(min=torch.finfo(draft.dtype).tiny)
    return None, target


def typical(tree: TokenTree, scores: Scores, emit: Emit, *, epsilon: float = 0.09, delta: float = 0.3) -> list[int]:
    """Accept x after u if p(x | u) > min(epsilon, delta * exp(-entropy of p(. | u))); take the longest accepted path.

    Among paths of equal length the likeliest wins; the target's own token is the argmax. It does not keep the target's
    law (Medusa, arXiv 2401.10774). Raises ValueError unless epsilon and delta are positive.
    """
    if epsilon <= 0 or delta <= 0:
        raise ValueError(f"epsilon and delta must be positive, got {epsilon} and {delta}")
    stands = np.ones(len(tree), dtype=bool)
    value = np.zeros(len(tree))
    for node in np.unique(tree.parents[1:]).tolist():
        if not stands[node]:
            stands[tree.children(node)] = False
            continue
        logs = scores(node)[0].double().log_softmax(dim=-1)
        entropy = torch.special.entr(logs.exp()).sum()
        threshold = min(epsilon, delta * float(torch.exp(-entropy)))
        children = tree.children(node)
        chance = logs[torch.from_numpy(tree.tokens[children]).to(logs.device)].cpu().numpy()
        stands[children] = np.exp(chance) > threshold
        value[children] = value[node] + chance
    best = max(np.flatnonzero(stands).tolist(), key=lambda node: (tree.depths[node], value[node]))
    path = tree.path(best)
    for i, node in enumerate(path[1:], start=1):
        if not emit(int(tree.tokens[node])):
            return path[:i]
    emit(int(scores(best).argmax(dim=-1)))
    return path
