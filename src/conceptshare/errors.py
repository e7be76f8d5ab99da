"""The errors a user can cause and mend. Every message names the file, key or sample, and the remedy."""


class ConceptshareError(Exception):
    """Base of every error that conceptshare raises on purpose."""


class StudyError(ConceptshareError):
    """The study or the catalog says something that cannot be run."""


class DatasetError(ConceptshareError):
    """A data set cannot be read, or too much of it is unusable."""


class EncoderError(ConceptshareError):
    """An encoder cannot be found or loaded, or is not what the catalog says."""


class StoreError(ConceptshareError):
    """A store on disk is missing, unfinished, damaged or of another kind."""


class NumericsError(ConceptshareError):
    """A computation met numbers that are not finite or do not fit their type."""


class HubError(ConceptshareError):
    """Files that a model hub holds are neither on this machine nor to be fetched."""


class MadeMeanwhileError(ConceptshareError):
    """Another process made the same result while this one waited for it: nothing is left to do."""
