"""Options of training that do not change what is learnt, or only by rounding: precision, compiled models, averaged weights, less memory."""
import pytest
import torch

import detr
import train

TINY = ["--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32", "--num_queries", "8",
        "--image_size", "64", "--limit_train", "8", "--limit_val", "2", "--batch_size", "4"]
MULTITASK = ["--setting", "multitask", "--ssl_task", "mim-continuous", "--ssl_patch", "32"]


def one_step(tmp_path, *flags, name="run"):
    """The run after its first step, and that step's losses and gradients."""
    args = train.parse([*TINY, *flags, "--out", str(tmp_path / name)])
    torch.manual_seed(0)
    _, run, data, _, _ = train.prepare(args)
    train.train_mode(run.model, args)
    step = next(train.steps_of(train.epoch_loader(data, args, 1), run.task, args))
    losses = train.take_step(train.Learner(run.model, run.task, args), step, run, args)
    return run, {name: float(loss) for name, loss in losses.items()}, [p.grad for p in run.model.parameters()]


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision(amp, model, tmp_path, monkeypatch):
    """Losses near those of fp32, to which matching and losses are given; the weights stay fp32."""
    flags = [*MULTITASK, "--model", model, "--ssl_weight", "1"]
    _, right, _ = one_step(tmp_path, *flags, name="fp32")
    seen, set_losses, errors = [], detr.set_losses, train.ssl_tasks.PixelTask.errors
    monkeypatch.setattr(detr, "set_losses", lambda *args: seen.extend(args[:2]) or set_losses(*args))
    linear = torch.nn.functional.linear
    used = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: used.append(linear(*args)) or used[-1])
    monkeypatch.setattr(train.ssl_tasks.PixelTask, "errors", lambda self, *args: seen.extend(args) or errors(self, *args))
    run, losses, gradients = one_step(tmp_path, *flags, "--amp", amp)
    assert len(seen) == 4 and all(tensor.dtype == torch.float32 for tensor in seen)
    assert {x.dtype for x in used} & {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert all(p.dtype == torch.float32 for p in run.model.parameters()) and run.scaler.is_enabled() == (amp == "fp16")
    assert losses == pytest.approx(right, rel=0.1) and losses != right
    assert amp == "fp16" or all(g.isfinite().all() for g in gradients if g is not None)  # fp16 may have to find its scale first


def test_fp16_leaves_an_infinite_step_out(tmp_path):
    """The scale starts so high that gradients overflow in half precision: weights stay, the scale is halved."""
    args = train.parse([*TINY, "--amp", "fp16", "--out", str(tmp_path / "run")])
    torch.manual_seed(0)
    _, run, data, _, _ = train.prepare(args)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 120)
    before = [p.clone() for p in run.model.parameters()]
    train.take_step(train.Learner(run.model, None, args), next(train.steps_of(train.epoch_loader(data, args, 1), None, args)), run, args)
    assert all(map(torch.equal, before, run.model.parameters())) and run.scaler.get_scale() == 2.0 ** 119


def test_fp16_stops_where_scaling_is_no_help(tmp_path):
    args = train.parse([*TINY, "--amp", "fp16", "--out", str(tmp_path / "run")])
    _, run, data, _, _ = train.prepare(args)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    next(run.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    step = next(train.steps_of(train.epoch_loader(data, args, 1), None, args))
    with pytest.raises(FloatingPointError, match="the gradient is NaN or infinite"):
        train.take_step(train.Learner(run.model, None, args), step, run, args)


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_computing_layers_twice_changes_nothing(model, tmp_path):
    plain = one_step(tmp_path, "--model", model, "--dropout", "0.1", name="a")
    saving = one_step(tmp_path, "--model", model, "--dropout", "0.1", "--checkpoint_activations", name="b")
    assert plain[1] == saving[1]
    for a, b in zip(plain[2], saving[2]):
        assert (a is None and b is None) or torch.equal(a, b)


def test_layers_are_computed_twice(tmp_path, monkeypatch):
    calls, feed_forward = [], detr.Layer.feed_forward
    monkeypatch.setattr(detr.Layer, "feed_forward", lambda self, x: calls.append(0) or feed_forward(self, x))
    one_step(tmp_path, name="a")
    once = len(calls)
    one_step(tmp_path, "--checkpoint_activations", name="b")
    assert len(calls) == 3 * once


@pytest.mark.parametrize("model", ["detr", "deformable_detr"])
def test_compiled(model, tmp_path, monkeypatch):
    """What is compiled runs and gives the same (here by the compiler's front half; the back half takes minutes)."""
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f.__name__) or compile_(f, backend="aot_eager"))
    plain = one_step(tmp_path, *MULTITASK, "--model", model, name="a")
    found = one_step(tmp_path, *MULTITASK, "--model", model, "--compile", name="b")
    assert compiled == ["features", "encode", "decode"] and found[1] == pytest.approx(plain[1], rel=1e-4)
    for a, b in zip(plain[2], found[2]):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3)


def test_averaged_weights(tmp_path):
    """By hand over two steps; evaluated, kept as best.pt, and apart from the trained ones in last.pt."""
    args = train.parse([*TINY, "--ema", "0.5", "--out", str(tmp_path / "a")])
    torch.manual_seed(0)
    _, run, data, _, _ = train.prepare(args)
    learner, name = train.Learner(run.model, None, args), "query_embed.weight"
    history = []
    for step in train.steps_of(train.epoch_loader(data, args, 1), None, args):
        train.take_step(learner, step, run, args)
        history.append(run.model.state_dict()[name].clone())
    assert len(history) == 2  # the average starts at the first step's weights
    torch.testing.assert_close(run.ema.module.state_dict()[name], 0.5 * history[0] + 0.5 * history[1])
    train.main([*TINY, "--ema", "0.9", "--epochs", "1", "--out", str(tmp_path / "b")])
    last, best = (torch.load(tmp_path / f"b/{kind}.pt", weights_only=True) for kind in ("last", "best"))
    assert not torch.equal(last["ema"][name], last["model"][name])
    assert torch.equal(best["model"][name], last["ema"][name])
    model = train.evaluation.load_run(tmp_path / "b/last.pt", "cpu")[0]
    assert torch.equal(model.state_dict()[name], last["ema"][name])
    detr.load_weights(run.model, tmp_path / "b/last.pt")  # as --init does
    assert torch.equal(run.model.state_dict()[name], last["ema"][name])
