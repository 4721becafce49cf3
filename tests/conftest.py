"""Test processes side by side (-n 2) get a thread each: threads that share cores wait for each
other. Read by OpenMP as torch is loaded, so before any test is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
