"""RepLKNet as a backbone of PaddleSeg (develop branch); see docs/integrations.md."""

from paddleseg.cvlibs import manager

from integrations.backbone import build_backbone, map_channels
from replknet_paddle.runtime.errors import InputError


@manager.BACKBONES.add_component
def RepLKNet(
    variant="replknet_31b",
    in_channels=3,
    drop_path_rate=0.5,
    stage_norms=False,
    recompute=False,
    pretrained=None,
):
    """The four maps of a RepLKNet, at strides 4, 8, 16 and 32.

    Args: those of `integrations.backbone.build_backbone`, and `in_channels`, which PaddleSeg sets
    from the dataset: 3.

    Returns:
        A network with `feat_channels`, the channels of its maps.
    """
    if in_channels != 3:
        raise InputError(f"in_channels is {in_channels}; allowed: 3, RGB")
    network = build_backbone(
        variant,
        out_indices=[0, 1, 2, 3],
        drop_path_rate=drop_path_rate,
        stage_norms=stage_norms,
        recompute=recompute,
        pretrained=pretrained,
    )
    network.feat_channels = map_channels(network)
    return network
