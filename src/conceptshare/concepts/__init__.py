"""Stages `names` and `examples`: names and example samples of features."""
