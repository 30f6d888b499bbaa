"""A trained network by itself: the same numbers as in training, from raw samples; and in files for others."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

import sglight
from sglight import start
from sglight.config.composing import check
from sglight.data.arrays import HDF5Data
from sglight.deployment import predict
from sglight.errors import UserError
from sglight.export import export
from sglight.inference import Predictor, load
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD

KINDS: dict[Any, dict[str, Any]] = {
    Backprop: {}, DNI: {"stages": 3}, Delayed: {"stages": 2, "microbatches": 2}, Multilevel: {"stages": 2, "levels": 2},
    PVD: {"processors": 2},
}  # fmt: skip
NETWORK = {"shape": (1, 6, 5), "classes": 2, "channels": [3, 4], "steps": 4, "kernel": "conv", "seed": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> HDF5Data:
    """Random pictures of bytes with names of classes."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = draw.integers(0, 256, (60, 1, 6, 5), np.uint8)
        file["y"] = np.arange(60) % 2
        file.attrs["classes"] = ["ant", "zebra"]
    return HDF5Data(path=str(path), batch_size=20)


def train(kind: Any, data: HDF5Data, path: Path) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = kind(NETWORK, {"name": "adam", "lr": 1e-2}, **KINDS[kind])
    trainer.fit(module, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path)
    return module


@pytest.fixture(scope="module")
def run(data: HDF5Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    train(DNI, data, folder / "checkpoints" / "best.ckpt")
    return folder


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (7, 1, 6, 5), np.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_numbers_as_in_training(kind: Any, data: HDF5Data, tmp_path: Path) -> None:
    """Of the test samples as the file holds them, bit for bit those of the module for the batches of its loader."""
    module = train(kind, data, tmp_path / "a.ckpt").eval()
    x, _ = next(iter(data.test_dataloader()))
    part = data.contents().parts["test"]
    stored = part.x[slice(None)][part.rows]
    predictor = load(tmp_path / "a.ckpt")
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(predictor(torch.from_numpy(stored)), expected)
    found = predictor.predict(stored, batch_size=5)
    torch.testing.assert_close(found.probabilities, expected.softmax(1))
    assert found.names == [data.class_names[i] for i in expected.argmax(1).tolist()]


def test_load_takes_folders_files_and_single_samples(run: Path, raw: np.ndarray) -> None:
    predictor = sglight.load(run)
    assert isinstance(predictor, Predictor) and not predictor.training
    expected = predictor.predict(raw)
    for given in (torch.from_numpy(raw), list(raw), raw.tolist(), raw.astype(np.float64)):
        assert torch.equal(
            sglight.load(run / "checkpoints/best.ckpt").predict(given).probabilities, expected[0]
        )
    one = predictor.predict(raw[0])
    torch.testing.assert_close(one.probabilities, expected.probabilities[:1])
    assert predictor.predict(raw[:0]).names == []


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 1, 5, 6)), np.zeros((6, 5)), ["a"], np.zeros((1, 1, 6, 5), complex)]
)
def test_wrong_samples_are_refused(run: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match="samples"):
        load(run).predict(wrong)


def test_what_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"abc")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "a.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match=r"not a checkpoint of sglight"):
        load(tmp_path / "b.ckpt")
    old = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    del old["sglight_data"]
    torch.save(old, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="earlier version"):
        load(tmp_path / "c.ckpt")


def rows(table: Path) -> list[list[str]]:
    with table.open(newline="") as file:
        return list(csv.reader(file))


def test_predictions_of_files(run: Path, raw: np.ndarray, tmp_path: Path) -> None:
    """Arrays in any order of the axes, and pictures, give the same table but for the names."""
    predictor = load(run)
    np.save(tmp_path / "a.npy", raw)
    np.save(tmp_path / "b.npy", raw[:, 0])
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["x"] = np.moveaxis(raw, 1, -1)
    (tmp_path / "d").mkdir()
    for i, picture in enumerate(raw):
        Image.fromarray(picture[0]).save(tmp_path / "d" / f"{i}.png")
    expected = predictor.predict(raw)
    for name in ("a.npy", "b.npy", "c.h5", "d"):
        assert predict(predictor, tmp_path / name, tmp_path / "table.csv", 3) == 7
        head, *lines = rows(tmp_path / "table.csv")
        assert head == ["input", "class", "probability"]
        assert [line[1] for line in lines] == expected.names
        assert [float(line[2]) for line in lines] == pytest.approx(
            expected.probabilities.amax(1).tolist(), abs=1e-5
        )
        assert lines[6][0] == ("6.png" if name == "d" else "6")


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.npy", np.zeros((3, 5, 6), np.uint8), r"\[3, 5, 6\], the network takes \[N, 1, 6, 5\]"),
        ("a.npy", np.full((3, 6, 5), 0.5), "multiply them by 255"),
        ("a.npy", np.array(["a"]), "real numbers"),
        ("a.png", np.zeros((5, 6), np.uint8), "6 x 5 pixels"),
        ("a.txt", None, "is no picture"),
    ],
)
def test_wrong_files_are_refused(run: Path, tmp_path: Path, name: str, array: Any, words: str) -> None:
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, array)
    elif array is not None:
        Image.fromarray(array).save(path)
    else:
        path.write_text("abc")
    with pytest.raises(UserError, match=f"predict.input.*{words}"):
        predict(load(run), path, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()


def test_exported_program(run: Path, raw: np.ndarray, tmp_path: Path) -> None:
    predictor = load(run)
    export(predictor, tmp_path, "torch")
    program = torch.export.load(tmp_path / "network.pt2").module()
    x = torch.from_numpy(raw).float()
    with torch.no_grad():
        torch.testing.assert_close(program(x), predictor(x))
    facts = json.loads((tmp_path / "network.json").read_text())
    assert facts["class_names"] == ["ant", "zebra"] and facts["input"]["shape"] == ["N", 1, 6, 5]


def test_safetensors(run: Path, raw: np.ndarray, tmp_path: Path) -> None:
    """Tensors and JSON are enough to make the network again."""
    safetensors = pytest.importorskip("safetensors.torch")
    predictor = load(run)
    export(predictor, tmp_path, "safetensors")
    tensors = safetensors.load_file(tmp_path / "network.safetensors")
    net = sglight.StableNet(**json.loads((tmp_path / "network.json").read_text())["network"])
    prefix = "network."
    net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    x = torch.from_numpy(raw).float()
    assert torch.equal(net(x * tensors["scale"] + tensors["shift"]), predictor(x))


@pytest.mark.slow
def test_onnx(run: Path, raw: np.ndarray, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    predictor = load(run)
    export(predictor, tmp_path, "onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    x = raw.astype(np.float32)
    with torch.no_grad():
        expected = predictor(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"samples": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mode=predict"], "mode=predict needs a trained network"),
        (["mode=export", "ckpt={run}", "trainer.devices=2"], "runs in one process"),
        (["mode=predict", "ckpt={run}"], "predict.input=null"),
        (["mode=predict", "ckpt={run}", "predict.input=/none"], "predict.input=/none is not there"),
    ],
)
def test_the_command_refuses(compose_config: Any, run: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(compose_config(*(o.format(run=run) for o in overrides)))


def test_the_command_uses_the_best_checkpoint(
    compose_config: Any, run: Path, raw: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", raw)
    (run / "checkpoints/last.ckpt").write_bytes(b"the last one, torn")
    own = [f"ckpt={run}", "trainer.accelerator=cpu", "callbacks.progress.enabled=false"]
    cfg = check(compose_config("mode=predict", f"predict.input={tmp_path / 'x.npy'}", *own))
    assert start.run(cfg, tmp_path) == 7
    assert len(rows(tmp_path / "predictions.csv")) == 8
    assert start.run(check(compose_config("mode=export", *own)), tmp_path) == 2
    assert (tmp_path / "network.pt2").is_file()
