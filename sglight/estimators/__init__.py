"""The earlier name of `sglight.gradients`, kept so that code that imports estimators from here still works."""

from sglight.gradients import (
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)

__all__ = ["Estimator", "SyntheticGradient", "prediction_cost", "prediction_values", "synthetic_gradient"]
