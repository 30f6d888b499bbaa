"""`mode=predict` and `mode=export`: uses a trained network, given its checkpoint alone."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from sglight import units
from sglight.errors import UserError
from sglight.export import export
from sglight.files import replacing
from sglight.inference import Predictor, load
from sglight.samples import Samples

TABLE = "predictions.csv"


def run(plain: Mapping[str, Any], folder: Path) -> float:
    """Predict or export with the network of ``ckpt``; returns the number of predictions, or of files written."""
    predictor = load(plain["ckpt"], _device(plain["trainer"]["accelerator"]))
    if plain["mode"] == "predict":
        settings = plain["predict"]
        source, size = Path(settings["input"]), settings["batch_size"]
        bar = plain["callbacks"]["progress"]["enabled"] and plain["trainer"]["enable_progress_bar"]
        return predict(predictor, source, folder / TABLE, size, bar)
    files = export(predictor, folder, plain["export"]["format"])
    for file in files:
        print(f"written: {file}")
    return len(files)


def predict(
    predictor: Predictor, source: Path, table: Path, batch_size: int = 256, progress: bool = False
) -> int:
    """Write a CSV table with a row for each sample: input (file or row), class, probability. Returns their number.

    Args:
        predictor: the trained network.
        source: a file or folder, see `Samples`.
        table: the path of the table.
        batch_size: samples in a batch.
        progress: whether to show a progress bar.
    """
    samples = Samples(source, predictor.shape)
    counts = Counter[str]()
    batches = samples.batches(batch_size)
    total = -(-len(samples) // batch_size)
    with replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["input", "class", "probability"])
        for names, x in track(batches, "predicting", total, disable=not progress):
            _check_range(predictor, x, source)
            found = predictor.predict(x, batch_size)
            counts.update(found.names)
            for name, label, row in zip(names, found.names, found.probabilities, strict=True):
                writer.writerow([name, label, f"{row.max().item():.6f}"])
    shares = ", ".join(f"{n} of class {label}" for label, n in counts.most_common())
    Console().print(f"{units.plural(len(samples), 'sample')}: {shares}", highlight=False, markup=False)
    print(f"written: {table}")
    return len(samples)


def _check_range(predictor: Predictor, x: Any, source: Path) -> None:
    """Refuse numbers in [0, 1] if the network takes bytes, for which they would all be black."""
    if predictor.pixels and x.dtype.kind == "f" and x.size and 0 < x.max() <= 1:
        raise UserError(
            f"predict.input={source} holds numbers from {x.min():g} to {x.max():g}, but the network takes bytes, 0 to "
            "255; multiply them by 255"
        )


def _device(accelerator: str) -> str:
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise UserError(
                f"trainer.accelerator={accelerator}, but this machine has no GPU; use trainer.accelerator=cpu"
            )
        return "cuda"
    return "mps" if accelerator == "mps" else "cpu"
