"""What tests of the analysis share."""

import pytest

from analysis.figures import saving


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built but not rendered, which takes most of a report's time, for tests that do not look at them."""
    monkeypatch.setattr(saving, "svg", lambda figure: b"<?xml?><svg/>")
