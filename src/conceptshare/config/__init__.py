"""The study: what `config.yaml` and the catalog say, checked before any work. Nothing here imports torch."""

from conceptshare.config.study import Study, load_study

__all__ = ["Study", "load_study"]
