"""Test processes side by side (-n 2) get a thread each: threads that share cores wait for each
other. Read by OpenMP as torch is loaded, so before any test is imported."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MPLBACKEND", None)  # of a notebook, whose backend may not be installed here


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(request):
    """Commands under test see no GPU, but in the tests of one: only a CPU repeats its bits."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_deformable_attn", "test_gpu"):
            patch.setattr("torch.cuda.is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
