"""Stages `similarity` and `metrics`: a study's tables."""
