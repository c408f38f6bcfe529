import pytest

from tests.faults.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory, llama_folder, rows_file) -> Lab:
    """Makes jobs and keeps the oracles."""
    return Lab(tmp_path_factory.mktemp("lab"), llama_folder, rows_file)
