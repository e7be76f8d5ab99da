"""Input and output shared by all stages: files, stores, seals, provenance, progress and errors."""
