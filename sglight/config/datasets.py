"""The keys of every data set, as dataclasses for Hydra's ConfigStore; imports neither torch nor h5py.

The names in `SCHEMAS` are those that `conf/dataset/*.yaml` begin with: `defaults: [base_planar, _self_]`.
"""

from dataclasses import dataclass

from omegaconf import II, MISSING

from sglight.errors import UserError

ONE_SOURCE = (
    "dataset=image_folder needs either dataset.raw_dir (the folder that holds train/ and test/) or dataset.archive (a "
    "tar or zip file of it)"
)


@dataclass
class DatasetConfig:
    """The keys of all data sets."""

    _target_: str = MISSING
    name: str = MISSING
    batch_size: int = 128
    eval_batch_size: int = 1000
    seed: int = II("seed")
    data_seed: int = 0


@dataclass
class PlanarConfig(DatasetConfig):
    """Generated point clouds in the plane: `ellipse`, `swiss_roll`, `peaks`."""

    _target_: str = "sglight.data.planar.PlanarData"
    batch_size: int = 64
    train_points: int = 1000
    val_points: int = 500
    test_points: int = 500
    noise: float = 0.0


@dataclass
class ArraysConfig(DatasetConfig):
    """The keys of all data sets whose samples are stored in files."""

    validation_fraction: float = 0.1
    augment: bool = False
    crop_padding: int = 4
    flip: bool = False
    memory_limit: float = 4.0


@dataclass
class DigitsConfig(ArraysConfig):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which are installed with it."""

    _target_: str = "sglight.data.images.DigitsData"
    name: str = "digits"
    test_fraction: float = 0.2


@dataclass
class ImagesConfig(ArraysConfig):
    """Image sets that torchvision can download: `mnist`, `fashion_mnist`, `cifar10`, `cifar100`."""

    _target_: str = "sglight.data.images.TorchvisionData"
    data_dir: str = II("data_dir")
    raw_dir: str | None = None
    download: bool = True


@dataclass
class ImageFolderConfig(ArraysConfig):
    """The user's own pictures, in a folder or an archive: `train/<class>/**`, perhaps `val/` and `test/`."""

    _target_: str = "sglight.data.folder.ImageFolderData"
    name: str = "image_folder"
    data_dir: str = II("data_dir")
    raw_dir: str | None = None
    archive: str | None = None
    size: int | None = None
    channels: int = 3
    max_megapixels: float = 64.0
    test_fraction: float = 0.2


@dataclass
class HDF5Config(ArraysConfig):
    """The user's own arrays in an HDF5 file: images or feature vectors, with labels."""

    _target_: str = "sglight.data.arrays.HDF5Data"
    name: str = "hdf5"
    path: str | None = None
    layout: str = "auto"
    test_fraction: float = 0.2
    data_dir: str | None = II("data_dir")


SCHEMAS: dict[str, type[DatasetConfig]] = {
    "base_planar": PlanarConfig,
    "base_digits": DigitsConfig,
    "base_images": ImagesConfig,
    "base_image_folder": ImageFolderConfig,
    "base_hdf5": HDF5Config,
}


# The number of classes of each point cloud; every split needs a point of each class.
CLOUD_CLASSES = {"ellipse": 2, "swiss_roll": 2, "peaks": 5}
# The shape of a sample, for data sets where it is known before anything is read.
SHAPES = {
    **dict.fromkeys(CLOUD_CLASSES, (2,)),
    "digits": (1, 8, 8),
    **dict.fromkeys(("mnist", "fashion_mnist"), (1, 28, 28)),
    **dict.fromkeys(("cifar10", "cifar100"), (3, 32, 32)),
}
MOST_POINTS = 10_000_000
MOST_NOISE = 1e6


def at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a number that is smaller than `minimum`, or NaN.

    Raises:
        UserError: that names the `key`.
    """
    if not value >= minimum:  # false for NaN
        raise UserError(f"{key}={value} is too small: {minimum} is the least that is allowed")


def at_most(key: str, value: float, maximum: float) -> None:
    """Refuse a number that is larger than `maximum`, or NaN.

    Raises:
        UserError: that names the `key`.
    """
    if not value <= maximum:
        raise UserError(f"{key}={value} is too large: {maximum} is the most that is allowed")


def fraction(key: str, value: float) -> None:
    """Refuse a number that is not between 0 and 1.

    Raises:
        UserError: that names the `key`.
    """
    if not 0 < value < 1:
        raise UserError(f"{key}={value} must be between 0 and 1, both excluded")
