"""Data loading processes that cannot do their work as usual: the batches arrive, or a line does."""

import os
import tempfile
from multiprocessing import process

import pytest
import torch

import isaid

resource = pytest.importorskip("resource")  # Windows has no such limits


# ---------------------------------------------------------------- what a process lacks
def open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def short_name_for_a_socket():
    tempfile.tempdir = tempfile.mkdtemp(prefix=100 * "x", dir=os.environ["TEST_FOLDER"])
    process.current_process()._config.pop("tempdir", None)


class Lacking(torch.utils.data.Dataset):
    """Images and boxes; the process that loads one does without something from then on."""

    def __init__(self, lack=None, more=None):
        self.lack = lack
        self.more = more

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if self.lack:
            self.lack()
        boxes = torch.full((2000, 4), i)  # as many as need shared memory, and few
        return torch.full((3, 99, 100), 0.5 + i), {"boxes": boxes, "few": boxes[:2], "x": self.more}


@pytest.mark.parametrize("lack", [None, open_files, shared_memory, short_name_for_a_socket])
def test_batches_arrive(lack, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    options = {"batch_size": 2, "timeout": 60}
    num_targets = 0
    for images, padding, targets in isaid.data_loader(Lacking(lack), 2, **options):
        assert images.shape == (2, 3, 99, 100)
        assert not padding.any()
        for image, target in zip(images, targets):
            assert (image == 0.5 + num_targets).all()
            assert target["boxes"].shape == (2000, 4)
            assert (target["boxes"] == num_targets).all()
            assert (target["few"] == num_targets).all()
            num_targets += 1
    assert num_targets == 4


class Unsendable:
    def __reduce__(self):
        raise MemoryError


def test_a_batch_that_cannot_be_sent_is_not_waited_for(capfd):
    loader = isaid.data_loader(Lacking(more=Unsendable()), 1, batch_size=2, timeout=60)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iter(loader))
    assert capfd.readouterr().err == "a batch could not be sent: MemoryError: MemoryError()\n"
