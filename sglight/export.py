"""Writes a trained network to files for other programs: a torch.export program, safetensors or ONNX."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from sglight.files import replacing
from sglight.inference import Predictor


def export(predictor: Predictor, folder: Path, kind: str) -> list[Path]:
    """Write the network into ``folder``, with its description in ``network.json``; returns the paths of the files.

    Args:
        predictor: the trained network.
        folder: for the files.
        kind: ``torch`` (``network.pt2``, for ``torch.export.load``), ``safetensors`` or ``onnx``.
    """
    predictor = predictor.eval().cpu()
    write, name = {
        "torch": (_torch, "network.pt2"),
        "safetensors": (_safetensors, "network.safetensors"),
        "onnx": (_onnx, "network.onnx"),
    }[kind]
    with replacing(folder / name) as temporary:
        write(predictor, temporary)
    with replacing(folder / "network.json") as temporary:
        temporary.write_text(json.dumps(describe(predictor, kind), indent=2) + "\n", encoding="utf-8")
    return [folder / name, folder / "network.json"]


def describe(predictor: Predictor, kind: str) -> dict[str, Any]:
    """Everything about a network except its tensors, in plain values."""
    spec = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(predictor.network.spec).items()}
    return {
        "format": kind,
        "input": {
            "name": "samples", "shape": ["N", *predictor.shape],
            "values": "bytes, 0 to 255, as float32" if predictor.pixels else "raw numbers, as float32",
        },
        "output": {"name": "logits", "shape": ["N", len(predictor.class_names)], "probabilities": "softmax"},
        "normalised_as": "samples * scale + shift, by the network itself (safetensors: first)",
        "class_names": predictor.class_names,
        "network": spec,
    }  # fmt: skip


def _example(predictor: Predictor) -> torch.Tensor:
    return torch.zeros(2, *predictor.shape, dtype=predictor.scale.dtype)


def _torch(predictor: Predictor, path: Path) -> None:
    batch = torch.export.Dim("N")
    program = torch.export.export(predictor, (_example(predictor),), dynamic_shapes=({0: batch},))
    with path.open("wb") as file:
        torch.export.save(program, file)


def _safetensors(predictor: Predictor, path: Path) -> None:
    from safetensors.torch import save_file  # an optional dependency

    tensors = {name: tensor.contiguous() for name, tensor in predictor.state_dict().items()}
    save_file(tensors, path)


def _onnx(predictor: Predictor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
        program = torch.onnx.export(
            predictor, (_example(predictor),), input_names=["samples"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())
