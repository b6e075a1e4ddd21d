"""Models that several tests share."""

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Returns `model(family)`."""
    import weight_sync_helpers as helpers

    made = {}

    def model(family):
        if family not in made:
            made[family] = helpers.Model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return model
