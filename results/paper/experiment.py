"""The tables of the paper (arXiv 2205.05543) on iSAID, for GPUs.

    python reproduce.py paper --data DIR

DIR holds the patches that python isaid.py prepare makes. The settings are those of the authors'
code, with its bugs fixed (docs/differences.md). The authors corrupt the image, not feature maps.

Both detectors start from the official COCO models, which are downloaded. Of Deformable DETR, v0 is
detection, v1 is multi-task learning with reconstruction.

The visual tokens are those of DALL-E: save https://cdn.openai.com/dall-e/encoder.pkl as
weights/encoder.pkl.

Until their revision a45563a the authors pretrained on ImageNet, with the CNN frozen. The rows
imagenet-* do so: link the images of ImageNet as data/imagenet, or leave these rows out with
`--rows detr-` (rows with "detr-" in their name, which are those of DETR and Deformable DETR).

Two kinds of rows are absent, because the authors have none: their multi-task learning cannot run
with mim-discrete, and Deformable DETR after pretraining exists in neither of their repositories.

`authors` holds the authors' curves: AP in %, one seed each, from their notebook, where it is
printed or read off the plots. AP50 is printed too: of v0 26.1 30.6 35.9 36.1 37.5 and of v1
26.7 30.8 35.3 34.9 38.4 after the first five epochs. Their best values are, of v0, AP 40.7 and
AP50 62.2 in 99 epochs, and of v1 AP 28.2 and AP50 48.3 in 25 epochs. Curves of DETR are not
available.
"""

from util.experiments import start_from

TASKS = ["mim-continuous", "mim-discrete", "jigsaw-continuous", "jigsaw-discrete"]
TASKS_WITHOUT_TOKENS = ["mim-continuous", "jigsaw-continuous", "jigsaw-discrete"]
MULTITASK_TASKS = ["reconstruct", "mim-continuous", "jigsaw-continuous", "jigsaw-discrete"]

coco = "--init detr-r50"
coco_cnn = f"{coco} --init_parts backbone"
dalle = "--tokenizer_weights weights/encoder.pkl"

detr = "@recipes/paper_detr.txt --data {data}"
pretrain = "@recipes/paper_detr.txt @recipes/paper_pretrain.txt --data {data}"
pretrain_on_imagenet = (
    "@recipes/paper_detr.txt @recipes/paper_pretrain.txt --data data/imagenet --freeze backbone"
)
deformable_detr = "@recipes/paper_deformable_detr.txt --data {data} --init deformable-detr"

# ---------------------------------------------------------------- rows
rows = {}
rows["detr-coco"] = f"{detr} {coco}"
rows["detr-cnn"] = f"{detr} {coco_cnn}"
for task in TASKS_WITHOUT_TOKENS:
    rows[f"detr-pretrain-{task}"] = f"{pretrain} --ssl_task {task} {coco_cnn}"
rows["detr-pretrain-mim-discrete"] = f"{pretrain} --ssl_task mim-discrete {coco_cnn} {dalle}"
for task in TASKS:
    encoder = start_from(f"detr-pretrain-{task}", "encoder")
    rows[f"detr-after-{task}"] = f"{detr} {coco_cnn} {encoder}"
for task in MULTITASK_TASKS:
    rows[f"detr-multitask-{task}"] = (
        f"{detr} {coco_cnn} --setting multitask --ssl_task {task}"
        " --ssl_on image --ssl_patch 32 --ssl_ratio 0.5 --ssl_weight 1"
    )

rows["deformable_detr-v0"] = f"{deformable_detr} --epochs 100"
rows["deformable_detr-v1"] = (
    f"{deformable_detr} --epochs 25"
    " --setting multitask --ssl_task reconstruct --ssl_patch 8 --ssl_weight 0.1"
)

for task in TASKS_WITHOUT_TOKENS:
    rows[f"imagenet-pretrain-{task}"] = f"{pretrain_on_imagenet} --ssl_task {task} {coco_cnn}"
rows["imagenet-pretrain-mim-discrete"] = (
    f"{pretrain_on_imagenet} --ssl_task mim-discrete {coco_cnn} {dalle}"
)
for task in TASKS:
    encoder = start_from(f"imagenet-pretrain-{task}", "encoder")
    rows[f"imagenet-after-{task}"] = f"{detr} {coco_cnn} {encoder}"

# ---------------------------------------------------------------- comparisons
comparisons = []
for task in TASKS:
    comparisons.append(("detr", f"detr-after-{task}", "detr-cnn"))
for task in MULTITASK_TASKS:
    comparisons.append(("detr", f"detr-multitask-{task}", "detr-cnn"))
for task in TASKS:
    comparisons.append(("detr", f"imagenet-after-{task}", "detr-cnn"))
comparisons.append(("deformable_detr", "deformable_detr-v1", "deformable_detr-v0"))

# ---------------------------------------------------------------- the authors' curves
# fmt: off
authors = {  # {epoch: AP in %}
    "deformable_detr-v0, printed": {
        1: 13.6, 2: 16.2, 3: 20.4, 4: 19.5, 5: 21.7, 95: 40.6, 96: 40.5, 97: 40.6, 98: 40.6,
        99: 40.7,
    },
    "deformable_detr-v0, read off": {
        6: 22.5, 7: 23.5, 8: 23.4, 9: 23.3, 10: 25.1, 11: 24.6, 12: 25.5, 13: 25.3, 14: 26.0,
        15: 27.3, 16: 26.5, 17: 27.5, 18: 26.8, 19: 26.3, 20: 28.3, 21: 28.0, 22: 28.1, 23: 28.8,
        24: 28.0, 25: 28.5, 29: 28.9, 31: 30.3, 33: 30.6, 35: 24.8, 38: 30.7, 40: 28.2, 41: 34.6,
        46: 37.6, 51: 38.5, 61: 38.9, 71: 39.5, 81: 40.3, 91: 40.5,
    },
    "deformable_detr-v1, printed": {
        1: 14.4, 2: 16.6, 3: 16.9, 4: 18.9, 5: 21.7,
    },
    "deformable_detr-v1, read off": {
        6: 21.9, 7: 21.9, 8: 20.8, 9: 23.6, 10: 22.7, 11: 25.1, 12: 23.2, 13: 20.4, 14: 25.9,
        15: 25.6, 16: 24.0, 17: 27.0, 18: 28.1, 19: 27.0, 20: 25.7, 21: 27.9, 22: 24.3, 23: 27.5,
        24: 26.6, 25: 26.8,
    },
}
# fmt: on
