"""Does a task gain more than detection alone that trains for as long?

    python reproduce.py equal_time --seeds 30 31 32 33 34 35 36 37 38 39 --jobs 2

The two gains that `again` replicated, with its rows, but in fp32: pretraining with
`jigsaw-discrete`, and multi-task learning with it on feature maps. Each is compared with detection
alone for the same number of epochs (as in `again`), and for as long by two measures, both declared
before the first run:

    images   pretraining: 7,500 images pass CNN and encoder in addition to detection's 12,000, as
             many as in 13 epochs of detection. Multi-task learning: its 12,000 images pass the CNN
             once and the encoder twice, as many passes of the encoder as in 16 epochs of detection.
    seconds  by the seconds of training in `again`, the pretraining takes as long as 4.4 epochs of
             detection, so 13 epochs, the same row; multi-task learning as long as 9.4, so 10
             epochs. Both are rounded up, in favor of detection alone.

The seconds that the runs themselves took are in the table of costs. Only the AP after the last
epoch is compared if the numbers of epochs differ.
"""

from util.experiments import start_from

detr = "@recipes/scenes_detr.txt --amp no"
cnn = start_from("backbone", "backbone")
encoder = start_from("detr-pretrain-jigsaw-discrete", "encoder")

rows = {
    "backbone": "--image_size 64 --num_queries 6 --limit_train 1000 --epochs 6 --eval_every 6"
    " --lr_schedule cosine --amp no",
    "detr-scratch": f"{detr} {cnn}",
    "detr-scratch-10": f"{detr} {cnn} --epochs 10 --eval_every 5",
    "detr-scratch-13": f"{detr} {cnn} --epochs 13 --eval_every 13",
    "detr-scratch-16": f"{detr} {cnn} --epochs 16 --eval_every 8",
    "detr-pretrain-jigsaw-discrete": f"{detr} @recipes/scenes_pretrain.txt {cnn}"
    " --ssl_task jigsaw-discrete",
    "detr-after-jigsaw-discrete": f"{detr} {cnn} {encoder}",
    "features-multitask-jigsaw-discrete": f"{detr} {cnn} --setting multitask"
    " --ssl_task jigsaw-discrete --ssl_patch 16",
}

comparisons = [
    ("epochs", "detr-after-jigsaw-discrete", "detr-scratch"),
    ("epochs", "features-multitask-jigsaw-discrete", "detr-scratch"),
    ("time", "detr-after-jigsaw-discrete", "detr-scratch-13"),
    ("time", "features-multitask-jigsaw-discrete", "detr-scratch-10"),
    ("time", "features-multitask-jigsaw-discrete", "detr-scratch-16"),
]
costs = [(row, baseline) for _, row, baseline in comparisons]
