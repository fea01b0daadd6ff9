"""What was measured of one model on one machine: a JSON file that `depgraph profile` or a kit's script writes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depgraph.errors import ProfileError
from depgraph.files import written
from depgraph.onnx_door.graph import OnnxGraph
from exporters.timing import measure
from exporters.timing.kit import STAIRS, fingerprint, write_kit
from exporters.timing.tables import Alone, Grid, Stairs, is_measured

_AGAIN = "make it again with `depgraph profile`"


@dataclass(frozen=True)
class Profile:
    """Times of a model's operators, in milliseconds, and the machine that they hold for.

    `machine` has cpu, instructions (of AVX, AVX2, AVX-512 and NEON), cores, threads, onnxruntime, os and architecture; `data` is
    the whole as the JSON has it.
    """

    data: Mapping[str, Any]

    @property
    def machine(self) -> Mapping[str, Any]:
        return self.data["machine"]

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the whole dense model."""
        return float(self.data["dense"]["ms"])

    @property
    def narrow(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Operators at half of the widths, by name and what they are; empty in profiles that were made without."""
        return {(node["name"], node["op"]): node for node in self.data.get("narrow", {"nodes": []})["nodes"]}

    @property
    def stairs(self) -> dict[str, Stairs]:
        """The staircases by side: "conv.in", "conv.out", "depthwise", "matmul.out"; those that the model has."""
        found: dict[str, Stairs] = {}
        for side, key in STAIRS.items():
            if key in self.data["micro"]:
                probe = self.data["micro"][key]
                times = {
                    (b if side.endswith(".out") else a): ms
                    for (a, b), ms in zip(probe["points"], probe["ms"], strict=True)
                }
                # one kernel takes channels alone and channels out, and probes of the former are too short to see steps by
                found[side] = Stairs.of(times, found["conv.out"].step if side == "depthwise" else None)
        return found

    def tables(self) -> dict[str, Grid | Alone]:
        """The grids by the name of their signature."""
        stairs = self.stairs
        return {
            key: _table(key.split(" ")[0], entry, stairs)
            for key, entry in self.data["micro"].items()
            if key not in STAIRS.values()
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before trusting it, a sentence each."""
        if any(name.upper().startswith("AVX") for name in self.machine["instructions"]):
            return ()
        step = max((stairs.step for side, stairs in self.stairs.items() if side.startswith("conv")), default=1)
        seen = f"these times show steps of {step} channels" if step > 1 else "these times show none"
        return (
            f"{self.machine['cpu']} has no AVX, so the staircase of ONNX Runtime's convolutions isn't known: {seen}, which widths "
            "follow; on a processor with AVX they would be slow",
        )

    def here(self) -> str:
        """How this machine differs from that of the profile, as a clause; empty where it doesn't."""
        now, was = measure.machine(self.machine["threads"]), self.machine
        for name, said in (
            ("cpu", "was measured on"),
            ("architecture", "was measured on"),
            ("onnxruntime", "holds for onnxruntime"),
        ):
            if now[name] != was[name]:
                return f"{said} {was[name]}, and this is {now[name]}"
        return ""

    def check_fits(self, graph: OnnxGraph) -> None:
        """Raise ProfileError when it is another model's."""
        if self.data["fingerprint"] != fingerprint(graph):
            raise ProfileError(
                f"the profile is of {self.data['model']}, whose operators or sizes aren't those of {graph.name}: profiles hold "
                f"for one model on one size of input; {_AGAIN}"
            )

    def check_here(self) -> None:
        """Raise ProfileError when it was measured on another machine, or with another version of ONNX Runtime."""
        if why := self.here():
            raise ProfileError(f"the profile {why}: measure there, or {_AGAIN} here")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; raises CheckpointError when that can't be done."""
        written(Path(path), json.dumps(self.data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `save` or a kit's script wrote; raises ProfileError."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise ProfileError(f"the profile {path} can't be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ProfileError(
                f"{path} is no profile, but should be the JSON that `depgraph profile` writes: {error}"
            ) from error
        return cls.of(data, str(path))

    @classmethod
    def of(cls, data: Any, name: str = "this") -> Profile:
        """From plain data; raises ProfileError for what is no whole profile, or of another format."""
        if isinstance(data, Mapping) and data.get("format", measure.FORMAT) != measure.FORMAT:
            raise ProfileError(
                f"{name} has format {data['format']!r}, and this depgraph reads {measure.FORMAT}: {_AGAIN}"
            )
        try:
            times = [data["dense"]["ms"], *(n["ms"] for n in data["dense"]["nodes"])]
            times += [n["ms"] for n in data.get("narrow", {"nodes": []})["nodes"]]
            times += [ms for entry in data["micro"].values() for ms in entry["ms"]]
            whole = all(
                len(entry["ms"]) == len(entry["points"]) and entry["odd"] >= 0 for entry in data["micro"].values()
            )
            named = {*_MACHINE} <= data["machine"].keys() and isinstance(data["fingerprint"], str)
        except (KeyError, TypeError, AttributeError) as error:
            wrong = (
                f"its {error} is missing" if isinstance(error, KeyError) else f"a part is of the wrong kind ({error})"
            )
            raise ProfileError(f"{name} is no profile: {wrong}; {_AGAIN}") from error
        if not (whole and named and all(map(is_measured, times)) and times[0] > 0):
            raise ProfileError(f"{name} is no whole profile: times or what the machine is are missing; {_AGAIN}")
        return cls(data)


_MACHINE = ("cpu", "instructions", "cores", "threads", "onnxruntime", "os", "architecture")


def _table(kind: str, entry: Mapping[str, Any], stairs: Mapping[str, Stairs]) -> Grid | Alone:
    """The times of one signature."""
    points, ms, odd = entry["points"], entry["ms"], entry["odd"]
    if kind == "depthwise":
        on = len(points) - odd
        alone = [(point[0], value) for point, value in zip(points, ms, strict=True)]
        return Alone.of(dict(alone[:on]), dict(alone[on:]), stairs.get("depthwise", Stairs()))
    sides = stairs.get(f"{kind}.in", Stairs()), stairs.get(f"{kind}.out", Stairs())
    return Grid.of(points, ms, odd, sides)


def measured_profile(
    graph: OnnxGraph, runs: int = 30, threads: int = 1, told: Callable[[str], None] = lambda line: None
) -> Profile:
    """Measure a traced ONNX model on this machine: some seconds to a minute, the more different operators it has the longer."""
    with tempfile.TemporaryDirectory() as folder:
        kit = write_kit(graph, Path(folder) / "kit")
        try:
            data = measure.measure(kit, runs, threads, told)
        except Exception as error:
            raise ProfileError(
                f"ONNX Runtime can't run {graph.name}, or one of its operators, here: {error}"
            ) from error
    return Profile.of(json.loads(json.dumps(data)))
