"""The pilot of `few_labels`: which learning rates, how many images, which task?

    python reproduce.py few_labels/pilot --seeds 100 101 --jobs 2

Its seeds are used nowhere else. Its results are not part of any comparison. They chose 5e-4 for
every rate, 9,000 images for detection, and `jigsaw-discrete` for the rows with one task only.
"""

from util.experiments import start_from

PRETRAIN_TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
FORM = "--freeze backbone --image_size 64 --num_queries 6 --batch_size 16"
FORM += " --lr_schedule cosine --amp no"

cnn = start_from("backbone", "backbone")
detr = f"--model detr --dilation --no-aux_loss {FORM} {cnn}"
pretrain = "--setting pretrain --ssl_on image --ssl_patch 16"
pretrain += " --limit_train 5000 --epochs 4 --eval_every 4"
labels_300 = "--limit_train 300 --epochs 30 --eval_every 5"

rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr_schedule cosine --amp no --scene_seed 777",
    "detr-scratch-100": f"{detr} --limit_train 100 --epochs 90 --eval_every 15 --lr 5e-4",
    "detr-scratch-300": f"{detr} {labels_300} --lr 5e-4",
    "detr-scratch-300-fast": f"{detr} {labels_300} --lr 1e-3",
    "detr-scratch-300-long": f"{detr} --limit_train 300 --epochs 97 --eval_every 16 --lr 5e-4",
}

# The four tasks, two of them also with a higher rate.
rates = [(task, "5e-4") for task in PRETRAIN_TASKS]
rates += [("jigsaw-discrete", "1e-3"), ("mim-continuous", "1e-3")]
for task, rate in rates:
    name = f"{task}-{rate}"
    rows[f"detr-pretrain-{name}"] = f"{detr} {pretrain} --ssl_task {task} --lr {rate}"
    encoder = start_from(f"detr-pretrain-{name}", "encoder")
    rows[f"detr-after-{name}-300"] = f"{detr} {encoder} {labels_300} --lr 5e-4"
