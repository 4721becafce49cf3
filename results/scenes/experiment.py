"""Does a self-supervised task speed up the first epochs of detection? The paper in miniature.

The rows are those of `paper` on small synthetic scenes, for two cores. A run takes one to two
minutes on one core with bf16 instructions:

    for seed in 0 1 2 3 4 5 6 7 8 9; do python reproduce.py scenes --seeds $seed --jobs 2; done

As in the authors' code: the image is corrupted, half of its patches; a patch is a cell of DETR's
feature map; the encoder is random at the start of pretraining; the CNN comes from a detector
(theirs from DETR trained on COCO, ours from the row `backbone`); a task has weight 1 next to
DETR's losses, which are those of the last decoder layer only, and weight 0.1 next to those of
Deformable DETR.

Different from the authors' code: the bugs in their losses and masks are fixed
(docs/differences.md); the CNN is frozen (training it took four times as long); the learning rate
rises and falls (one cycle); images are flipped; visual tokens come from k-means; pretraining uses
no larger batches and no crops; Deformable DETR starts from the CNN alone and has the form of the
demonstration (three feature levels, box refinement).

The comparisons were declared before anything was run. They are made for two measures, the AP
after the last epoch and its mean over the evaluated epochs, paired by seed; each measure is
corrected for multiple comparisons by itself, within a family.

Primary families, the paper's three claims:

    detr             pretraining and multi-task learning against detection from scratch
    deformable_detr  multi-task reconstruction (the authors' v1) against detection (their v0)

Secondary families, not in the paper:

    other            other tasks with Deformable DETR
    aux              DETR with auxiliary losses
    features         corruption of feature maps against detection from scratch
    place            corruption of feature maps against corruption of the image; declared after
                     the primary runs and before its own

Processors round sums differently, and the CNN of a seed differs with them, so all runs of a
family are from one kind of processor. The families `aux` and `other` were run on a different
kind from the rest. That is why `other` has a v0 of its own; it was added while its family was
running, before any result had been seen.
"""

from util.experiments import start_from

PRETRAIN_TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
MULTITASK_TASKS = ["reconstruct", "mim-continuous", "jigsaw-continuous", "jigsaw-discrete"]
TASKS_IN_BOTH = ["mim-continuous", "jigsaw-continuous", "jigsaw-discrete"]

detr = "@recipes/scenes_detr.txt"
pretrain = "@recipes/scenes_detr.txt @recipes/scenes_pretrain.txt"
deformable_detr = "@recipes/scenes_deformable_detr.txt"
cnn = start_from("backbone", "backbone")

# ---------------------------------------------------------------- rows
rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr_schedule cosine --amp bf16"
}

# The paper's three claims.
rows["detr-scratch"] = f"{detr} {cnn}"
for task in PRETRAIN_TASKS:
    rows[f"detr-pretrain-{task}"] = f"{pretrain} {cnn} --ssl_task {task}"
for task in PRETRAIN_TASKS:
    encoder = start_from(f"detr-pretrain-{task}", "encoder")
    rows[f"detr-after-{task}"] = f"{detr} {cnn} {encoder}"
for task in MULTITASK_TASKS:
    multitask = f"--setting multitask --ssl_task {task} --ssl_on image --ssl_patch 16"
    rows[f"detr-multitask-{task}"] = f"{detr} {cnn} {multitask}"
rows["deformable_detr-v0"] = f"{deformable_detr} {cnn}"
rows["deformable_detr-v1"] = (
    f"{deformable_detr} {cnn} --setting multitask --ssl_task reconstruct --ssl_weight 0.1"
)

# Other tasks with Deformable DETR.
rows["other-v0"] = f"{deformable_detr} {cnn}"
for task in PRETRAIN_TASKS:
    multitask = f"--setting multitask --ssl_task {task} --ssl_on image --ssl_patch 16"
    rows[f"other-multitask-{task}"] = f"{deformable_detr} {cnn} {multitask} --ssl_weight 0.1"

# DETR with auxiliary losses.
rows["aux-scratch"] = f"{detr} --aux_loss {cnn}"
for task in PRETRAIN_TASKS:
    encoder = start_from(f"detr-pretrain-{task}", "encoder")
    rows[f"aux-after-{task}"] = f"{detr} --aux_loss {cnn} {encoder}"
for task in MULTITASK_TASKS:
    multitask = f"--setting multitask --ssl_task {task} --ssl_on image --ssl_patch 16"
    rows[f"aux-multitask-{task}"] = f"{detr} --aux_loss {cnn} {multitask}"

# Corruption of feature maps.
for task in PRETRAIN_TASKS:
    rows[f"features-pretrain-{task}"] = f"{pretrain} {cnn} --ssl_task {task} --ssl_on features"
for task in PRETRAIN_TASKS:
    encoder = start_from(f"features-pretrain-{task}", "encoder")
    rows[f"features-after-{task}"] = f"{detr} {cnn} {encoder}"
for task in PRETRAIN_TASKS:
    multitask = f"--setting multitask --ssl_task {task} --ssl_patch 16"
    rows[f"features-multitask-{task}"] = f"{detr} {cnn} {multitask}"

# ---------------------------------------------------------------- comparisons
comparisons = []
for task in PRETRAIN_TASKS:
    comparisons.append(("detr", f"detr-after-{task}", "detr-scratch"))
for task in MULTITASK_TASKS:
    comparisons.append(("detr", f"detr-multitask-{task}", "detr-scratch"))
comparisons.append(("deformable_detr", "deformable_detr-v1", "deformable_detr-v0"))
for task in PRETRAIN_TASKS:
    comparisons.append(("other", f"other-multitask-{task}", "other-v0"))
for task in PRETRAIN_TASKS:
    comparisons.append(("aux", f"aux-after-{task}", "aux-scratch"))
for task in MULTITASK_TASKS:
    comparisons.append(("aux", f"aux-multitask-{task}", "aux-scratch"))
for task in PRETRAIN_TASKS:
    comparisons.append(("features", f"features-after-{task}", "detr-scratch"))
for task in PRETRAIN_TASKS:
    comparisons.append(("features", f"features-multitask-{task}", "detr-scratch"))
for task in PRETRAIN_TASKS:
    comparisons.append(("place", f"features-after-{task}", f"detr-after-{task}"))
for task in TASKS_IN_BOTH:
    comparisons.append(("place", f"features-multitask-{task}", f"detr-multitask-{task}"))
