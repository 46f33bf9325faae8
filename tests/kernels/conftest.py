"""Every kernel test runs at each level this machine has; without the extension only at 'numpy'."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moestro.kernels import native


@pytest.fixture(params=native.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one level for a test, as MOESTRO_KERNELS would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESTRO_KERNELS", request.param)
        native.extension.cache_clear()
        assert native.level() == request.param
        yield request.param
    native.extension.cache_clear()
    native.extension()
