"""The pytest plugin: `--nanhunt` watches every test, the marker `finite_gradients` one of them.

Pytest imports this file in every run of every project that has nanhunt installed, so nothing heavy
is imported before a test is to be watched.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nanhunt.records import Report

MARKER = "finite_gradients"
_ABOUT = (
    f"{MARKER}(required=True, allow=()): watch this test, with or without --nanhunt; it fails "
    f"where a loss, a gradient or a stepped parameter is not finite. What is born at an op, module "
    f"or call site in `allow` does not count; required=False leaves the test alone."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer `--nanhunt`."""
    parser.getgroup("nanhunt").addoption(
        "--nanhunt",
        action="store_true",
        help="fail tests whose losses, gradients or parameters become non-finite, and say why",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, also under --strict-markers."""
    config.addinivalue_line("markers", _ABOUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch the test, if it is to be watched."""
    marker = item.get_closest_marker(MARKER)
    if marker is None and not item.config.getoption("--nanhunt"):
        return (yield)
    wanted = _Wanted(*(marker.args if marker else ()), **(marker.kwargs if marker else {}))
    if not wanted.required:
        return (yield)
    return (yield from _watched(item, wanted))


class _Wanted:
    """The arguments of the marker; Python itself refuses what it does not know."""

    def __init__(self, required: bool = True, *, allow: Any = ()) -> None:  # noqa: FBT001, FBT002 - as users write it
        self.required, self.allow = required, allow


def _watched(item: pytest.Item, wanted: _Wanted) -> Generator[None, Any, Any]:
    """Run the test to its own end; a report of what was met there goes with its failure."""
    from nanhunt.guarding import detect
    from nanhunt.report.short import tell

    met: list[Report] = []
    try:
        with detect(on_culprit=met.append, allow=wanted.allow):
            result = yield
    except Exception:
        for report in met:
            item.add_report_section("call", "nanhunt", tell(report))
        raise
    if met:
        pytest.fail(f"nanhunt: {tell(met[0])}", pytrace=False)
    return result
