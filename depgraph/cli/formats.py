"""What `export` writes in each format: from a model, or from an ONNX file where only its numbers change."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depgraph.cli.data import Amount, read_text, text_data
from depgraph.cli.models import Loaded
from depgraph.errors import DataError, ModelError

BATCHES = 4
"""How many batches (of text: of four windows) quantised numbers are calibrated on and compared on."""


@dataclass(frozen=True)
class Asked:
    """What `export` is asked for; `data` is a text, or .npz files with an array for each input of the ONNX file."""

    out: Path
    opset: int = 20
    quantise: str = ""
    tolerance: float | None = None
    data: Path | None = None
    seed: int = 0


Reports = list[Any]


def export_model(kind: str, loaded: Loaded, asked: Asked) -> Reports:
    """Write a model in the format `kind`; the reports of all steps, the last that of what was written."""
    return _FORMATS[kind](loaded, asked) if kind in _FORMATS else _elsewhere(kind, loaded, asked)


def export_file(source: Path, asked: Asked) -> Reports:
    """Write an ONNX file with fewer bits, as .ort, or both."""
    batches = None if asked.data is None else _arrays(asked.data)
    later = _later(asked, lambda _: batches)
    if not later:
        raise ModelError(f"{source} is an ONNX file already: give --quantise KIND, or --out FILE.ort")
    return _chained(source, asked.out, later)


def _plain(loaded: Loaded, asked: Asked) -> Reports:
    from exporters import OnnxOptions, to_onnx

    options = OnnxOptions(opset=asked.opset, dtype="float32")

    def first(out: Path) -> Any:
        return to_onnx(loaded.model, loaded.args, out, loaded.kwargs, options=options)

    return _made(first, asked, lambda file: _fitting(_batches(loaded, asked), file))


def _decoder(loaded: Loaded, asked: Asked) -> Reports:
    from exporters import OnnxOptions, decoder_feeds, to_decoder_onnx

    options = OnnxOptions(opset=asked.opset, dtype="float32")

    def first(out: Path) -> Any:
        return to_decoder_onnx(loaded.model, out, loaded.kwargs.get("input_ids"), options=options)

    def data(file: Path) -> Any:
        prompts = _prompts(loaded, asked)
        return None if prompts is None else decoder_feeds(file, prompts)

    return _made(first, asked, data)


def _encoder_decoder(loaded: Loaded, asked: Asked) -> Reports:
    from exporters import OnnxOptions, to_encoder_decoder_onnx

    if asked.quantise:
        raise ModelError(
            "--quantise takes one file at a time: export first, then give it encoder.onnx and decoder.onnx"
        )
    inputs = {name: value for name, value in loaded.kwargs.items() if not name.startswith("decoder_")}
    options = OnnxOptions(opset=asked.opset, dtype="float32")
    return [to_encoder_decoder_onnx(loaded.model, inputs, asked.out, options=options)]


def _genai(loaded: Loaded, asked: Asked) -> Reports:
    from exporters import GenaiOptions, OnnxOptions, to_genai

    if loaded.tokenizer is None:
        raise ModelError("--format genai needs a tokenizer: put its files into the model's folder")
    options = GenaiOptions(
        OnnxOptions(opset=asked.opset, dtype="float32"), _quantising(asked), data=_prompts(loaded, asked)
    )
    return [to_genai(loaded.model, loaded.tokenizer, asked.out, loaded.kwargs.get("input_ids"), options=options)]


def _elsewhere(kind: str, loaded: Loaded, asked: Asked) -> Reports:
    from exporters.destinations import DESTINATIONS, Cargo

    folder = getattr(loaded.tokenizer, "name_or_path", "")
    tokenizer = Path(folder) if folder and Path(folder).is_dir() else loaded.tokenizer
    return [DESTINATIONS[kind].write(Cargo(loaded.model, loaded.args, loaded.kwargs, tokenizer), asked.out)]


def check_destination(kind: str, asked: Asked) -> None:
    """Raise ModelError for options that a format has no use for, ExportError where the packages it needs aren't there."""
    if kind in _FORMATS:
        return
    from exporters.destinations import DESTINATIONS
    from exporters.extras import required

    if asked.quantise or asked.data is not None or asked.tolerance is not None:
        raise ModelError(
            f"--quantise, --tolerance and --data are for ONNX files, and --format {kind} writes another: leave them out"
        )
    required(DESTINATIONS[kind].extra, DESTINATIONS[kind].module)


def file_name(kind: str) -> str:
    """What the file of a format is called where nothing else is said."""
    from exporters.destinations import DESTINATIONS

    return "model" + (DESTINATIONS[kind].suffix if kind in DESTINATIONS else ".onnx")


_FORMATS: dict[str, Callable[[Loaded, Asked], Reports]] = {
    "onnx": _plain,
    "decoder": _decoder,
    "encoder-decoder": _encoder_decoder,
    "genai": _genai,
}

FOLDERS = frozenset(["encoder-decoder", "genai"])
"""The formats that are folders."""


def _quantising(asked: Asked) -> Any:
    from exporters import QuantOptions

    return QuantOptions(asked.quantise, asked.tolerance) if asked.quantise else None  # type: ignore[arg-type]


Data = Callable[[Path], Any]
Step = Callable[[Path, Path], Any]


def _later(asked: Asked, data: Data) -> list[Step]:
    """What is done to a float file: each makes one file of another."""
    from exporters import quantise, to_ort

    options = _quantising(asked)
    steps: list[Step] = [lambda source, out: quantise(source, out, data(source), options=options)] if options else []
    return [*steps, lambda source, out: to_ort(source, out)] if asked.out.suffix == ".ort" else steps


def _made(first: Callable[[Path], Any], asked: Asked, data: Data) -> Reports:
    """Export, then what is done to the file; only the last file stays."""
    later = _later(asked, data)
    if not later:
        return [first(asked.out)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / asked.out.with_suffix(".onnx").name  # as errors name it
        return [first(file), *_chained(file, asked.out, later)]


def _chained(source: Path, out: Path, later: list[Step]) -> Reports:
    with tempfile.TemporaryDirectory() as folder:
        between = [Path(folder) / str(number) / source.name for number in range(len(later) - 1)]
        for file in between:
            file.parent.mkdir()
        return [step(a, b) for step, a, b in zip(later, [source, *between], [*between, out], strict=True)]


def _prompts(loaded: Loaded, asked: Asked) -> list[torch.Tensor] | None:
    batches = _batches(loaded, asked)
    if batches is None:
        return None
    found = [batch["input_ids"] for batch in batches if isinstance(batch, Mapping) and "input_ids" in batch]
    if not found:
        raise DataError("the batches hold no 'input_ids', which a decoder is calibrated on")
    return found


def _batches(loaded: Loaded, asked: Asked) -> list[Any] | None:
    """A few batches of the text, else of what came with the model."""
    if asked.data is not None:
        text = read_text(asked.data)
        return text_data(loaded, asked.data, text, Amount(BATCHES, seed=asked.seed)).calibration
    return None if loaded.batches is None else [batch for batch, _ in zip(loaded.batches, range(BATCHES), strict=False)]


def _fitting(batches: list[Any] | None, file: Path) -> list[Any] | None:
    """The batches without what the file doesn't take, such as labels; masks that are missing are all ones."""
    if batches is None:
        return None
    import onnxruntime

    names = [value.name for value in onnxruntime.InferenceSession(str(file)).get_inputs()]
    return [_fitted(batch, names) for batch in batches]


def _fitted(batch: Any, names: list[str]) -> Any:
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in names if name in batch}
    return batch[: len(names)] if isinstance(batch, (tuple, list)) else batch


def _arrays(path: Path) -> list[dict[str, np.ndarray]]:
    """Every .npz file of a folder, or one, as a batch."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    try:
        found = [dict(np.load(file)) for file in files]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} can't be read as .npz ({error}): give a file or a folder of them for an ONNX file"
        ) from error
    if not found:
        raise DataError(f"the folder {path} holds no .npz file: give one for each batch, with an array for each input")
    return found


def reports_json(reports: Reports) -> dict[str, Any]:
    """The last report as data; those of steps before it under `before`."""
    *before, last = [_json(asdict(report)) for report in reports]
    return last | ({"before": before} if before else {})


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def onnx_beside(loaded: Loaded, model: Any, folder: Path, final: Path) -> Any:
    """Write the ONNX file of a pruned model into `folder`; the report names it in `final`, where that folder will be."""
    from exporters import OnnxOptions, to_onnx

    options = OnnxOptions(dtype="float32")
    made = to_onnx(model, loaded.args, folder / "model.onnx", loaded.kwargs, options=options)
    return replace(made, path=final / "model.onnx")
