"""Block influence: a block that hardly turns the stream is worth little."""

from __future__ import annotations

from dataclasses import dataclass, field

from depgraph import DependencyGraph
from importance.calling import check_batches
from importance.choices import pick
from importance.depth.candidates import OF, names_of
from importance.depth.engine import Batches
from importance.depth.order import Counted
from importance.depth.streams import cosine, streams


@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT's block influence (METHODS.md 2.6): 1 - the mean cosine of a part's input and output, over all tokens.

    In [0, 2], 0 for a part that changes nothing; blind to a change of scale. Tokens that an `attention_mask` [samples,
    tokens] leaves out don't count. In convolutional models the vectors are the channels at each position.

    Args:
        batches: tensors, tuples or dicts.
        of: "blocks" or "branches" (the stream before and after the branch is added).

    Raises ScoreError: an unknown `of`; when called, no such parts. DataError: unfit batches.
    """

    batches: Batches = field(repr=False)
    of: str = "blocks"

    def __post_init__(self) -> None:
        check_batches(self.batches)
        pick(OF, self.of, "kind of part")

    def __call__(self, graph: DependencyGraph, /) -> dict[str, float]:
        names = names_of(graph, self.of)
        sums, counts, found = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0), Counted()
        for batch in streams(graph, self.batches, names):
            for name, stream in batch.items():
                turned = 1 - cosine(stream.entering, stream.leaving)
                turned = turned if stream.mask is None else turned[stream.mask != 0]
                sums[name] += float(turned.sum())
                counts[name] += turned.numel()
            found.evaluations += len(names)
        found.update({name: sums[name] / max(counts[name], 1) for name in names})
        return found
