"""Stage `pages`: a site of a study's features, as files that open anywhere.

`results/studies/{study}/pages/index.html` needs no server and no network. Its data are scripts in the same folder, each
loaded when it is needed; docs/formats.md describes them.
"""

from conceptshare.pages._index import write_index
from conceptshare.pages._member import write_member
from conceptshare.pages._pack import pack_site
from conceptshare.pages._pair import write_pair
from conceptshare.pages._samples import write_samples

__all__ = ["pack_site", "write_index", "write_member", "write_pair", "write_samples"]
