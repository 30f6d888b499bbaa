"""Does training still give the same numbers? Trains small runs and writes checksums of what they end with.

    python benchmarks/identity.py --out before.json      # at the commit before a change
    python benchmarks/identity.py --against before.json  # after it: exit status 1 if anything differs

Each run has a checksum of its parameters, of its optimisers' states, and of its logged metrics (without times). The
runs cover every strategy, every dynamics, dense and convolutional networks, one and two workers, a refinement, a
resumption in mid-epoch, and PVD. Checksums are bit for bit: compare only those of one machine and one version of torch.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.parallel.launcher import launch
from sglight.parallel.strategy import StageStrategy
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD

CLASSES, BATCH, BATCHES, EPOCHS = 4, 12, 9, 2
KINDS = {"backprop": Backprop, "delayed": Delayed, "dni": DNI, "multilevel": Multilevel, "pvd": PVD}
DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")
ADAM = {"name": "adam", "lr": 1e-2}
COSINE = {"name": "cosine", "min_factor": 0.1, "warmup_epochs": 0}
POINTS = {"shape": (3,), "classes": CLASSES, "channels": 5, "steps": 8, "horizon": 2.0, "seed": 7}
IMAGES = {**POINTS, "shape": (2, 6, 6), "kernel": "conv", "channels": 4, "opening": "conv"}
TWO_SEGMENTS = {**IMAGES, "channels": [4, 6], "steps": 4, "normalisation": "batch", "head": "pool"}
ESTIMATOR = {"name": "mlp", "hidden": [9], "optimizer": {"name": "adam", "lr": 3e-3}}
# Metrics that are times, or follow from times, and how good the gradients are that stages use, which is newer.
TIMES = ("time/", "stage_", "worker_", "speedup/", "throughput/", "memory/")

Case = dict[str, Any]


def cases() -> dict[str, Case]:
    """Each run by name: strategy, network, options, workers, and the batch behind which it is resumed, if any."""
    found: dict[str, Case] = {}

    def add(
        name: str,
        kind: str,
        network: Mapping[str, Any],
        options: Mapping[str, Any],
        workers: int = 1,
        **more: Any,
    ) -> None:
        found[name] = {
            "kind": kind, "network": dict(network), "options": dict(options), "workers": workers,
            "optimizer": ADAM, **more,
        }  # fmt: skip

    for dynamics in DYNAMICS:
        for kernel, network in (("dense", POINTS), ("conv", IMAGES)):
            network = {**network, "dynamics": dynamics}
            add(f"backprop {dynamics} {kernel}", "backprop", network, {"scheduler": COSINE})
            add(f"dni {dynamics} {kernel}", "dni", network, {"stages": 3, "estimator": ESTIMATOR})
        levels = {"levels": 2, "stages": 2, "estimator": ESTIMATOR}
        add(f"multilevel {dynamics}", "multilevel", {**POINTS, "dynamics": dynamics}, levels)
    sgd = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    conv = {"name": "conv", "hidden": [5], "every_n_batches": 2, "optimizer": ADAM}
    full = {
        "regularisation": {"smoothness": 1e-3}, "scheduler": {**COSINE, "warmup_epochs": 1}, "stages": 1,
    }  # fmt: skip
    plateau = {"name": "plateau", "gamma": 0.5, "patience": 0, "min_factor": 0.01}
    add("backprop two segments", "backprop", TWO_SEGMENTS, {"regularisation": {"smoothness": 1e-3}})
    add("backprop reversible", "backprop", {**IMAGES, "reversible": True}, {"clip_norm": 0.1})
    add("backprop sgd", "backprop", POINTS, {"scheduler": plateau}, optimizer=sgd)
    add("dni one stage", "dni", POINTS, full)
    for workers in (1, 2):
        on = f", {workers} worker(s)"
        for lag in (0, 1, 2):
            add(
                f"dni lag {lag}{on}",
                "dni",
                POINTS,
                {"stages": 4, "lag": lag, "estimator": ESTIMATOR},
                workers,
            )
        add(
            f"dni two segments{on}",
            "dni",
            TWO_SEGMENTS,
            {"stages": 2, "estimator": conv},
            workers,
            optimizer=sgd,
        )
        resumed = {
            "stages": 3,
            "lag": 2,
            "estimator": {**ESTIMATOR, "every_n_batches": 2},
            "scheduler": COSINE,
        }
        add(f"dni resumed{on}", "dni", POINTS, resumed, workers, interrupt=BATCHES + 4)
        three = {
            "levels": 3,
            "stages": 2,
            "level": {"mode": ["exact", "dni", "dni"], "lr": [0.02, 0.01, 0.005]},
        }
        three |= {"estimator": ESTIMATOR, "scheduler": COSINE}
        add(f"multilevel three levels{on}", "multilevel", POINTS, three, workers, epochs=3)
        exact = {
            "levels": 2,
            "stages": 3,
            "level": {"mode": "exact"},
            "estimator": conv,
            "prolongation": "constant",
        }
        add(f"multilevel exact{on}", "multilevel", IMAGES, exact, workers, interrupt=BATCHES + 4)
        reset = {"levels": 2, "stages": 2, "moments": "reset", "estimator": ESTIMATOR}
        add(f"multilevel resumed{on}", "multilevel", POINTS, reset, workers, interrupt=5)
        add(f"pvd{on}", "pvd", POINTS, {"processors": 3, "local_steps": 2}, workers)
        part = {"processors": 2, "objective_samples": 40, "synchronisation": "best", "clip_norm": 0.1}
        add(f"pvd resumed{on}", "pvd", IMAGES, part, workers, interrupt=BATCHES + 4)
        late = {"stages": 4, "microbatches": 3, "diagnose_every_n_batches": 0}
        add(f"delayed{on}", "delayed", POINTS, late, workers, interrupt=5)
        rebuilt = {**late, "backward": "rebuilt", "exact_epochs": 0.5}
        add(f"delayed rebuilt{on}", "delayed", {**IMAGES, "dynamics": "leapfrog"}, rebuilt, workers)
        add(f"backprop pipelined{on}", "backprop", IMAGES, {"stages": 3, "microbatches": 5}, workers)
    add("pvd lbfgs", "pvd", POINTS, {"processors": 2, "local_solver": "lbfgs", "synchronisation": "average"})
    add("dni bf16", "dni", IMAGES, {"stages": 2, "estimator": conv}, precision="bf16-mixed")
    return found


def noise(count: int, shape: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of noise with random labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, *shape, generator=g), torch.randint(CLASSES, (BATCH,), generator=g))
        for _ in range(count)
    ]


class Data:
    """Fixed batches; a training that goes on from a checkpoint does not see those again that it has seen."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches, self._first = batches, 0
        self.trainer: pl.Trainer | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._first = self._first, 0
        yield from self._batches[first:]

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"batch": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["batch"] % len(self._batches)


def fit(case: Case, folder: Path, ckpt: Path | None = None) -> None:
    """Train in this worker, or alone, as the case says; from a checkpoint on if there is one."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    saved = [ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)]
    if stop := case.get("interrupt"):
        saved.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1))
    parallel = {"strategy": StageStrategy(workers=case["workers"])} if case["workers"] > 1 else {}
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=case["workers"], max_epochs=case.get("epochs", EPOCHS),
        logger=CSVLogger(folder, "", ""), callbacks=saved,
        log_every_n_steps=2, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        precision=case.get("precision", "32-true"), **parallel,
    )  # fmt: skip
    module = KINDS[case["kind"]](case["network"], case["optimizer"], **case["options"])
    shape = case["network"]["shape"]
    data = Data(noise(BATCHES, shape, 0))
    data.trainer = trainer
    validation = DataLoader(noise(3, shape, 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data, validation, ckpt_path=ckpt, weights_only=True)


def train(case: Case, folder: Path) -> dict[str, str]:
    """The checksums of a run; of its end if it is resumed from a checkpoint in its middle."""
    whole = folder / "whole"
    parts: list[tuple[Path, Path | None]] = [(whole, None)]
    if stop := case.get("interrupt"):
        parts.append((folder / "resumed", whole / f"step={stop}.ckpt"))
    for arguments in parts:
        if case["workers"] == 1:
            fit(case, *arguments)
        else:
            launch(fit, case, *arguments, workers=case["workers"], threads=1)
    checkpoint = torch.load(parts[-1][0] / "last.ckpt", weights_only=True)
    rows = [row for where, _ in parts for row in metrics(where)]
    return {
        "parameters": checksum(checkpoint["state_dict"]),
        "optimisers": checksum(checkpoint["optimizer_states"]),
        "metrics": checksum(rows),
    }


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without times."""
    with (folder / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith(TIMES)} for row in csv.DictReader(file)
        ]
    return sorted((row for row in rows if row.keys() - {"epoch", "step"}), key=json.dumps)


def checksum(value: Any) -> str:
    """Of numbers, texts and tensors in dicts and lists, whatever the order of the dicts."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for key in sorted(part, key=str):
                digest.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        elif isinstance(part, Tensor):
            digest.update(f"{part.dtype}{list(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{part!r};".encode())

    add(value)
    return digest.hexdigest()[:16]


def machine() -> dict[str, str]:
    """What checksums depend on besides the code."""
    return {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__}


def processor() -> str:
    """The processor's name, with the vector instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the checksums to this file")
    parser.add_argument("--against", type=Path, help="compare with the checksums in this file")
    parser.add_argument("--only", default="", help="only runs whose names contain this")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for name, case in cases().items():
        if options.only in name:
            start = perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found[name] = train(case, Path(folder))
            print(f"{name:<36} {' '.join(found[name].values())} {perf_counter() - start:5.1f} s", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
    if options.against:
        sys.exit(compare(json.loads(options.against.read_text()), found))


def compare(before: dict[str, Any], found: dict[str, dict[str, str]]) -> int:
    """Print what differs; 0 if nothing does."""
    if before["machine"] != machine():
        print(f"not comparable: recorded on {before['machine']}, this is {machine()}")
        return 2
    known = before["runs"]
    changed = {
        name: [part for part, value in parts.items() if known[name][part] != value]
        for name, parts in found.items()
        if name in known and known[name] != parts
    }
    for name, parts in changed.items():
        print(f"DIFFERS: {name}: {', '.join(parts)}")
    new = found.keys() - known.keys()
    print(
        f"{len(found) - len(changed) - len(new)} of {len(found)} runs identical, {len(changed)} differ, {len(new)} new"
    )
    return int(bool(changed))


if __name__ == "__main__":
    main()
