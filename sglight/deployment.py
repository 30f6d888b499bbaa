"""`mode=predict` and `mode=export`: what a trained network is used for, with nothing but its checkpoint."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from sglight.errors import UserError
from sglight.export import export
from sglight.files import replacing
from sglight.inference import Predictor, load
from sglight.samples import Samples

TABLE = "predictions.csv"


def run(plain: Mapping[str, Any], folder: Path) -> float:
    """Do what ``mode`` says with the network of ``ckpt``; gives the number of predictions, or of files."""
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
    """Write a line for each sample of ``source``: input (file or row), class, probability; gives their number."""
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
    shares = ", ".join(f"{n} {label}" for label, n in counts.most_common())
    Console().print(f"{len(samples)} samples: {shares}", highlight=False, markup=False)
    print(f"written: {table}")
    return len(samples)


def _check_range(predictor: Predictor, x: Any, source: Path) -> None:
    """Refuse numbers in [0, 1] where the network takes bytes: it would see nothing but black."""
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
