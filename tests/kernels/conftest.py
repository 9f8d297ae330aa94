"""What tests of kernels share."""

from __future__ import annotations

import pytest

from h5traces.storage import kernels


@pytest.fixture(params=["compiled", "python"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(kernels, "NATIVE", None)
    elif kernels.NATIVE is None:
        pytest.skip("the kernels are not compiled")
