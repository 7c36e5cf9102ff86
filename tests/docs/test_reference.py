"""Every name of docs/reference/ exists and has a docstring; so have its public functions and classes."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parent.parent.parent / "docs" / "reference"
NAMES = [name for page in sorted(REFERENCE.glob("*.md")) for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]


def public(thing: object) -> Iterator[tuple[str, object]]:
    """The functions and classes that a module defines or lists in __all__, by their names."""
    listed = getattr(thing, "__all__", ())
    for name, member in vars(thing).items():
        documented = inspect.isfunction(member) or inspect.isclass(member)
        own = name in listed or (not name.startswith("_") and getattr(member, "__module__", "") == thing.__name__)
        if documented and own:
            yield name, member


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_docstring(name: str) -> None:
    thing = pkgutil.resolve_name(name)
    assert thing.__doc__, f"{name} has no docstring"
    if inspect.ismodule(thing):
        assert [member for member, it in public(thing) if not it.__doc__] == []
