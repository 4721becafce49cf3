"""Are the two gains that `scenes` found for DETR there with other seeds?

The two gains are those of pretraining with `jigsaw-discrete` and of multi-task learning with
`jigsaw-discrete` on feature maps. Both are repeated with ten other seeds on one kind of
processor. Nothing else is compared. All of this was declared before anything was run:

    for seed in 10 11 12 13 14 15 16 17 18 19; do python reproduce.py again --seeds $seed; done
"""

from util.experiments import start_from

detr = "@recipes/scenes_detr.txt"
pretrain = "@recipes/scenes_detr.txt @recipes/scenes_pretrain.txt"
cnn = start_from("backbone", "backbone")
encoder = start_from("detr-pretrain-jigsaw-discrete", "encoder")

rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr_schedule cosine --amp bf16",
    "detr-scratch": f"{detr} {cnn}",
    "detr-pretrain-jigsaw-discrete": f"{pretrain} {cnn} --ssl_task jigsaw-discrete",
    "detr-after-jigsaw-discrete": f"{detr} {cnn} {encoder}",
    "features-multitask-jigsaw-discrete": f"{detr} {cnn} --setting multitask"
    " --ssl_task jigsaw-discrete --ssl_patch 16",
}

comparisons = [
    ("detr", "detr-after-jigsaw-discrete", "detr-scratch"),
    ("detr", "features-multitask-jigsaw-discrete", "detr-scratch"),
]
