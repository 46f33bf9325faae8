"""Predictors of the experts a layer will need: one file each."""
