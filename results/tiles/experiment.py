"""Does a self-supervised task help on real images?

    python reproduce.py tiles --data DATA --jobs 2

The images are patches of iSAID with 256 x 256 pixels, few of which hold more objects than the
model has queries. The published results are from quarters of 512-pixel tiles, without those that
hold no object (results/tiles/quarters.py and README.md). From the raw images of iSAID, python
isaid.py prepare RAW DATA --patch 256 --overlap 0 makes such patches. DATA may also be any other
dataset in a layout that isaid.py reads.

Deformable DETR is trained with and without multi-task reconstruction, the authors' v1 and v0. A
detector of synthetic scenes, the row `start`, replaces their COCO model. DETR starts from the
frozen CNN of that v0, alone and in the two settings that gained most in `scenes`.

The comparisons were declared after trials of learning rates and numbers of epochs, and before
the published runs. They are made for two measures, the AP after the last epoch and its mean over
the evaluated epochs, paired by seed; each measure is corrected for multiple comparisons by
itself, within a family. In the trials DETR stayed at AP50 0.6 to 3.3 % for 12,000 to 27,000
images.
"""

from util.experiments import start_from

deformable_detr = "@recipes/tiles_deformable_detr.txt --data {data} --init {start}"
cnn = start_from("deformable_detr-v0", "backbone")
detr = "@recipes/tiles_detr.txt --data {data} " + cnn
encoder = start_from("detr-pretrain-jigsaw-discrete", "encoder")

rows = {
    "start": "--eval_every 7 --amp bf16",
    "deformable_detr-v0": deformable_detr,
    "deformable_detr-v1": f"{deformable_detr} --setting multitask --ssl_task reconstruct"
    " --ssl_weight 0.1",
    "detr-scratch": detr,
    "detr-pretrain-jigsaw-discrete": f"{detr} --setting pretrain --ssl_task jigsaw-discrete"
    " --ssl_on image --ssl_patch 32",
    "detr-after-jigsaw-discrete": f"{detr} {encoder}",
    "features-multitask-jigsaw-discrete": f"{detr} --setting multitask"
    " --ssl_task jigsaw-discrete --ssl_patch 32",
}

comparisons = [
    ("deformable_detr", "deformable_detr-v1", "deformable_detr-v0"),
    ("detr", "detr-after-jigsaw-discrete", "detr-scratch"),
    ("detr", "features-multitask-jigsaw-discrete", "detr-scratch"),
]
