"""Data sets as tests look at them."""

import numpy as np

from conceptshare.dataset import Data


class AsRead(Data):
    """The samples in the order of their source, in which a test's expectations are written."""

    def __init__(self, folder):
        super().__init__(folder)
        self._rows = np.argsort(np.random.default_rng(self.manifest["order_seed"]).permutation(len(self))).tolist()

    def ids(self):
        ids = super().ids()
        return [ids[row] for row in self._rows]

    def caption(self, row):
        return super().caption(self._rows[row])

    def image(self, row):
        return super().image(self._rows[row])
