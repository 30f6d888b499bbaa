"""Crops and reflections of whole batches against one picture at a time."""

import torch
from torch.nn.functional import pad

from sglight.data.augment import Augmentation, Draw, crop


def test_crop_is_the_crop_of_each_picture():
    x = torch.randint(1, 256, (20, 3, 5, 7), dtype=torch.uint8)
    down, right = torch.randint(0, 5, (20,)), torch.randint(0, 5, (20,))
    result = crop(x, down, right, padding=2)
    for picture, cropped, i, j in zip(x, result, down.tolist(), right.tolist(), strict=True):
        assert torch.equal(cropped, pad(picture, (2, 2, 2, 2))[:, i : i + 5, j : j + 7])
    middle = torch.full((20,), 2)
    assert torch.equal(crop(x, middle, middle, padding=2), x)


def test_the_first_pictures_are_reflected():
    x = torch.rand(6, 1, 2, 3)
    nothing = torch.zeros(12, dtype=torch.long)
    result = Augmentation(0, flip=True)(x.clone(), Draw(nothing, nothing, [2, 4]), batch=1, batch_size=6)
    assert torch.equal(result[:4], x[:4].flip(-1))
    assert torch.equal(result[4:], x[4:])


def test_the_law_of_the_draw():
    draw = Augmentation(2, True).draw(50_000, 100, torch.Generator().manual_seed(0))
    assert set(draw.down.tolist()) == set(draw.right.tolist()) == set(range(5))
    heads = torch.tensor(draw.mirrored, dtype=torch.float64)
    assert len(heads) == 500
    assert abs(heads.mean() - 50) < 1
    assert abs(heads.std() - 5) < 1  # a binomial's
