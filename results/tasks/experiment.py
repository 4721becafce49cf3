"""Is every task learned, in both settings, with both detectors, on feature maps and on images?

40 rows with the demonstration's small models on synthetic scenes, and one for a CNN:

    python reproduce.py tasks --jobs 2

A row takes half a minute to two minutes. The four rows with `jigsaw-discrete` on the image take
longer, three to 25 minutes: where a patch came from is then told by its borders alone. They start
from the CNN of the row `backbone`, a detector.

The detection losses of DETR add up to about 20, so a task next to them needs a higher weight.
"""

from util.experiments import start_from

MODELS = ["detr", "deformable_detr"]
PLACES = ["features", "image"]  # what is corrupted
PIXEL_TASKS = ["reconstruct", "mim-continuous", "jigsaw-continuous"]
TASKS = ["reconstruct", "mim-continuous", "mim-discrete", "jigsaw-continuous"]

small = "@recipes/tasks_small.txt"
jigsaw = f"@recipes/tasks_jigsaw.txt {start_from('backbone', 'backbone')}"

rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr 5e-4 --lr_backbone 5e-4 --lr_linear_proj_mult 0.1 --batch_size 8 --lr_schedule cosine"
    " --amp no"
}

# ---------------------------------------------------------------- pretraining
for task in TASKS:
    for model in MODELS:
        for place in PLACES:
            rows[f"{model}-pretrain-{task}-{place}"] = (
                f"{small} --model {model} --setting pretrain --ssl_task {task} --ssl_on {place}"
            )
for model in MODELS:
    rows[f"{model}-pretrain-jigsaw-discrete-features"] = (
        f"{small} --model {model} --setting pretrain --ssl_task jigsaw-discrete --ssl_on features"
    )
rows["detr-pretrain-jigsaw-discrete-image"] = (
    f"{jigsaw} --model detr --dilation --setting pretrain --ssl_task jigsaw-discrete --ssl_on image"
)
rows["deformable_detr-pretrain-jigsaw-discrete-image"] = (
    f"{jigsaw} --model deformable_detr --setting pretrain --ssl_task jigsaw-discrete --ssl_on image"
)

# ---------------------------------------------------------------- multi-task learning
for task in PIXEL_TASKS:
    for place in PLACES:
        rows[f"detr-multitask-{task}-{place}"] = (
            f"{small} --model detr --setting multitask --ssl_weight 30"
            f" --ssl_task {task} --ssl_on {place} --epochs 4"
        )
for place in PLACES:
    rows[f"detr-multitask-mim-discrete-{place}"] = (
        f"{small} --model detr --setting multitask --ssl_weight 10"
        f" --ssl_task mim-discrete --ssl_on {place}"
    )
for task in TASKS:
    for place in PLACES:
        rows[f"deformable_detr-multitask-{task}-{place}"] = (
            f"{small} --model deformable_detr --setting multitask --ssl_weight 10"
            f" --ssl_task {task} --ssl_on {place}"
        )
for model in MODELS:
    rows[f"{model}-multitask-jigsaw-discrete-features"] = (
        f"{small} --model {model} --setting multitask --ssl_weight 10"
        " --ssl_task jigsaw-discrete --ssl_on features"
    )
rows["detr-multitask-jigsaw-discrete-image"] = (
    f"{jigsaw} --model detr --dilation --setting multitask --ssl_weight 30"
    " --ssl_task jigsaw-discrete --ssl_on image --epochs 16"
)
rows["deformable_detr-multitask-jigsaw-discrete-image"] = (
    f"{jigsaw} --model deformable_detr --setting multitask --ssl_weight 30"
    " --ssl_task jigsaw-discrete --ssl_on image --epochs 16"
)
