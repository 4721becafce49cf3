"""Time a training step and an inference of both detectors next to transformers', in one process on the same data.

    python bench.py [--models detr deformable_detr] [--image_size 512] [--batch_size 2] [--repeats 5] [--device cpu]

Both sides: ResNet-50 with frozen batch norm, trained from its second stage on, official sizes, dropout 0.1, random weights,
fp32, 10 objects an image, AdamW; ours as train.py runs it, with channels last and a fused optimizer. The two take turns, so
that a change of the machine's speed meets both; printed are medians and the ratio of the medians.
"""
import argparse
import re
import statistics
import time

import torch
import transformers

import detr


def ours(name, num_classes):
    """(model, training loss of a batch, inference on a batch)."""
    model = detr.build_detector(name, num_classes)
    weights = detr.loss_weights(model.focal)

    def loss(images, padding, targets):
        return detr.total_loss(detr.detection_losses(model(images, padding), targets, model.focal), weights)

    def infer(images, padding):
        return detr.detections(model(images, padding), [images.shape[-2:]] * len(images), model.focal)
    return model, loss, infer


def theirs(name, num_classes):
    """The same of transformers' implementation."""
    config_class, model_class = {
        "detr": (transformers.DetrConfig, transformers.DetrForObjectDetection),
        "deformable_detr": (transformers.DeformableDetrConfig, transformers.DeformableDetrForObjectDetection)}[name]
    stages = ["stage4"] if name == "detr" else ["stage2", "stage3", "stage4"]
    resnet = transformers.ResNetConfig(layer_type="bottleneck", out_features=stages)
    model = model_class(config_class(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                                     backbone_config=resnet, num_labels=num_classes, auxiliary_loss=True, dropout=0.1,
                                     attention_dropout=0.1, activation_dropout=0.1))  # everywhere, as in the official code
    for parameter_name, parameter in model.named_parameters():  # it freezes this whole backbone; the official code, a part
        if re.search(r"backbone.*stages\.[123].*convolution", parameter_name):
            parameter.requires_grad_(True)

    def loss(images, padding, targets):
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        return model(pixel_values=images, pixel_mask=(~padding).long(), labels=labels).loss

    def infer(images, padding):
        return model(pixel_values=images, pixel_mask=(~padding).long()).logits.sigmoid().flatten(1).topk(100)
    return model, loss, infer


def stopwatch(function, device):
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(detr.DETECTORS), default=list(detr.DETECTORS))
    parser.add_argument("--image_size", type=int, default=512, help="(default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="after one round to warm up (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=args.device)
    targets = [{"labels": torch.randint(15, (10,)), "boxes": torch.rand(10, 4) * 0.3 + 0.2} for _ in images]
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}; "
          f"{args.image_size} x {args.image_size}, batch {args.batch_size}, median of {args.repeats}")
    print(f"{'model':16} {'what':14} {'ours':>9} {'transformers':>13} {'ratio':>7}")
    for name in args.models:
        seconds = {}
        for side, build in (("ours", ours), ("transformers", theirs)):
            model, loss, infer = build(name, 15)
            model.to(args.device, memory_format=torch.channels_last if side == "ours" else torch.preserve_format).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=side == "ours")
            where = targets if side == "ours" else [{k: v.to(args.device) for k, v in t.items()} for t in targets]
            seconds[side] = (model, loss, infer, optimizer, where, {"training step": [], "inference": []})
        for repeat in range(args.repeats + 1):
            for model, loss, infer, optimizer, where, times in seconds.values():
                def step(model=model, loss=loss, optimizer=optimizer, where=where):
                    optimizer.zero_grad()
                    loss(images, padding, where).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()

                def look(infer=infer):
                    with torch.no_grad():
                        infer(images, padding)
                for what, function in (("training step", step), ("inference", look)):
                    model.train(what == "training step")
                    elapsed = stopwatch(function, args.device)
                    if repeat:
                        times[what].append(elapsed)
        for what in ("training step", "inference"):
            mine, other = (statistics.median(side[-1][what]) for side in seconds.values())
            print(f"{name:16} {what:14} {mine:8.3f}s {other:12.3f}s {other / mine:6.2f}x")


if __name__ == "__main__":
    main()
