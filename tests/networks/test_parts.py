"""Openings, connectors, classifiers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglight.networks.parts import (
    Classifier,
    Connector,
    Conv,
    ConvOpening,
    Linear,
    PadOpening,
    RepeatOpening,
    pad_channels,
)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_pad_and_repeat(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    padded, repeated = PadOpening(7)(x), RepeatOpening(7)(x)
    assert torch.equal(padded[:, :3], x) and padded[:, 3:].abs().sum() == 0 and padded.shape[1] == 7
    assert torch.equal(repeated, torch.cat([x, x, x[:, :1]], 1))
    assert torch.equal(pad_channels(x, 3), x)


def test_conv_opening_is_activation_of_norm_of_convolution() -> None:
    opening = ConvOpening(2, 5, 3, "relu", "batch", seed=1)
    x = torch.randn(4, 2, 6, 7)
    plain = F.conv2d(x, opening.conv.weight, opening.conv.bias, padding=1)
    torch.testing.assert_close(opening(x), torch.relu(F.batch_norm(plain, None, None, training=True)))
    opening = ConvOpening(2, 5, 3, "tanh", "none", seed=1)
    torch.testing.assert_close(opening(x), torch.tanh(F.conv2d(x, opening.conv.weight, padding=1)))


@pytest.mark.parametrize("fields", [1, 2])
def test_connectors_treat_every_field_alike(fields: int) -> None:
    state = torch.randn(2, 3 * fields, 6, 8)
    pad = Connector("pad", "conv", True, 3, 5, fields, seed=1, index=0)(state)
    linear = Connector("linear", "conv", True, 3, 5, fields, seed=1, index=0)
    mixed = linear(state)
    assert pad.shape == mixed.shape == (2, 5 * fields, 3, 4)
    for k, field in enumerate(state.chunk(fields, 1)):
        pooled = F.avg_pool2d(field, 2)
        torch.testing.assert_close(pad.chunk(fields, 1)[k], F.pad(pooled, (0, 0, 0, 0, 0, 2)))
        expected = F.conv2d(pooled, linear.mix.weight, linear.mix.bias)
        torch.testing.assert_close(mixed.chunk(fields, 1)[k], expected)


def test_connectors_without_pooling_and_dense() -> None:
    images = torch.randn(2, 3, 6, 8)
    assert Connector("pad", "conv", False, 3, 4, 1, 1, 0)(images).shape == (2, 4, 6, 8)
    state = torch.randn(2, 6)
    linear = Connector("linear", "dense", True, 3, 2, 2, 1, 0)
    torch.testing.assert_close(
        linear(state), torch.cat([f @ linear.mix.weight.T for f in state.chunk(2, 1)], 1)
    )


def test_classifier_sees_y_only() -> None:
    state = torch.randn(2, 8, 3, 3)
    for head, width in (("flatten", 36), ("pool", 4)):
        classifier = Classifier(head, (4, 3, 3), 10, seed=1)
        assert classifier.linear.weight.shape == (10, width)
        other = state.clone()
        other[:, 4:] += 1
        assert torch.equal(classifier(state), classifier(other))
    y = state[:, :4]
    assert torch.equal(
        Classifier("pool", (4, 3, 3), 10, 1)(state),
        Classifier("pool", (4, 3, 3), 10, 1).linear(y.mean((2, 3))),
    )


def test_weights_of_the_classifier_as_images() -> None:
    weight = Classifier("flatten", (4, 3, 5), 10, 1).image_weight
    assert weight is not None and weight.shape == (10, 4, 3, 5)
    assert Classifier("pool", (4, 3, 5), 10, 1).image_weight is None
    assert Classifier("flatten", (4,), 10, 1).image_weight is None


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_initial_values(gain: float) -> None:
    linear = Linear(400, 300, 7, "here", gain=gain)
    assert float(linear.weight.detach().std()) == pytest.approx(gain / 20, rel=0.02)
    conv = Conv(16, 100, 5, 7, "here", gain=gain)
    assert float(conv.weight.detach().std()) == pytest.approx(gain / 20, rel=0.02)
    assert linear.bias.abs().sum() == conv.bias.abs().sum() == 0
    assert torch.equal(linear.weight, Linear(400, 300, 7, "here", gain=gain).weight)
    assert not torch.equal(linear.weight, Linear(400, 300, 7, "there", gain=gain).weight)
    assert not torch.equal(linear.weight, Linear(400, 300, 8, "here", gain=gain).weight)


@pytest.mark.parametrize("kind", ["pad", "linear"])
def test_connectors_keep_the_precision_of_the_state_under_autocast(kind: str) -> None:
    for kernel, state in (("conv", torch.randn(2, 6, 4, 4)), ("dense", torch.randn(2, 6))):
        with torch.autocast("cpu", torch.bfloat16):
            assert Connector(kind, kernel, True, 3, 4, 2, 1, 0)(state).dtype == torch.float32
