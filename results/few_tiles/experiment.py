"""Does pretraining pay on real images, when few of them have labels?

    python reproduce.py few_tiles --data QUARTERS --seeds 0 1 2 3 --jobs 2

The question of `few_labels` on the images of `tiles`: quarters of 512-pixel tiles of iSAID, 4,424
for training and 842 held out (see results/tiles for how they are made). Deformable DETR starts from
a detector of synthetic scenes, the row `start`. Its encoder is then pretrained on all 4,424 images
without labels, or it is not; the CNN is frozen meanwhile. The tasks are the two that were best in
the pilot of `few_labels`. Detection learns from the first 300 or 1,000 images with labels, CNN
included, and sees 6,000 images in both cases. Everything is in fp32. A seed takes about two hours
on one core.

The comparisons, four seeds and the measures (AP and AP50, after the last epoch and as the mean over
the evaluated epochs) were declared before the first run. With four seeds the exact p cannot fall
below 0.125, so the intervals are what this table can say.
"""

from util.experiments import start_from

TASKS = ["jigsaw-discrete", "mim-discrete"]
EPOCHS = {300: 20, 1000: 6}  # {labels: epochs}, 6,000 images each

detector = "@recipes/tiles_deformable_detr.txt --amp no --data {data} --init {start}"

rows = {"start": "--eval_every 7 --amp no"}
for task in TASKS:
    rows[f"pretrain-{task}"] = (
        f"{detector} --freeze backbone --setting pretrain --ssl_task {task} --ssl_on image"
        " --ssl_patch 32 --epochs 3 --eval_every 3"
    )
comparisons = []
for number, epochs in EPOCHS.items():
    labels = f"--limit_train {number} --epochs {epochs} --eval_every {epochs // 2}"
    rows[f"scratch-{number}"] = f"{detector} {labels}"
    for task in TASKS:
        encoder = start_from(f"pretrain-{task}", "encoder")
        rows[f"after-{task}-{number}"] = f"{detector} {encoder} {labels}"
        comparisons.append(("labels", f"after-{task}-{number}", f"scratch-{number}"))
interactions = []
for task in TASKS:
    few = (f"after-{task}-300", "scratch-300")
    many = (f"after-{task}-1000", "scratch-1000")
    interactions.append(("labels", few, many))
metrics = ["ap", "ap50"]
