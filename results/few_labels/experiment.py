"""Does pretraining pay when few images have labels?

    python reproduce.py few_labels --seeds 20 21 22 23 24 25 26 27 28 29 --jobs 2

DETR as in `scenes`: the images are corrupted, the CNN is frozen and comes from a detector, there
are no auxiliary losses. The encoder is pretrained on 5,000 scenes without labels (20,000 images
pass it). Detection then learns from the first 100, 300 or 1,000 of these scenes with labels. It
sees 9,000 images at each size, so only the number of different labels varies.

Unlike in `scenes`, the CNN's detector was trained on other scenes (--scene_seed): a CNN that has
seen the labels of 1,000 scenes would know more than the rows with 100 labels are meant to.
Everything is in fp32. A run takes two to four minutes on one core; a seed takes about an hour.

Everything below was written down after the pilot (results/few_labels/pilot, seeds 100 and 101,
which are used nowhere else) and before the first run: the rows, the comparisons, the ten seeds and
the measures. These are the AP after the last epoch and, where both rows are evaluated at the same
epochs, its mean over the evaluated epochs. Differences are paired by seed, and Holm's correction is
within a family and a measure.

    labels           each task against detection from scratch, at each number of labels (primary)
    deformable_detr  the same with Deformable DETR and one task, at 100 and 1,000 labels
    passes           the same task against detection alone that sees as many images (29,000) as
                     pretraining and detection together
    unlabeled        pretraining on fewer or more different scenes, or for a quarter of the passes,
                     against 5,000 scenes; 1,000 labels

The interactions ask whether a gain is larger with 100 labels than with 1,000. Processors round sums
differently, so all rows of a seed are from one kind of processor.
"""

from util.experiments import start_from

TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
BEST_TASK = "jigsaw-discrete"  # in the pilot
EPOCHS = {100: 90, 300: 30, 1000: 9}  # {labels: epochs}, 9,000 images each
LONG_EPOCHS = {100: 290, 1000: 29}  # 29,000 images each

form = "--freeze backbone --image_size 64 --num_queries 6 --batch_size 16 --lr 5e-4"
form += " --lr_schedule cosine --amp no"
cnn = start_from("backbone", "backbone")
detr = f"--model detr --dilation --no-aux_loss {form} {cnn}"
deformable_detr = f"--model deformable_detr {form} {cnn}"
pretrain = "--setting pretrain --ssl_on image --ssl_patch 16"


def labels(number, epochs):
    """Return the flags of detection with this number of labels, evaluated three times."""
    return f"--limit_train {number} --epochs {epochs} --eval_every {epochs // 3}"


def unlabeled(number, epochs):
    """Return the flags of a pretraining on this number of scenes, evaluated once."""
    return f"--limit_train {number} --epochs {epochs} --eval_every {epochs}"


# ---------------------------------------------------------------- rows
rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr_schedule cosine --amp no --scene_seed 777"
}
comparisons = []
interactions = []

# DETR, from scratch and after each task.
for number, epochs in EPOCHS.items():
    rows[f"detr-scratch-{number}"] = f"{detr} {labels(number, epochs)}"
for task in TASKS:
    row = f"detr-pretrain-{task}"
    rows[row] = f"{detr} {pretrain} {unlabeled(5000, 4)} --ssl_task {task}"
    encoder = start_from(row, "encoder")
    for number, epochs in EPOCHS.items():
        rows[f"detr-after-{task}-{number}"] = f"{detr} {encoder} {labels(number, epochs)}"
for number in EPOCHS:
    for task in TASKS:
        comparisons.append(("labels", f"detr-after-{task}-{number}", f"detr-scratch-{number}"))
for task in TASKS:
    few = (f"detr-after-{task}-100", "detr-scratch-100")
    many = (f"detr-after-{task}-1000", "detr-scratch-1000")
    interactions.append(("labels", few, many))

# Detection alone, for as many images.
for number, epochs in LONG_EPOCHS.items():
    rows[f"detr-long-{number}"] = f"{detr} {labels(number, epochs)}"
    comparisons.append(("passes", f"detr-after-{BEST_TASK}-{number}", f"detr-long-{number}"))

# Deformable DETR.
row = f"deformable_detr-pretrain-{BEST_TASK}"
rows[row] = f"{deformable_detr} {pretrain} {unlabeled(5000, 4)} --ssl_task {BEST_TASK}"
encoder = start_from(row, "encoder")
for number in (100, 1000):
    flags = f"{deformable_detr} {labels(number, EPOCHS[number])}"
    scratch = f"deformable_detr-scratch-{number}"
    after = f"deformable_detr-after-{BEST_TASK}-{number}"
    rows[scratch] = flags
    rows[after] = f"{flags} {encoder}"
    comparisons.append(("deformable_detr", after, scratch))
few = (f"deformable_detr-after-{BEST_TASK}-100", "deformable_detr-scratch-100")
many = (f"deformable_detr-after-{BEST_TASK}-1000", "deformable_detr-scratch-1000")
interactions.append(("deformable_detr", few, many))

# The number of unlabeled scenes: about 20,000 passes, and 5,000.
for name, number, epochs in (("1500", 1500, 13), ("20000", 20000, 1), ("quarter", 5000, 1)):
    row = f"unlabeled-pretrain-{name}"
    rows[row] = f"{detr} {pretrain} {unlabeled(number, epochs)} --ssl_task {BEST_TASK}"
    encoder = start_from(row, "encoder")
    after = f"unlabeled-after-{name}"
    rows[after] = f"{detr} {encoder} {labels(1000, EPOCHS[1000])}"
    comparisons.append(("unlabeled", after, f"detr-after-{BEST_TASK}-1000"))
