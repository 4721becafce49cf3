"""Time training steps and inference of both detectors, in one process on the same data.

    python bench.py                     next to transformers'
    python bench.py --multitask         a multi-task step (mim-continuous) next to a detection step

Everywhere: ResNet-50, official sizes, random weights, fp32, 10 objects an image, AdamW; ours as
train.py runs it. What is compared takes turns, so that a change of the machine's speed meets all;
printed are medians and the ratio of the medians.
"""

import parallel  # isort: skip (before torch)

import re
import statistics
import time

import torch

import detr
import train
from coco import Parser, number


def ours(name, args, setting="detect", on="features"):
    """(model, loss, inference) of ours, the last two of (images, padding, targets)."""
    flags = f"--setting {setting} --ssl_on {on} --hidden_dim 256 --device {args.device}".split()
    flags, model = train.parse(flags)[0], detr.build_detector(name, 15)
    task, _ = train.build_task(flags, model.strides, None)
    model.to(args.device, memory_format=torch.channels_last)
    weights = {**model.criterion.weights, "loss_ssl": 1.0}

    def loss(*batch):
        losses = train.compute_losses(model, task, *batch, flags)
        return sum(weights[name] * values.sum() for name, values in losses.items())

    def infer(images, padding, targets):
        return model.postprocess(model(images, padding), [images.shape[-2:]] * len(images))

    return model, loss, infer


def theirs(name, args):
    """The same of transformers' implementation."""
    import transformers

    kind = {"detr": "Detr", "deformable_detr": "DeformableDetr"}[name]
    stages = ["stage4"] if name == "detr" else ["stage2", "stage3", "stage4"]
    resnet = transformers.ResNetConfig(layer_type="bottleneck", out_features=stages)
    config = getattr(transformers, f"{kind}Config")(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=15,
        backbone_config=resnet, auxiliary_loss=True, dropout=0.1, attention_dropout=0.1,
        activation_dropout=0.1)  # fmt: skip
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).to(args.device)
    for parameter_name, parameter in model.named_parameters():  # it freezes the whole backbone
        if re.search(r"backbone.*stages\.[123].*convolution", parameter_name):
            parameter.requires_grad_(True)

    def loss(images, padding, targets):
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        labels = [{key: x.to(args.device) for key, x in label.items()} for label in labels]
        return model(pixel_values=images, pixel_mask=(~padding).long(), labels=labels).loss

    def infer(images, padding, targets):
        outputs = model(pixel_values=images, pixel_mask=(~padding).long())
        return outputs.logits.sigmoid().flatten(1).topk(100)

    return model, loss, infer


def training_step(model, loss, infer, fused=True):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=fused)

    def step(*batch):
        model.train()
        optimizer.zero_grad()
        loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    return step


def inference(model, loss, infer):
    def look(*batch):
        model.eval()
        with torch.no_grad():
            infer(*batch)

    return look


def report(name, functions, batch, args):
    """Print median seconds of each function after a round to warm up, and ratios to the first."""
    times = {what: [] for what in functions}
    for _ in range(args.repeats + 1):
        for what, function in functions.items():
            start = time.perf_counter()
            function(*batch)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            times[what].append(time.perf_counter() - start)
    first, *_ = medians = {what: statistics.median(x[1:]) for what, x in times.items()}
    for what, seconds in medians.items():
        ratio = seconds / medians[first]
        print(f"{name:16} {what:28} {seconds:8.3f} s {ratio:6.2f}", flush=True)


def main():
    parser, count = Parser(description=__doc__), number(int)
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--multitask", action="store_true", help="time multi-task steps")
    add("--models", nargs="+", choices=tuple(detr.DETECTORS), default=list(detr.DETECTORS))
    add("--image_size", type=count, default=512, help="pixels a side")
    add("--batch_size", type=count, default=2, help="images")
    add("--repeats", type=count, default=5, help="after one round to warm up")
    add("--device", default=device, help="cpu or cuda")
    args = parser.parse_args()
    parallel.keep_memory()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=args.device)
    boxes = torch.rand(10, 4) * 0.3 + 0.2
    target = {"labels": torch.randint(15, (10,)), "boxes": boxes, "seed": 0, "file_name": ""}
    batch = images, padding, [target] * len(images)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args}")
    for name in args.models:
        mine = ours(name, args)
        if args.multitask:
            steps = {"detection step": training_step(*mine)}
            for on in ("features", "image"):
                step = training_step(*ours(name, args, "multitask", on))
                steps[f"multi-task step, {on}"] = step
            report(name, steps, batch, args)
            continue
        other = theirs(name, args)
        step = training_step(*other, fused=False)
        report(name, {"step": training_step(*mine), "transformers' step": step}, batch, args)
        looks = {"inference": inference(*mine), "transformers' inference": inference(*other)}
        report(name, looks, batch, args)


if __name__ == "__main__":
    main()
