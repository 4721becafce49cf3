"""Gradients of one step over the same four images, two of them without objects, in one process or several: see test_parallel.py.

    python tests/gradients.py FOLDER ACCUMULATE        or under torchrun; writes FOLDER/gradients.pt, {kind: {parameter: gradient}}
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import parallel
import train

TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32", "--num_queries", "8",
        "--image_size", "64", "--limit_train", "40", "--limit_val", "2", "--clip_max_norm", "1e9", "--vocabulary", "4", "--ssl_patch", "16"]
KINDS = {"detect": [], "two-stage": ["--two_stage"], "detr": ["--model", "detr"],
         "pretrain": ["--setting", "pretrain", "--ssl_task", "mim-continuous"],
         **{task: ["--setting", "multitask", "--ssl_task", task, "--ssl_on", on] for task, on in (
             ("reconstruct", "features"), ("mim-continuous", "image"), ("mim-discrete", "features"), ("jigsaw-continuous", "features"),
             ("jigsaw-discrete", "image"))}}


def of_one_step(flags, out, accumulate):
    used = [flag for i, flag in enumerate(TINY) if "--vocabulary" not in TINY[max(0, i - 1):i + 1] or "mim-discrete" in flags]
    used = [flag for i, flag in enumerate(used) if "--ssl_patch" not in used[max(0, i - 1):i + 1] or "--setting" in flags]
    size = 4 // accumulate // parallel.world()
    args = train.parse([*used, *flags, "--out", str(out), "--batch_size", str(size), "--accumulate", str(accumulate)])
    torch.manual_seed(0)
    _, run, data, _, _ = train.prepare(args)
    full, empty = ([i for i, labels in enumerate(data.labels) if bool(len(labels)) == wanted][:2] for wanted in (True, False))
    order = full + empty
    batches = [order[i:i + size] for i in range(0, 4, size)]
    train.epoch_batches = lambda *_: batches[parallel.rank()::parallel.world()]
    learner = train.Learner(run.model, run.task, args)
    if parallel.world() > 1:
        learner = torch.nn.parallel.DistributedDataParallel(learner)
    run.model.eval()  # no statistics of a batch, which differ between its parts
    (step,) = train.steps_of(train.epoch_loader(data, args, 1), run.task, args)
    sums = train.take_step(learner, step, run, args)
    losses = {name: value / parallel.world() for name, value in parallel.total({k: float(v) for k, v in sums.items()}).items()}
    return {**{name: p.grad for name, p in learner.named_parameters() if p.requires_grad}, "losses": losses}


if __name__ == "__main__":
    folder, accumulate = Path(sys.argv[1]), int(sys.argv[2])
    parallel.start("cpu")
    found = {kind: of_one_step(flags, folder / kind, accumulate) for kind, flags in KINDS.items()}
    if parallel.rank() == 0:
        torch.save(found, folder / "gradients.pt")
