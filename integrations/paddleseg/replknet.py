"""RepLKNet as a backbone of PaddleSeg (develop branch); see docs/integrations.md."""

from paddleseg.cvlibs import manager

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import get_model


@manager.BACKBONES.add_component
def RepLKNet(
    variant="replknet-31b-1k-224",
    in_channels=3,
    drop_path_rate=0.5,
    stage_norms=False,
    recompute=False,
    pretrained=False,
):
    """The four maps of a RepLKNet, at strides 4, 8, 16 and 32.

    Args:
        variant: name of a published model, or path of a YAML file.
        in_channels: 3; PaddleSeg takes it from the dataset.
        drop_path_rate: stochastic depth of the last block.
        stage_norms: one more batch norm on each map, as the official XL models have it.
        recompute: keep only the inputs of the blocks in training, and compute the rest twice.
        pretrained: as in `get_model`; a classifier's final norm and head are left out.

    Returns:
        A network with `feat_channels`, the channels of its maps.
    """
    if in_channels != 3:
        raise InputError(f"in_channels is {in_channels}; allowed: 3, RGB")
    network = get_model(
        variant,
        pretrained=pretrained,
        out_indices=[0, 1, 2, 3],
        MODEL__DROPPATH=drop_path_rate,
        MODEL__NORM_INTER_FEATURES=stage_norms,
        MODEL__RECOMPUTE=recompute,
    )
    network.feat_channels = list(network.feature_channels)
    return network
