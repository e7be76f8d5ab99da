"""Stages `names` and `examples`: what a feature stands for."""
