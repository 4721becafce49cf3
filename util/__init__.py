"""What supports the scripts on top: files, checkpoints, command lines, processes, plots."""

import atexit
import os
import shutil
import sys
import tempfile

# The shell of a notebook tells matplotlib to draw in the notebook; its commands cannot do that.
if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)

# Libraries keep their caches at home, but a user of a container may have no name and no home.
if os.path.expanduser("~") == "~":
    os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
