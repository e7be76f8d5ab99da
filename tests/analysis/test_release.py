"""Which licences a release may have."""

import re
from itertools import product

import pytest

from conceptshare.analysis import release
from conceptshare.analysis.release import check_licence
from conceptshare.io.errors import StudyError


def test_knows_creative_commons_whole_and_no_part_of_a_name():
    for terms, version in product(("by", "by-nc", "by-nc-nd", "by-nc-sa"), ("3.0", "4.0")):
        check_licence(f"cc-{terms}-{version}")
    for part in ("cc-", "by-3.0", "nc-sa-3.0"):
        with pytest.raises(StudyError, match="not an identifier of the hub"):
            check_licence(part)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*[a-z0-9+]", known) for known in release._LICENCES.split())
