"""Published methods as recipes of a few lines, with their papers' defaults; each is a function that returns a `Recipe`.

`recipes.flap(batches).prune(graph, depgraph.Target(params=0.8))` prunes. Sections are METHODS.md's. What the papers write by hand
for one family (heads through the output projection, neurons through the last linear map of an MLP) holds here for the units of any
architecture. Sizes of the calibration set are the caller's: `Entry.data` says what the paper used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from depgraph import DependencyGraph
from depgraph.errors import ScoreError
from importance.activation import Activation
from importance.allocations import AdaptPruner, Cfsp, Owl, blocks, first_and_last
from importance.blockwise import BlockChange, OutlierRatios
from importance.bonsai import Bonsai
from importance.choices import pick
from importance.compensation import Compensation
from importance.expert_recipes import minitron_experts, stun
from importance.fisher_brain import FisherBrain
from importance.losses import GIVE, Loss
from importance.magnitude import Magnitude
from importance.normalisation import Normalisation
from importance.obs import OptimalBrain
from importance.randomly import Random
from importance.recipe import Recipe
from importance.reduction import Reduction
from importance.reestimation import Reestimation
from importance.relative import RelativeLoss
from importance.ridge import DAMPINGS
from importance.rivals import Rivals
from importance.row_update import RowUpdate
from importance.schedule import Pace, Schedule
from importance.sliced import slicegpt, slicegpt_shortcuts
from importance.surgeon import Surgeon
from importance.taylor import Taylor

Batches = Iterable[Any]


def random(seed: int = 0) -> Recipe:
    """The same share of every axis, at random: what every method must beat."""
    return Recipe("random", Random(seed))


def magnitude(p: float = 2.0) -> Recipe:
    """Group magnitude (2.4): sums of |w|^p, averaged over the tensors of a group; the same share of every axis."""
    return Recipe("magnitude", Magnitude(p))


def llm_pruner(batches: Batches, loss: Loss | None = None, form: str = "element") -> Recipe:
    """LLM-Pruner (2.1): first-order Taylor over coupled groups, the same share of every axis; its data are 10 x 64 tokens.

    The paper leaves the first four and the last two of 32 blocks whole; here it is the same share of however many there are.
    `prune(..., protect=())` leaves none whole.
    """
    return Recipe("llm_pruner", Taylor(batches, loss, form=form), protect=Ends(4, 2, of=32))


def wanda_sp(batches: Batches, propagation: str = "dense") -> Recipe:
    """Wanda-sp (2.3): mean_i |W_ij| ||X_j||, a head's sum; the same share of every axis; 128 sequences.

    propagation: the published code is "sequential" (a block at a time; here a consumer at a time); "dense" is no worse in half
    of the time (benchmarks/quality.md).
    """
    return Recipe("wanda_sp", Activation(batches, "wanda-sp"), batches, propagation=propagation)


def flap(batches: Batches, structure: str = "AL-AM") -> Recipe:
    """FLAP (2.2): fluctuation of inputs times column norms, and biases for the means of what went; 1024 sequences of 128.

    structure: "AL-AM" (z-scores of all layers in one ranking, by exact cost), or "UL-UM" (the same share of every axis). The
    official code squares the scores of heads; the paper doesn't, nor does this.
    """
    table = {"AL-AM": ("flap", "global"), "UL-UM": ("wifv", "axis")}
    criterion, scope = pick(table, structure, "structure of FLAP")
    reduction = Reduction("mean" if structure == "AL-AM" else "sum")
    score = Activation(batches, criterion, reduction)
    return Recipe("flap", score, batches, scope=scope, compensation=Compensation("bias"))


def minitron(batches: Batches) -> Recipe:
    """Compact language models (2.9): activations by mean over tokens and L2 over samples; the same share of every axis."""
    return Recipe("minitron", Activation(batches, "minitron"), batches)


def cfsp(batches: Batches) -> Recipe:
    """CFSP (2.12): neurons only, by the norm of what they put out; blocks that turn their stream more keep more; 128 x 1024.

    Its column-normalised weights cancel, so the norm is what is left of its fine score. Where the sigmoid gives a block more
    than all, all blocks are drawn to their mean until it keeps just all. Models without repeated blocks are refused.
    """
    allocation = Cfsp(BlockChange(batches, "angular"))
    return Recipe("cfsp", Activation(batches, "activation"), batches, units="neurons", allocation=allocation)


def owl(batches: Batches, spread: float = 0.08, times: float = 5.0) -> Recipe:
    """OWL (2.17): Wanda-sp, with more kept of blocks that have more outliers among their Wanda scores; 128 sequences.

    Published for single weights; here its shares are those of groups, as in its structured experiments. Models without
    repeated blocks are refused.
    """
    allocation = Owl(OutlierRatios(batches, times), spread)
    return Recipe("owl", Activation(batches, "wanda-sp"), batches, allocation=allocation)


def adapt_pruner(batches: Batches, loss: Loss | None = None, amplitude: float = 0.02, pace: float = 0.05) -> Recipe:
    """Adapt-Pruner (2.16): first-order Taylor in steps; blocks that change their stream more lose less; 512 x 64 tokens.

    Deviations: steps lose `pace` of the cost asked for, not of widths (the plan finds what of a step meets it); nothing is
    trained between them (`schedule=Schedule(..., after_step=)` does). amplitude: 0.02 as in the published scripts, the code's
    default is 0.03. Models without repeated blocks are refused.
    """
    allocation = AdaptPruner(BlockChange(batches), pace, amplitude)
    return Recipe("adapt_pruner", Taylor(batches, loss), allocation=allocation, schedule=Pace(pace))


def bonsai(batches: Batches, loss: Loss | None = None, masks: int = 200, pace: float = 0.05, seed: int = 0) -> Recipe:
    """Bonsai (2.15): forward passes of sub-models, in rounds; no gradients; 32 sequences; `importance.Bonsai` has the details.

    Deviations: a round loses `pace` of the cost of the whole dense model, where the paper counts parameters of heads and neurons
    alone; no distillation follows.
    """
    return Recipe("bonsai", Bonsai(batches, loss, masks, pace, seed=seed), scope="global", schedule=Pace(pace))


def llm_surgeon(
    batches: Batches, loss: Loss | None = None, shots: int = 40, update: str = "columns", sides: str = "both"
) -> Recipe:
    """LLM Surgeon (2.14): Kronecker-factored costs, one threshold for all, in shots of equal size; 128 x 2048 tokens.

    After each shot the consumers' weights make up for the columns that went, which is the paper's correlated update of columns
    (it doesn't depend on the gradients' factor). `update="both"` adds that of rows: what puts out beside what went takes over too
    (`importance.RowUpdate`). In the paper rows and columns are different things to remove. Here a row goes with the columns that read
    it, and both make up for the same loss, so that together they overshoot: each alone helps, both are behind the columns
    (benchmarks/quality.md). Deviations: costs are summed over all that goes with a group, so that shapes shrink, and what a group
    has in one weight costs what it does together (`sides="columns"` counts the columns alone, which is far better where heads
    compete with neurons); biases that are there take over means; no LoRA.

    Raises ScoreError for an unknown update or unknown sides.
    """
    rows = pick({"both": RowUpdate(), "columns": None}, update, "update")
    return Recipe(
        "llm_surgeon",
        Surgeon(batches, loss, note=rows.note if rows else None, sides=sides),
        batches,
        scope="global",
        compensation=Compensation(biases="existing", rows=rows),
        schedule=Schedule(shots, "linear"),
    )


def amp(batches: Batches) -> Recipe:
    """AMP (2.28): what a head adds to the outputs (L1), the mean size of a neuron; the same share of every axis; 50 prompts."""
    return Recipe("amp", Activation(batches, "amp"), batches)


def ria(batches: Batches, propagation: str = "dense") -> Recipe:
    """RIA (2.18) for structures: |W_ij| as a share of its row and column, times the root of ||X_j||; 128 sequences.

    propagation: as `wanda_sp`'s.
    """
    return Recipe("ria", Activation(batches, "ria"), batches, propagation=propagation)


def obs(
    batches: Batches, rounds: int = 32, scope: str = "axis", norms: Batches | None = None, propagation: str = "dense"
) -> Recipe:
    """Structured OBS (2.13, as OBSPA): greedy by the loss after the optimal update, which is then made by least squares.

    Data-free with `importance.noise(graph)` for batches. Statistics of batch norms are re-estimated afterwards, with `norms` or
    else with the same batches; `dataclasses.replace(recipe, afterwards=())` leaves them. propagation: as `wanda_sp`'s; in
    sequence each consumer is solved for the inputs that it has by then, as SparseGPT does.
    """
    return Recipe(
        "obs",
        OptimalBrain(batches, rounds=rounds),
        batches,
        scope=scope,
        compensation=Compensation(biases="existing"),
        afterwards=(Reestimation(batches if norms is None else norms),),
        propagation=propagation,
    )


def best(batches: Batches, loss: Loss | None = None, weight: str = "taylor") -> Recipe:
    """Ours: greedy OBS losses, the budget spread in three ways, of which the one whose outputs stay nearest to the dense model's is
    taken; then every consumer fitted anew, one after the other, on what the pruned model gives it, each with the damping
    that fits best the quarter of the data that it isn't fitted to.

    One way is a single ranking of all axes by losses in units of the loss itself (`importance.FisherBrain`), one a single ranking
    of losses as shares of the outputs they change, an axis counted by its Taylor score per parameter; one is the same share of
    every axis. Why so, on small trained models, each part changed with the others fixed: OBS scores beat the others before any
    compensation; solving for the pruned model's own inputs beats solving for the dense ones; created biases add nothing then. The
    first way is far ahead on Llamas (perplexity 24.6 at 60% of one, where the others have 27.4 and more); the second by a little
    on a CNN; the third where few samples leave the curvature of a loss unknown (an encoder of sentences, cosine 0.867 at 80%
    beside 0.798). With few tokens for wide consumers a fit with little damping learns the batches by heart, and a loss on these
    doesn't tell; hence the damping, and the choice by outputs. benchmarks/quality.md has it beside the others. `weight="share"`
    does without a loss, with the second way alone, in which an axis counts as much as any other.
    """
    how = Compensation(biases="existing", inputs="pruned", damping=DAMPINGS)
    ranked = Recipe("best", RelativeLoss(batches, batches, loss, weight), batches, scope="global", compensation=how)
    if weight != "taylor":
        return ranked
    curved = replace(ranked, score=FisherBrain(batches, loss))
    equal = replace(ranked, score=OptimalBrain(batches, rounds=32), scope="axis")
    return Rivals("best", ranked.score, batches, compensation=how, rivals=(ranked, curved, equal))


@dataclass(frozen=True)
class Ends:
    """Finds the axes of the first and last blocks of a graph, `first` and `last` for every `of` blocks that there are."""

    first: int
    last: int
    of: int

    def __call__(self, graph: DependencyGraph, /) -> tuple[str, ...]:
        count = len(blocks(graph))
        ends = (round(each * count / self.of) for each in (self.first, self.last))
        return first_and_last(graph, *ends) if count else ()


@dataclass(frozen=True)
class Entry:
    """A recipe's function, its paper, what it needs ("nothing", "batches", "batches with a loss"), its cost, the paper's data."""

    make: Callable[..., Recipe]
    paper: str
    needs: str
    cost: str
    data: str = ""

    def described(self) -> dict[str, str]:
        """All but the function, as data."""
        return {"paper": self.paper, "needs": self.needs, "cost": self.cost, "data": self.data}


RECIPES: dict[str, Entry] = {
    "random": Entry(random, "baseline", "nothing", "none"),
    "magnitude": Entry(magnitude, "Li et al. 2017; Fang et al. 2023 (DepGraph)", "nothing", "one look at the weights"),
    "llm_pruner": Entry(
        llm_pruner,
        "Ma et al. 2023 (LLM-Pruner)",
        "batches with a loss",
        "one forward and backward pass",
        "10 x 64 tokens",
    ),
    "wanda_sp": Entry(
        wanda_sp, "Sun et al. 2024 (Wanda); An et al. 2024", "batches", "one forward pass", "128 sequences"
    ),
    "flap": Entry(flap, "An et al. 2024 (FLAP)", "batches", "one forward pass", "1024 x 128 tokens"),
    "minitron": Entry(
        minitron, "Muralidharan et al. 2024 (Compact LMs)", "batches", "one forward pass", "1024 samples"
    ),
    "minitron_experts": Entry(
        minitron_experts,
        "Muralidharan et al. 2024 (Compact LMs)",
        "batches",
        "one forward pass, and the experts' last products once more for each",
        "1024 samples",
    ),
    "cfsp": Entry(cfsp, "Wang et al. 2025 (CFSP)", "batches", "two forward passes", "128 x 1024 tokens"),
    "owl": Entry(owl, "Yin et al. 2024 (OWL)", "batches", "two forward passes", "128 sequences"),
    "adapt_pruner": Entry(
        adapt_pruner,
        "Wang et al. 2025 (Adapt-Pruner)",
        "batches with a loss",
        "a forward and a backward pass, and a forward pass, for every 5%",
        "512 x 64 tokens",
    ),
    "bonsai": Entry(
        bonsai, "Dery et al. 2024 (Bonsai)", "batches with a loss", "402 forward passes for every 5%", "32 sequences"
    ),
    "llm_surgeon": Entry(
        llm_surgeon,
        "van der Ouderaa et al. 2024 (LLM Surgeon)",
        "batches with a loss",
        "two forward passes and a backward pass, 40 times, and inverses",
        "128 x 2048 tokens",
    ),
    "amp": Entry(amp, "Mugnaini et al. 2025 (AMP)", "batches", "one forward pass", "50 prompts"),
    "ria": Entry(ria, "Zhang et al. 2024 (RIA)", "batches", "one forward pass", "128 sequences"),
    "obs": Entry(
        obs,
        "Frantar and Alistarh 2023; Wang et al. 2024 (SPA)",
        "batches",
        "one forward pass, X'X and its inverse",
        "128 sequences",
    ),
    "slicegpt": Entry(
        slicegpt,
        "Ashkboos et al. 2024 (SliceGPT)",
        "batches",
        "one forward pass, X'X of residual streams, one eigendecomposition each",
        "128 x 2048 tokens",
    ),
    "slicegpt_shortcuts": Entry(
        slicegpt_shortcuts,
        "Ashkboos et al. 2024 (SliceGPT), with products between rotations",
        "batches",
        "half a forward pass, X'X and an eigendecomposition for every normalisation",
        "128 x 2048 tokens",
    ),
    "stun": Entry(stun, "STUN, Lee et al. 2024", "nothing", "distances of the router's rows"),
    "best": Entry(
        best,
        "ours: OBS, Hassibi and Stork 1993, in the loss's curvature or relative, with sequential least squares",
        "batches with a loss",
        "sixteen forward passes and two backward passes, three cuts, X'X and its inverse",
        "any: 64 x 128 tokens measured",
    ),
}
"""All recipes by name."""


def entry_of(name: str) -> Entry:
    """What is known of the recipe of that name; raises ScoreError for an unknown name, with the nearest."""
    return pick(RECIPES, name, "recipe")


def named(name: str, batches: Batches | None = None, loss: Loss | None = None, seed: int = 0) -> Recipe:
    """The recipe of that name; raises ScoreError for an unknown name (with the nearest), or where it needs batches."""
    entry = entry_of(name)
    if entry.needs != "nothing" and batches is None:
        raise ScoreError(f"recipe {name!r} needs calibration data: {GIVE}")
    options = {"batches": batches, "loss": loss, "seed": seed}
    return entry.make(**{k: v for k, v in options.items() if k in entry.make.__annotations__})


def for_file(name: str, batches: Batches | None = None, seed: int = 0) -> Recipe:
    """The recipe of that name as a file can have it: without a loss, and ours with the weights of axes that need no gradients.

    Raises ScoreError as `named` does, and for a recipe that needs gradients.
    """
    found = best(batches, weight="share") if name == "best" and batches is not None else named(name, batches, seed=seed)
    if getattr(found.score, "gradients", False):
        raise ScoreError(
            f"recipe {name!r} needs gradients, which an ONNX file doesn't give: load the PyTorch model, or take one from "
            "activations such as flap, obs or best"
        )
    return found


__all__ = ["RECIPES", "Ends", "Entry", "Normalisation", "entry_of", "for_file", "named", *RECIPES]
