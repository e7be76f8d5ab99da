"""A made-up site."""

import os
import shutil

import pytest

from . import made_up

NARROW = {"width": 360, "height": 740}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of a made-up study's pages; tests must not change it."""
    folder = tmp_path_factory.mktemp("pages") / "site"
    made_up.write_site(folder)
    return folder


@pytest.fixture(scope="session")
def large_site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "large"
    table = made_up.write_large_site(folder)
    return folder, table


@pytest.fixture
def tab(open_tab, site):
    return open_tab(site)


@pytest.fixture
def broken_site(site, tmp_path):
    """A copy of hard links from which a test may delete files, but must not write to them."""
    return shutil.copytree(site, tmp_path / "site", copy_function=os.link)
