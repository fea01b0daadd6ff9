"""A small CNN and a small vision transformer learn scikit-learn's digits, and lose half of their parameters.

python examples/digits.py [--out FOLDER]     trains both in seconds, leaves FOLDER/cnn.safetensors and FOLDER/vit.safetensors

python -m depgraph build examples/digits.py:cnn --latency 0.5ms --size 60kB --out small-cnn     makes one keep within limits

Needs scikit-learn: pip install 'depgraph[bench]'. `benchmarks/quality.py` measures every recipe on these two.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

import depgraph
from importance import recipes

OUT = Path("out") / "digits"
MISSING = "scikit-learn isn't installed, so there are no digits to learn: pip install 'depgraph[bench]'"
BATCH, CALIBRATION = 64, 4


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] with values from 0 to 1, and their classes [n]."""

    images: Tensor
    labels: Tensor

    def batches(self, seed: int, count: int) -> list[dict[str, Tensor]]:
        """`count` batches of 64, drawn without repetition; a model leaves "labels" to the loss."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return [{"images": self.images[i], "labels": self.labels[i]} for i in order.split(BATCH)[:count]]


def digits() -> tuple[Digits, Digits]:
    """1347 images to learn from and 450 to test on, always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(found.target)[order]
    return Digits(images[:1347], labels[:1347]), Digits(images[1347:], labels[1347:])


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.out = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.out(self.second(torch.relu(self.norm(self.first(x))))))


class Cnn(nn.Module):
    """A stem, two residual blocks, a step to half the size, two more, and a linear head."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        wide = 2 * channels
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.fine = nn.Sequential(Residual(channels), Residual(channels))
        self.down = nn.Sequential(nn.Conv2d(channels, wide, 3, 2, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
        self.coarse = nn.Sequential(Residual(wide), Residual(wide))
        self.head = nn.Linear(wide, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.coarse(self.down(self.fine(self.stem(images)))).mean((2, 3)))


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x: Tensor) -> Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        return self.mix(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class Vit(nn.Module):
    """Patches of 2 x 2, learned positions, pre-norm blocks, the mean over patches, and a linear head."""

    def __init__(self, width: int = 48, heads: int = 6, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.2 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


MODELS = {"cnn": Cnn, "vit": Vit}
EPOCHS = {"cnn": 6, "vit": 15}


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of a batch."""
    return functional.cross_entropy(output, batch["labels"])


@torch.no_grad()
def accuracy(model: nn.Module, test: Digits) -> float:
    """The share of images that get the right class."""
    return (model(images=test.images).argmax(-1) == test.labels).float().mean().item()


def train(name: str, data: Digits) -> nn.Module:
    """A model of `MODELS`, trained from scratch."""
    torch.manual_seed(0)
    model, epochs = MODELS[name](), EPOCHS[name]
    steps = epochs * -(-len(data.images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for epoch in range(epochs):
        for batch in data.batches(epoch, steps):
            optimiser.zero_grad()
            loss(model(batch["images"]), batch).backward()
            optimiser.step()
            rate.step()
    return model.eval()


def trained(name: str, folder: Path, data: Digits) -> nn.Module:
    """The model whose weights lie in `folder`; it is trained and they are saved there where there are none."""
    path = folder / f"{name}.safetensors"
    if path.is_file():
        model = MODELS[name]()
        load_model(model, path)
        return model.eval()
    model = train(name, data)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return model


def subject(name: str) -> dict[str, Any]:
    """A trained model with all that `depgraph build` and `depgraph sweep` need to know of it."""
    data, test = digits()
    return {
        "model": trained(name, OUT, data),
        "kwargs": {"images": test.images[:8]},
        "batches": data.batches(0, CALIBRATION),
        "loss": loss,
        "held_out": test.batches(0, len(test.images)),
        "accuracy": lambda output, batch: (output.argmax(-1) == batch["labels"]).float().mean(),
    }


def cnn() -> dict[str, Any]:
    """`depgraph build examples/digits.py:cnn ...`"""
    return subject("cnn")


def vit() -> dict[str, Any]:
    """`depgraph build examples/digits.py:vit ...`"""
    return subject("vit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of the weights (%(default)s)")
    folder = parser.parse_args().out
    if importlib.util.find_spec("sklearn") is None:
        print(MISSING)
        return
    warnings.filterwarnings("ignore")
    data, test = digits()
    for name in MODELS:
        model = trained(name, folder, data)
        graph = depgraph.trace(model, (test.images[:2],))
        pruned = recipes.obs(data.batches(0, CALIBRATION)).prune(graph, depgraph.Target(params=0.5))
        left = pruned.report.after.params / pruned.report.before.params
        print(
            f"{name}: {accuracy(model, test):.1%} right, {accuracy(pruned.model, test):.1%} with {left:.0%} of the parameters"
        )


if __name__ == "__main__":
    main()
