"""SliceGPT: streams in the basis of their principal components compute the same, and lose least when they are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.errors import DataError, RotationError
from importance import recipes
from importance.components import basis
from importance.rotation import Rotation, rotate
from importance.units import units

WIDTH, WORDS = 12, 20


class Rms(nn.Module):
    """A norm by the root of the mean square, written out; `offset` is added to its scale."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-9) * (self.weight + self.offset)


class Centred(nn.Module):
    """A layer norm, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-9) * self.weight + self.bias


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(WIDTH, eps=1e-9)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def fused_rms() -> nn.Module:
    norm = nn.RMSNorm(WIDTH, eps=1e-9)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "rms": Rms,
    "one plus a weight": lambda: Rms(1.0),
    "fused rms": fused_rms,
    "without a scale": lambda: nn.RMSNorm(WIDTH, eps=1e-9, elementwise_affine=False),
    "layer norm": layer_norm,
    "layer norm, written out": Centred,
}


class Block(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = norm()
        self.gate, self.up = nn.Linear(WIDTH, 9), nn.Linear(WIDTH, 9)
        self.down = nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Words(nn.Module):
    """A residual stream from a table and positions to a head; the table is the head where `tied`."""

    def __init__(self, norm: Callable[[], nn.Module] = Rms, tied: bool = False, rank: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm = norm()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight
        if rank < WIDTH:
            self._within(torch.linalg.qr(torch.randn(WIDTH, rank))[0])

    def _within(self, span: Tensor) -> None:
        """Let all that is written to the stream lie in the span of some columns."""
        onto = span @ span.T
        with torch.no_grad():
            self.table.weight.copy_(self.table.weight @ onto)
            self.positions.copy_(self.positions @ onto)
            for block in self.blocks:
                block.down.weight.copy_(onto @ block.down.weight)
                block.down.bias.copy_(onto @ block.down.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randint(0, WORDS, (8, 6)) for _ in range(count)]


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, ids: Tensor) -> float:
    return float((one(ids) - other(ids)).abs().max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same(norm: str, tied: bool) -> None:
    model, data = Words(NORMS[norm], tied).double().eval(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rotate(depgraph.trace(model, (data[0],)), data)
    assert apart(model, found.model, data[1]) < 1e-8
    (turn,) = found.bases.values()
    assert torch.allclose(turn.T @ turn, torch.eye(WIDTH, dtype=torch.float64), atol=1e-12)
    assert not torch.allclose(found.model.get_parameter("positions"), model.positions)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    untied = found.model.head.weight is not found.model.table.weight
    assert untied == (not tied or norm != "without a scale")
    assert [note.split()[0] for note in found.notes] == (["head.weight"] if tied and untied else [])


@pytest.mark.parametrize("norm", ["rms", "fused rms", "one plus a weight"])
def test_scores_are_the_mean_squares_of_the_channels_that_are_read(norm: str) -> None:
    model, data = Words(NORMS[norm]).double().eval(), batches()
    found = rotate(depgraph.trace(model, (data[0],)), data, how=Rotation(damping=0))
    (axis,) = found.streams
    scores = found.scores[axis]
    assert (scores[:-1] >= scores[1:]).all()
    seen: list[Tensor] = []
    readers = [*(block.gate for block in found.model.blocks), found.model.head]
    for reader in readers:
        reader.register_forward_pre_hook(lambda _, given: seen.append(given[0].reshape(-1, WIDTH)))
    for ids in data:
        found.model(ids)
    rows = torch.cat(seen)
    assert torch.allclose(rows.T @ rows / len(rows), torch.diag(torch.from_numpy(scores)), atol=1e-10)


@pytest.mark.parametrize(("norm", "least"), [("rms", 5), ("one plus a weight", 5), ("layer norm", 6)])
def test_what_lies_in_few_directions_is_cut_without_loss(norm: str, least: int) -> None:
    """A layer norm takes the mean out, so that one channel more is needed."""
    model, data = Words(NORMS[norm], rank=5).double().eval(), batches()
    if norm == "layer norm":
        for named in (model.norm, *(block.norm for block in model.blocks)):
            nn.init.zeros_(named.bias)
    graph = depgraph.trace(model, (data[0],))
    (stream,) = units(graph, "stream")
    removed = WIDTH - least
    share = graph.cost({stream: range(removed)}).share_of(graph.dense_cost)["params"]
    done = recipes.slicegpt(data).prune(graph, depgraph.Target(params=share))
    assert {name: len(groups) for name, groups in done.plan.removal.items()} == {stream: removed}
    assert apart(model, done.model, data[1]) < 1e-6


@pytest.mark.parametrize("norm", ["rms", "layer norm"])
def test_fewer_directions_lose_less_than_fewer_channels(norm: str) -> None:
    model, data = Words(NORMS[norm]).eval(), batches()
    with torch.no_grad():  # what the stream holds varies in few directions mostly
        spread = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] @ torch.diag(2.0 ** -torch.arange(WIDTH))
        model.table.weight.copy_(model.table.weight @ spread.T)
        model.positions.copy_(model.positions @ spread.T)
        for block in model.blocks:
            block.down.weight.copy_(spread @ block.down.weight)
            block.down.bias.copy_(spread @ block.down.bias)
    graph, target = depgraph.trace(model, (data[0],)), depgraph.Target(params=0.6)
    sliced = recipes.slicegpt(data).prune(graph, target)
    plain = graph.plan(recipes.magnitude().score, target, only=units(graph, "stream")).apply()
    assert target.met_by(sliced.report.after, graph.dense_cost)
    assert apart(model, sliced.model, data[1]) < 0.7 * apart(model, plain, data[1])


def test_a_target_is_a_share_of_the_dense_model_although_a_tie_is_undone() -> None:
    model, data = Words(tied=True).eval(), batches()
    graph = depgraph.trace(model, (data[0],))
    done = recipes.slicegpt(data).prune(graph, depgraph.Target(params=0.8))
    params = sum(p.numel() for p in done.model.parameters())
    assert params == done.report.after.params <= 0.8 * graph.dense_cost.params
    assert done.model.head.weight is not done.model.table.weight


def test_a_tie_can_be_kept_for_the_mean_of_a_scale() -> None:
    model, data = Words(tied=True).eval(), batches()
    alike = Words(tied=True).eval()
    alike.load_state_dict(model.state_dict())
    nn.init.constant_(alike.norm.weight, model.norm.weight.mean().item())
    found = rotate(depgraph.trace(model, (data[0],)), data, how=Rotation(ties="keep"))
    assert found.model.head.weight is found.model.table.weight
    assert found.notes == ("norm.weight has its mean for all channels now: its reader is a table too",)
    assert apart(alike, found.model, data[1]) < 1e-5


class Patches(nn.Module):
    """What a vision transformer does: a convolution, a token that is joined on, positions, a router and stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.mix, self.norm, self.last = nn.Linear(5, 5), layer_norm(), layer_norm()
        self.router = nn.Linear(WIDTH, 4)
        self.wide, self.back = nn.Parameter(torch.randn(4, WIDTH, 7)), nn.Parameter(torch.randn(4, 7, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.cut(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        y = self.norm(x)
        share = self.router(y).softmax(-1)
        hidden = torch.einsum("bnc,ecf->bnef", y, self.wide).relu()
        x = x + torch.einsum("bnef,efc,bne->bnc", hidden, self.back, share)
        return self.head(self.last(x).mean(dim=1))


def test_patches_tokens_and_experts_are_rotated_alike() -> None:
    model = Patches().double().eval()
    data = [torch.randn(6, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    found = rotate(depgraph.trace(model, (data[0],)), data)
    assert apart(model, found.model, data[1]) < 1e-8
    moved = {name for name, p in found.model.named_parameters() if not torch.allclose(p, model.get_parameter(name))}
    assert {"cut.weight", "token", "positions", "router.weight", "wide", "back", "head.weight"} <= moved
    assert "mix.weight" not in moved


def test_scales_of_branches_go_into_what_writes_them() -> None:
    class Scaled(Block):
        def __init__(self, norm: Callable[[], nn.Module]) -> None:
            super().__init__(norm)
            self.scale = nn.Parameter(torch.rand(WIDTH) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale * self.down(self.up(self.norm(x)).relu())

    model, data = Words().double(), batches()
    model.blocks = nn.ModuleList(Scaled(layer_norm) for _ in range(2)).double()
    model = model.eval()
    found = rotate(depgraph.trace(model, (data[0],)), data)
    assert apart(model, found.model, data[1]) < 1e-8
    for block in found.model.blocks:
        assert torch.equal(block.scale, torch.ones_like(block.scale))


def test_padding_does_not_count() -> None:
    class Masked(Words):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(ids) * attention_mask[..., None]

    model, ids = Masked().double().eval(), batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    other = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % WORDS], dim=1)
    graph = depgraph.trace(model, kwargs={"ids": ids, "attention_mask": mask})
    one, two = (rotate(graph, [{"ids": x, "attention_mask": mask}]) for x in (ids, other))
    (axis,) = one.streams
    assert one.scores[axis] == pytest.approx(two.scores[axis])


def test_a_sliced_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, data = Words(tied=True).eval(), batches()
    done = recipes.slicegpt(data).prune(depgraph.trace(model, (data[0],)), depgraph.Target(params=0.8))
    depgraph.save(done.model, tmp_path / "sliced")
    again = depgraph.load(tmp_path / "sliced", model=Words(tied=True))
    assert apart(done.model, again, data[1]) == 0


class Gated(Words):
    """A stream with something done to its channels."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        x = self.act(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PostNorm(Words):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.positions
        for block in self.blocks:
            x = block.norm(x + block.down(block.up(x).relu()))
        return self.head(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gated(torch.relu), r"relu at .*test_rotation.py:\d+ acts on every channel of it by itself"),
        (lambda: Gated(lambda x: x.cumsum(-1)), r"cumsum.*multiplies the stream with what isn't a single weight"),
        (lambda: Gated(lambda x: x * torch.sigmoid(x)), r"sigmoid.*acts on every channel"),
        (lambda: Gated(lambda x: x + 1), r"adds a number to every channel"),
        (
            PostNorm,
            r"add.*test_rotation.py.* uses what a normalisation in 'blocks.0.norm'.* has scaled, which only linear maps",
        ),
    ],
)
def test_a_stream_that_cannot_be_rotated_is_refused_with_the_place(build: Any, message: str) -> None:
    model, data = build().eval(), batches(1)
    with pytest.raises(RotationError, match=message):
        rotate(depgraph.trace(model, (data[0],)), data)


def test_a_tie_without_a_module_of_its_own_is_refused() -> None:
    class Functional(Words):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids) + self.positions
            for block in self.blocks:
                x = block(x)
            return F.linear(self.norm(x), self.table.weight)

    model, data = Functional().eval(), batches(1)
    with pytest.raises(RotationError, match="'table.weight' is used with different scales"):
        rotate(depgraph.trace(model, (data[0],)), data)


def test_no_batches_are_refused() -> None:
    with pytest.raises(DataError, match="no batches to rotate by"):
        rotate(depgraph.trace(Words().eval(), (batches(1)[0],)), [])


@pytest.mark.parametrize("width", [1, 2, 5, 11, 12])
def test_bases_for_layer_norms_keep_means_at_zero_within_the_channels_that_stay(width: int) -> None:
    equal = torch.full((12, 1), 12**-0.5, dtype=torch.float64)
    inner = torch.linalg.qr(torch.cat([equal, torch.randn(12, 11, dtype=torch.float64)], dim=1))[0][:, 1:]
    turn = basis(torch.cat([inner, equal], dim=1), width, centred=True)
    assert torch.allclose(turn.T @ turn, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn.T @ equal, equal, atol=1e-12)
    first = inner[:, : width - 1].T @ turn
    assert float(first[:, width:].abs().max()) < 1e-12 if width < 12 and width > 1 else True
