"""Jobs compute where they should, in the precision that they should."""

import pytest
import torch

from conceptshare.device import full_float32

_CHANGES = {
    "torch's defaults": lambda patch: None,
    "matmul precision high": lambda patch: torch.set_float32_matmul_precision("high"),
    "matmul precision medium": lambda patch: torch.set_float32_matmul_precision("medium"),
    "products, by the older name": lambda patch: patch.setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "convolutions, by the older name": lambda patch: patch.setattr(torch.backends.cudnn, "allow_tf32", False),
    "products, by the newer name": lambda patch: patch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everything, by the newer name": lambda patch: patch.setattr(torch.backends, "fp32_precision", "tf32"),
}


def _settings():
    backends = torch.backends
    operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
    return [operation.fp32_precision for operation in operations]


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_full_float32_holds_whichever_way_tf32_was_set_and_ends(change):
    defaults = torch.get_float32_matmul_precision()
    try:
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            before = _settings()
            with full_float32():
                assert _settings() == ["ieee"] * 4
                # The older names can be read, which raises where they disagree with the newer ones.
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cuda.matmul.allow_tf32
                assert not torch.backends.cudnn.allow_tf32
            assert _settings() == before
    finally:
        torch.set_float32_matmul_precision(defaults)
