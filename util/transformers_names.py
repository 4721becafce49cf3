"""From the names of transformers' (Hugging Face) DETR and Deformable DETR to the official ones.

Files in the Hub have the names of transformers 4, and newer versions still write these; the names
that a model of transformers 5 has in memory are understood too.
"""

import re

import torch

# (regular expression, its replacement), applied in this order
RENAMED = [
    (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
    (r"^model\.input_proj(ection)?\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^model\.", "transformer."),
    (r"\.decoder\.layernorm\.", ".decoder.norm."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    (r"_attn\.o_proj\.", "_attn.out_proj."),
    (r"(\.encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(\.decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
]
RENAMED_DETR = [
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".multihead_attn."),
]
RENAMED_DEFORMABLE = [
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"\.self_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
]
RENAMED_RESNET = [  # of transformers itself; the Hub's files have one of timm, with official names
    (r"\.body\.embedder\.embedder\.convolution\.", ".body.conv1."),
    (r"\.body\.embedder\.embedder\.normalization\.", ".body.bn1."),
    (r"\.body\.encoder\.stages\.0\.layers\.", ".body.layer1."),
    (r"\.body\.encoder\.stages\.1\.layers\.", ".body.layer2."),
    (r"\.body\.encoder\.stages\.2\.layers\.", ".body.layer3."),
    (r"\.body\.encoder\.stages\.3\.layers\.", ".body.layer4."),
    (r"\.layer\.0\.convolution\.", ".conv1."),
    (r"\.layer\.0\.normalization\.", ".bn1."),
    (r"\.layer\.1\.convolution\.", ".conv2."),
    (r"\.layer\.1\.normalization\.", ".bn2."),
    (r"\.layer\.2\.convolution\.", ".conv3."),
    (r"\.layer\.2\.normalization\.", ".bn3."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
]


def has_transformers_names(state):
    """Return True if a state dict is of transformers: every decoder layer has such a name."""
    return any("self_attn_layer_norm" in name for name in state)


def to_official_names(state):
    """Return transformers' {name: tensor} under the official names."""
    state = without_prefix(state)
    renamings = RENAMED + RENAMED_DETR
    if "model.level_embed" in state:
        renamings = RENAMED + RENAMED_DEFORMABLE
    renamings = renamings + RENAMED_RESNET
    official = {}
    for name, tensor in state.items():
        if name.endswith(".num_batches_tracked"):  # counters that frozen statistics do not have
            continue
        for pattern, replacement in renamings:
            name = re.sub(pattern, replacement, name)
        official[name] = tensor
    return fill_shared_heads(join_projections(official))


def without_prefix(state):
    """Remove what a training tool puts in front of all names, and what is not of the detector."""
    prefix = ""
    for name in state:
        before, separator, _ = name.partition("model.backbone.")
        if separator:
            prefix = before
    inner = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            inner[name.removeprefix(prefix)] = tensor
    return inner


def join_projections(state):
    """Join the projections of queries, keys and values, as nn.MultiheadAttention has them."""
    joined = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*)\.[qkv]_proj\.(weight|bias)", name)
        if match is None:
            joined[name] = tensor
            continue
        attention, kind = match.groups()
        if f"{attention}.in_proj_{kind}" not in joined:
            parts = [state[f"{attention}.{letter}_proj.{kind}"] for letter in "qkv"]
            joined[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    return joined


def fill_shared_heads(state):
    """Repeat the head of a Deformable DETR of which the file has only one for all layers.

    Files in the format safetensors hold shared tensors once.
    """
    filled = dict(state)
    layers = set(re.findall(r"transformer\.decoder\.layers\.(\d+)\.", " ".join(state)))
    num_heads = len(layers)
    if "transformer.enc_output.weight" in state:  # two-stage: proposals have a head of their own
        num_heads += 1
    for kind in ("class_embed", "bbox_embed"):
        indices = set(re.findall(rf"{kind}\.(\d+)\.", " ".join(state)))
        if len(indices) != 1:
            continue
        only = f"{kind}.{indices.pop()}."
        for name, tensor in state.items():
            if only not in name:
                continue
            for i in range(num_heads):
                filled[name.replace(only, f"{kind}.{i}.")] = tensor
    return filled
