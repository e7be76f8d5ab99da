"""Members of a study, each an encoder with the seed of its SAEs, and their pairs."""

from collections.abc import Iterable
from typing import NamedTuple

from conceptshare.io.errors import StudyError


class Member(NamedTuple):
    """An encoder with the seed of the SAEs trained on it."""

    encoder: str
    seed: int

    def __str__(self) -> str:
        return f"{self.encoder}@{self.seed}"


Pair = tuple[Member, Member]


class GroupedMember(NamedTuple):
    """A member of a matrix with its group."""

    member: str
    modality: str
    kind: str
    other_seeds: tuple[str, ...] = ()
    """The same encoder with each of its other seeds."""


def sorted_pair(a: Member, b: Member) -> tuple[Member, Member]:
    """Two members in their one order, whichever way round they were named."""
    return (a, b) if a <= b else (b, a)


def encoder_pairs(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    """The different encoders of pairs of members: each two names sorted, once, in sorted order."""
    return sorted({(min(x, y), max(x, y)) for (x, _), (y, _) in pairs if x != y})


def as_member(text: str) -> Member:
    """The member that ``encoder@seed`` names.

    Raises:
        StudyError: if the text names none.
    """
    encoder, _, seed = text.rpartition("@")
    if not (encoder and seed.isdecimal()):
        raise StudyError(f"{text!r} is no member; give its encoder and seed, such as vit@0")
    return Member(encoder, int(seed))


def pair_name(a: Member, b: Member) -> str:
    """The name of a pair's store, the same whichever way round the two were named."""
    first, second = sorted_pair(a, b)
    return f"{first}__{second}"
