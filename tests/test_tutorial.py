"""What the notebooks need of the machine: whether ImageNet weights can be had."""

import socket

import pytest
import torchvision

from tutorial import imagenet_weights


@pytest.fixture
def offline(monkeypatch) -> None:
    """A machine on which no weights can be downloaded, and which waits ten seconds for them."""

    def get_model(arch, weights):
        assert socket.getdefaulttimeout() == 10
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


def test_without_a_network_one_trains_from_scratch_unless_one_insists(offline):
    assert imagenet_weights("resnet18") is False
    assert socket.getdefaulttimeout() is None, "other downloads wait as they did"
    with pytest.raises(ConnectionError, match="no weights for resnet18"):
        imagenet_weights("resnet18", "yes")
    assert socket.getdefaulttimeout() is None


def test_weights_that_can_be_had_are_used_if_they_are_wanted(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda arch, weights: None)
    assert imagenet_weights("resnet18") and imagenet_weights("resnet18", "yes")
    assert not imagenet_weights("resnet18", "no")


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="PRETRAINED is"):
        imagenet_weights("resnet18", "maybe")
