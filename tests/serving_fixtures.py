"""A tiny checkpoint and its server, for the tests of serving."""

from collections.abc import Iterator

import pytest

from conftest import make_model
from dual_slm.training.serving.policy import Policy
from dual_slm.training.serving.server import Service, make_app
from served import make_service, running


@pytest.fixture(scope="session")
def serving_model(tiny_backbones):
    """A model of its own, which never ends a reply by itself."""
    model, processor = make_model(tiny_backbones, kind="letters")
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.fixture(scope="module")
def service(serving_model) -> Service:
    policy = Policy(max_bytes=600_000, max_seconds=6.0, max_clips=3, max_messages=6, max_characters=2_000)
    return make_service(*serving_model, policy)


@pytest.fixture(scope="module")
def server(service) -> Iterator[str]:
    with running(make_app(service)) as url:
        yield url
