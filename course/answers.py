"""Your answers to the exercises of COURSE.md; `python -m pytest course -k NAME` checks them."""

# shapes: in the demonstration's Deformable DETR, for two scenes of 96 x 128 pixels (height x width)
LEVELS = [None, None, None]  # shapes of the three maps that `features` returns, finest first
LOCATIONS = None  # shape of the encoder's sampling points, which MSDeformAttn.sample returns first
LOGITS = None  # shape of the logits of all decoder layers

# star: offset (x, y), in cells of the map, of the third point of the third of eight heads, before
# anything is learned
POINT = None

# share: number of masked patches of 32 pixels in an image of 128 x 128, for each --ssl_ratio
MASKED = {0.25: None, 0.5: None, 0.9: None}

# null: 95 % interval (low, high) of AP after the last epoch, in %, of detr-after-mim-continuous
# minus detr-scratch, from seeds 0, 1 and 2 in results/scenes
INTERVAL = (None, None)


# attention: from the projections of torch's own layer
def attention(layer, query, memory):
    """Compute with which weights one query attends to the memory.

    layer:  nn.MultiheadAttention
    query:  (C,)
    memory: (S, C), its keys
    Returns (heads, S).
    """
    raise NotImplementedError


# backward: without autograd
def backward(grad, value, shapes, locations, weights):
    """Compute the gradients of deformable attention (equation 3).

    grad: (B, Q, M * D), the gradient of the output
    value, shapes, locations, weights: the arguments of ms_deform_attn_reference
    Returns the gradients of value, locations and weights, each in the shape of its tensor.
    """
    raise NotImplementedError
