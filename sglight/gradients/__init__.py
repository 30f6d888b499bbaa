"""Where a stage's gradient comes from, and the estimators that predict it."""

from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.gradients.estimators import (
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)
from sglight.gradients.synthetic import Synthetic
from sglight.gradients.true import Taught, TrueGradient

__all__ = [
    "Boundary",
    "Estimator",
    "GradientSource",
    "Passage",
    "Synthetic",
    "SyntheticGradient",
    "Taught",
    "TrueGradient",
    "prediction_cost",
    "prediction_values",
    "synthetic_gradient",
]
