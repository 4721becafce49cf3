"""What tells a task on corrupted feature maps the answer without looking at the image's content?

Each task is trained on the feature maps of three CNNs, and on the image, before the CNN:

    resnet18           the plain CNN
    resnet18-circular  its borders wrap around, so that nothing tells where a cell is
    resnet18-patches   it sees each patch alone, so that nothing of a patch is in its neighbors

    python reproduce.py leaks --jobs 2

A row takes a minute or two.
"""

import results.leaks.backbones  # noqa: F401  (makes its CNNs known to --backbone)

program = ["-m", "results.leaks.train"]

TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
CNNS = ["resnet18", "resnet18-circular", "resnet18-patches"]

rows = {}
for task in TASKS:
    for cnn in CNNS:
        rows[f"{task}-features-{cnn}"] = (
            f"@recipes/leaks_common.txt --ssl_task {task} --backbone {cnn}"
        )
for task in TASKS:
    rows[f"{task}-image"] = f"@recipes/leaks_common.txt --ssl_task {task} --ssl_on image"
