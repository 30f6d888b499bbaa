"""Gradient sources: where the gradient at the end of a stage comes from; and the estimators that predict it."""

from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.gradients.blend import Blended, Ramp
from sglight.gradients.estimators import (
    Estimator,
    SyntheticGradient,
    TrainedEstimator,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)
from sglight.gradients.heads import Head
from sglight.gradients.local import LocalLoss
from sglight.gradients.residual import ResidualGradient
from sglight.gradients.sobolev import SobolevGradient
from sglight.gradients.synthetic import Synthetic
from sglight.gradients.true import Taught, TrueGradient

__all__ = [
    "Blended",
    "Boundary",
    "Estimator",
    "GradientSource",
    "Head",
    "LocalLoss",
    "Passage",
    "Ramp",
    "ResidualGradient",
    "SobolevGradient",
    "Synthetic",
    "SyntheticGradient",
    "Taught",
    "TrainedEstimator",
    "TrueGradient",
    "prediction_cost",
    "prediction_values",
    "synthetic_gradient",
]
