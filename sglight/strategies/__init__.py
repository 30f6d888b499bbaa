"""Strategies: how the stages of a network are trained, each a LightningModule with manual optimisation."""
