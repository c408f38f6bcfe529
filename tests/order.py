"""The order of tests in a run of several processes."""

import os

import pytest


@pytest.hookimpl(trylast=True)  # after the tests that -m and -k leave out are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (minutes := _minutes(item)) is not None:
            item.add_marker(pytest.mark.timeout(60 * max(30, 5 * minutes)))
    n_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if n_processes > 1:
        items[:] = deal(items, n_processes)


def _minutes(item: pytest.Item) -> float | None:
    """How long a slow test takes, if its marker says so."""
    marker = item.get_closest_marker("slow")
    return marker and marker.kwargs.get("minutes", 0)


def deal(items: list[pytest.Item], n_processes: int) -> list[pytest.Item]:
    """Return the tests so that each process begins with its share of the slow ones, the longest first.

    `--dist worksteal` gives each process one slice of the list. One that is done takes half of what another has left,
    from its end, but never the test that runs and the next one; so a quick test follows each long one.
    """
    slow = sorted((item for item in items if _minutes(item) is not None), key=_minutes, reverse=True)
    quick = [item for item in items if _minutes(item) is None]
    ordered: list[pytest.Item] = []
    for i in range(n_processes):
        size = (len(items) - len(ordered)) // (n_processes - i)  # as worksteal cuts the list
        own = slow[n_processes - 1 - i :: n_processes]  # later slices may be longer by one
        part = []
        for item in own:
            part.append(item)
            if _minutes(item) and quick:
                part.append(quick.pop())
        n_quick = max(size - len(part), 0)
        ordered += part + quick[:n_quick]
        quick = quick[n_quick:]
    return ordered + quick
