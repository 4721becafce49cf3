"""Time training steps and inference of both detectors, in one process on the same data.

    python bench.py                     next to transformers'
    python bench.py --multitask         a multi-task step (mim-continuous) next to a detection step

Everywhere: ResNet-50 with frozen batch norm, trained from its second stage on, official sizes, dropout 0.1, random weights,
fp32, 10 objects an image, AdamW; ours as train.py runs it, with channels last and a fused optimizer. What is compared takes
turns, so that a change of the machine's speed meets all; printed are medians and the ratio of the medians.
"""

import argparse
import re
import statistics
import time

import torch

import detr
import ssl_tasks
import train


def ours(name, num_classes):
    """(model, training loss of a batch, inference on a batch)."""
    model, weights = (
        detr.build_detector(name, num_classes),
        detr.loss_weights(detr.DETECTORS[name].focal),
    )

    def loss(images, padding, targets):
        return detr.total_loss(
            detr.detection_losses(model(images, padding), targets, model.focal), weights
        )

    def infer(images, padding):
        return detr.detections(
            model(images, padding), [images.shape[-2:]] * len(images), model.focal
        )

    return model, loss, infer


def theirs(name, num_classes):
    """The same of transformers' implementation."""
    import transformers

    config_class, model_class = {
        "detr": (transformers.DetrConfig, transformers.DetrForObjectDetection),
        "deformable_detr": (
            transformers.DeformableDetrConfig,
            transformers.DeformableDetrForObjectDetection,
        ),
    }[name]
    stages = ["stage4"] if name == "detr" else ["stage2", "stage3", "stage4"]
    resnet = transformers.ResNetConfig(layer_type="bottleneck", out_features=stages)
    model = model_class(
        config_class(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=resnet,
            num_labels=num_classes,
            auxiliary_loss=True,
            dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.1,
        )
    )  # everywhere, as in the official code
    for (
        parameter_name,
        parameter,
    ) in model.named_parameters():  # it freezes this whole backbone; the official code, a part
        if re.search(r"backbone.*stages\.[123].*convolution", parameter_name):
            parameter.requires_grad_(True)

    def loss(images, padding, targets):
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        return model(pixel_values=images, pixel_mask=(~padding).long(), labels=labels).loss

    def infer(images, padding):
        return (
            model(pixel_values=images, pixel_mask=(~padding).long())
            .logits.sigmoid()
            .flatten(1)
            .topk(100)
        )

    return model, loss, infer


def multitask(name, num_classes, on):
    """(model and task, training loss of a batch with the task mim-continuous)."""
    model, weights = (
        detr.build_detector(name, num_classes),
        detr.loss_weights(detr.DETECTORS[name].focal),
    )
    task = ssl_tasks.build_task(
        "mim-continuous", 256, model.strides, on="image" if on == "two passes" else on
    )

    def loss(images, padding, targets):
        corruption = task.corruption(padding, range(len(images))).to(images.device)
        if on == "two passes":  # the authors' way: the whole model twice
            memory = model.encode(model.features(images, padding))
            corrupted = model.encode(
                model.features(task.corrupt_images(images, corruption), padding)
            )
            model.decode(corrupted)
        else:
            corrupted, memory = ssl_tasks.encode(
                model, task, images, padding, corruption, clean=True
            )
        losses = detr.detection_losses(model.decode(memory), targets, model.focal)
        return detr.total_loss(losses, weights) + task.loss(corrupted, images, corruption)

    return torch.nn.ModuleList([model, task]), loss


def stopwatch(function, device):
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(functions, args):
    """Median seconds of each function: {name: function} -> {name: seconds}, after one round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(args.repeats + 1):
        for name, function in functions.items():
            times[name].append(stopwatch(function, args.device))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def training_step(model, loss, args, batch, fused):
    """A function that does one training step, as train.py does it."""
    model.to(args.device, memory_format=torch.channels_last if fused else torch.preserve_format)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=fused)

    def step():
        model.train()
        optimizer.zero_grad()
        loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    return step


def inference(model, infer, batch):
    def look():
        model.eval()
        with torch.no_grad():
            infer(*batch[:2])

    return look


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--multitask", action="store_true", help="time multi-task steps")
    parser.add_argument(
        "--keep_memory",
        action="store_true",
        help="as train.py does on a CPU, here for both sides; see train.keep_memory",
    )
    parser.add_argument(
        "--models", nargs="+", choices=tuple(detr.DETECTORS), default=list(detr.DETECTORS)
    )
    parser.add_argument("--image_size", type=int, default=512, help="(default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="(default %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="after one round to warm up (default %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default here: %(default)s)",
    )
    args = parser.parse_args()
    if args.keep_memory:
        train.keep_memory()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    padding = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=args.device)
    targets = [
        {"labels": torch.randint(15, (10,)), "boxes": torch.rand(10, 4) * 0.3 + 0.2} for _ in images
    ]
    batch = images, padding, targets
    device = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}; torch {torch.__version__}; {args.image_size} x {args.image_size}, batch {args.batch_size}, "
        f"median of {args.repeats}"
    )
    for name in args.models:
        model, loss, infer = ours(name, 15)
        step = training_step(model, loss, args, batch, fused=True)
        if args.multitask:
            steps = {
                on: training_step(*multitask(name, 15, on), args, batch, fused=True)
                for on in ("features", "image", "two passes")
            }
            seconds = take_turns(
                {"detection step": step, **{f"multi-task, {on}": s for on, s in steps.items()}},
                args,
            )
            for what, time_ in seconds.items():
                print(
                    f"{name:16} {what:24} {time_:8.3f}s {time_ / seconds['detection step']:6.2f}x",
                    flush=True,
                )
            continue
        their_model, their_loss, their_infer = theirs(name, 15)
        their_batch = (
            images,
            padding,
            [{k: v.to(args.device) for k, v in t.items()} for t in targets],
        )
        seconds = take_turns(
            {
                "step": step,
                "look": inference(model, infer, batch),
                "their step": training_step(
                    their_model, their_loss, args, their_batch, fused=False
                ),
                "their look": inference(their_model, their_infer, their_batch),
            },
            args,
        )
        for what, key in (("training step", "step"), ("inference", "look")):
            mine, other = seconds[key], seconds[f"their {key}"]
            print(
                f"{name:16} {what:14} ours {mine:8.3f}s, transformers {other:8.3f}s {other / mine:6.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
