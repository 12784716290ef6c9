"""What torch's functions do with relevance, by name, without underscores: those that need no function of their own."""

#: Functions of one activation that pass relevance unchanged.
UNCHANGED = {
    "gelu", "relu", "relu6", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu", "celu",
    "mish", "softplus", "softsign", "logsigmoid", "log_sigmoid", "hardshrink", "tanhshrink", "threshold", "softmax", "log_softmax",
    "layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm", "normalize", "exp", "sqrt", "rsqrt", "square", "pow",
    "neg", "abs", "log", "log1p", "sin", "cos", "erf", "clamp", "clamp_min", "clamp_max", "clip", "reciprocal", "rdiv", "rtruediv",
    "dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout", "to", "type", "float", "double", "half", "bfloat16",
    "type_as", "detach", "data", "contiguous", "nan_to_num", "expm1", "exp2", "log2", "log10", "atan",
    "arctan", "sinh", "asinh", "erfc", "sign", "round", "floor", "ceil", "trunc", "softshrink", "logit", "tan", "asin", "arcsin",
    "acos", "arccos", "erfinv",
}  # fmt: skip

#: Those among them that change no number: an attention map stays one.
COPIES = {
    "dropout", "to", "type", "float", "double", "half", "bfloat16", "type_as", "detach", "data", "contiguous", "nan_to_num",
}  # fmt: skip

#: Those among them that make an entry of more than one.
OVER_FEATURES = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm", "normalize",
}  # fmt: skip

#: Functions of two operands, entry by entry.
ARITHMETIC = {
    "add", "radd", "sub", "subtract", "rsub", "mul", "rmul", "multiply", "div", "truediv", "divide", "true_divide",
}  # fmt: skip

#: Functions that only move numbers: autograd's own backward sends relevance back to where they came from.
MOVES = {
    "view", "reshape", "reshape_as", "view_as", "ravel", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t",
    "mT", "T", "mH", "H", "adjoint", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem", "select", "narrow", "chunk", "split",
    "split_with_sizes", "tensor_split", "unbind", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "expand",
    "expand_as", "broadcast_to", "clone", "roll", "flip", "rot90", "pad", "repeat", "repeat_interleave", "tile", "gather",
    "index_select", "take_along_dim", "masked_select", "masked_fill", "where", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "unfold", "tril", "triu", "diagonal", "diag_embed", "index_put", "index_copy", "scatter", "masked_scatter", "slice_scatter",
    "select_scatter", "view_as_complex", "view_as_real", "max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "max", "min", "maximum", "minimum", "topk", "sort", "kthvalue", "median", "cummax", "cummin", "aminmax",
}  # fmt: skip

#: Those among them after which every number is there once, in another place.
REARRANGEMENTS = {
    "view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT", "T", "flatten", "unflatten",
    "squeeze", "unsqueeze", "getitem", "select", "clone",
}  # fmt: skip

#: Those among them that choose by size: an attention map does not stay one.
PICKS = {"max", "min", "topk", "sort", "kthvalue", "median", "cummax", "cummin", "aminmax"}

#: Those among them that write into their first argument where their name ends in an underscore.
WRITES = {"setitem", "copy", "masked_fill", "index_put", "index_copy", "scatter", "masked_scatter"}

#: Moves after which one number per token still is that.
BROADCASTS = {"expand", "expand_as", "unsqueeze", "getitem"}

#: Moves that put numbers in the place of some entries.
FILLS = {"masked_fill", "where", "tril", "triu"}

#: Averages over windows, windows added up, interpolation, running sums.
POOLING = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate",
    "upsample", "fold", "cumsum",
}  # fmt: skip

#: Functions that read no more of their second argument than its shape and dtype.
LIKE_ANOTHER = {"type_as", "expand_as", "view_as", "reshape_as"}

#: Functions of an activation's shape, dtype and device alone.
CONSTANTS = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty",
    "new_full", "new_tensor",
}  # fmt: skip

#: What reads or sets whether gradients are recorded.
AUTOGRAD = {"requires_grad", "retain_grad", "set", "set_grad_enabled", "backward", "grad", "register_hook"}
