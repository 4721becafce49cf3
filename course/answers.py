"""Your answers to the exercises of COURSE.md; `python -m pytest course -k NAME` checks them."""

# shapes: two scenes of 96 x 128 pixels (height x width) in the demonstration's Deformable DETR
LEVELS = [None, None, None]  # of the three maps that `features` returns, finest first
LOCATIONS = None  # of the encoder's sampling points: what MSDeformAttn.sample returns first
LOGITS = None  # of all decoder layers

# star: where a query looks before anything is learnt: the offset (x, y), in cells of the map, of
# the third point of the third of eight heads
POINT = None

# share: how many patches of 32 pixels are masked in an image of 128 x 128, for each --ssl_ratio
MASKED = {0.25: None, 0.5: None, 0.9: None}

# null: the 95 % interval of (detr-after-mim-continuous - detr-scratch), AP in % after the last
# epoch, of seeds 0, 1 and 2 in results/scenes
INTERVAL = None, None


# backward: the gradients of deformable attention (equation 3), without autograd
def backward(grad, value, shapes, locations, weights):
    """Gradients of the sum of grad * ms_deform_attn_reference(value, shapes, locations, weights):
    (of value, of locations, of weights), each of the shape of what it belongs to."""
    raise NotImplementedError


# attention: what one query looks at, from the projections of torch's own layer
def attention(layer, query, memory):
    """layer: nn.MultiheadAttention; query (C,); memory (S, C), its keys -> weights (heads, S)."""
    raise NotImplementedError
