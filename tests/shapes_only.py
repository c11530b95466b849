"""Networks whose dense layers have shapes and no values, to count full-size ones in no time."""

import paddle


def without_values(build, config):
    """The network `build(config)`; of its tensors, those that merging needs alone have values.

    These are the ones of norms and depthwise convolutions: a hundredth of all numbers.
    """
    with paddle.LazyGuard():
        network = build(config)
    for layer in network.sublayers():
        if hasattr(layer, "_mean") or getattr(layer, "_groups", 1) > 1:
            for parameter in layer.parameters():
                parameter.initialize()
    return network
