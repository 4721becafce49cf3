"""What supports the scripts on top: files, checkpoints, command lines, processes, plots."""
