"""deformable_attn as a package of its own, and under the official signature."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import deformable_attn
from deformable_attn import compat, ms_deform_attn, ms_deform_attn_reference

FOLDER = Path(deformable_attn.__file__).parent
SOURCES = {"cpu.cpp", "cuda.cu", "py.typed"} | {path.name for path in FOLDER.glob("*.py")}
SHAPES = [(6, 8), (3, 4)]


def make_inputs(seed=0, dtype=torch.float32):
    """value, locations and weights of two levels, with some points outside of them."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 60, 4, 8, generator=generator).to(dtype)
    locations = torch.rand(2, 5, 4, 2, 3, 2, generator=generator) * 1.2 - 0.1
    weights = torch.rand(2, 5, 4, 2, 3, generator=generator).to(dtype)
    return value, locations, weights


# ---------------------------------------------------------------- the package
RUN_INSTALLED = """
import torch
import deformable_attn
from deformable_attn.compat import MSDeformAttn
from deformable_attn.reference import ms_deform_attn_reference

print(deformable_attn.__file__)
print(deformable_attn.__version__)
print(deformable_attn.choose_backend("cpu")[0])
torch.manual_seed(0)
value = torch.randn(1, 20, 2, 4)
locations = torch.rand(1, 3, 2, 2, 2, 2)
weights = torch.rand(1, 3, 2, 2, 2)
out = deformable_attn.ms_deform_attn(value, [(4, 4), (2, 2)], locations, weights)
expected = ms_deform_attn_reference(value, [(4, 4), (2, 2)], locations, weights)
torch.testing.assert_close(out, expected)
assert MSDeformAttn(8, 2, 2, 2).value_proj.weight.shape == (8, 8)
"""


def test_it_is_built_installed_and_run_in_a_new_environment(tmp_path):
    """From a copy of the folder alone: wheel and sdist hold all sources, and the wheel works."""
    source = tmp_path / "source"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg*"))
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    run = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if "dist-info" not in name}
        metadata = archive.read(next(x for x in archive.namelist() if x.endswith("METADATA")))
    assert names == SOURCES
    assert f"Version: {deformable_attn.__version__}\n" in metadata.decode()
    with tarfile.open(sdist) as archive:
        assert SOURCES | {"pyproject.toml", "README.md"} <= {
            Path(name).name for name in archive.getnames()
        }

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel of pure Python
        archive.extractall(packages)
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib"))  # the torch of this one
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", RUN_INSTALLED]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    path, version, backend = run.stdout.split()
    assert path == str(packages / "deformable_attn/__init__.py")
    assert version == deformable_attn.__version__
    assert backend == deformable_attn.choose_backend("cpu")[0]


def test_the_package_needs_nothing_of_the_project():
    for path in FOLDER.glob("*.py"):
        imported = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.M)
        others = set(imported) - set(sys.stdlib_module_names) - {"torch", "transformers"}
        assert others <= {"deformable_attn"}, path


def test_the_snippets_of_its_readme_run(capsys):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    use, replaced, transformers = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(use, names)
    assert capsys.readouterr().out == "torch.Size([2, 5, 256])\n"
    assert names["value"].grad is not None
    exec(replaced, names)
    assert names["MSDeformAttn"] is compat.MSDeformAttn
    assert "deformable_attn.use_in_transformers()" in transformers


def test_public_names_have_hints_and_docstrings():
    functions = [getattr(deformable_attn, name) for name in deformable_attn.__all__]
    functions += [deformable_attn.MSDeformAttn.forward, deformable_attn.MSDeformAttn.sample]
    functions += [compat.MSDeformAttnFunction.apply, compat.MSDeformAttn.forward]
    for function in functions:
        if not callable(function):
            continue
        assert function.__doc__
        if not isinstance(function, type):
            assert "return" in function.__annotations__, function


# ---------------------------------------------------------------- the official signature
def test_the_official_function():
    """It equals the reference, also its gradients; the tensor of sizes is read once."""
    value, locations, weights = make_inputs()
    shapes = torch.tensor(SHAPES)
    starts = torch.tensor([0, 48])
    inputs = [value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()]
    out = compat.MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    expected = ms_deform_attn_reference(value, SHAPES, locations, weights)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch.testing.assert_close(out, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_sizes_are_read_once_per_tensor(monkeypatch):
    """Reading a tensor waits for the GPU; all layers of a model share one."""
    reads = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        reads.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    shapes = torch.tensor(SHAPES)
    for _ in range(3):
        assert compat.sizes_of(shapes) == SHAPES
    assert len(reads) == 1
    shapes[0, 0] = 7  # in place
    assert compat.sizes_of(shapes) == [(7, 8), (3, 4)]
    assert compat.sizes_of(shapes.clone()) == [(7, 8), (3, 4)]
    assert len(reads) == 3
    assert compat.sizes_of([torch.Size([2, 3])]) == [(2, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_locations_in_16_bits(dtype):
    """The official extension takes them; here they are computed with in fp32."""
    value, locations, weights = make_inputs(dtype=dtype)
    locations = locations.to(dtype)
    out = compat.MSDeformAttnFunction.apply(value, torch.tensor(SHAPES), None, locations, weights)
    assert out.dtype == dtype
    assert torch.equal(out, ms_deform_attn(value, SHAPES, locations.float(), weights))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_the_official_module(coordinates):
    """It has the official names and arguments, and computes what the module here does."""
    torch.manual_seed(0)
    module = compat.MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"sampling_offsets", "attention_weights", "value_proj", "output_proj"}
    torch.nn.init.normal_(module.attention_weights.weight)
    ours = deformable_attn.MSDeformAttn(32, 2, 4, 3)
    ours.load_state_dict(module.state_dict())
    query = torch.randn(2, 5, 32)
    reference = torch.rand(2, 5, 2, coordinates)
    source = torch.randn(2, 60, 32)
    padding = torch.rand(2, 60) < 0.3
    shapes = torch.tensor(SHAPES)
    starts = torch.tensor([0, 48])
    out = module(query, reference, source, shapes, starts, padding)
    assert torch.equal(out, ours(query, reference, source, SHAPES, padding))
    no_padding = torch.zeros(2, 60, dtype=torch.bool)
    expected = module(query, reference, source, shapes, starts, no_padding)
    assert torch.equal(module(query, reference, source, shapes, starts), expected)
    assert not torch.equal(out, expected)
    with pytest.raises(ValueError, match="divisible by n_heads, got 30 and 4"):
        compat.MSDeformAttn(30, 2, 4, 3)
