"""UPerNet on a RepLKNet backbone, as the official segmentation models have it."""

import paddle
from paddle import nn

from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.segmentation.heads import FCNHead, UPerHead

AUXILIARY_STAGE = 2  # whose map the auxiliary head looks at


class UPerNet(nn.Layer):
    """Logits of each pixel.

    Args:
        backbone: with all four maps.
        decode_head: whose logits count.
        auxiliary_head: for a second loss in training.
    """

    def __init__(self, backbone: RepLKNet, decode_head: UPerHead, auxiliary_head: FCNHead):
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, images: paddle.Tensor):
        """Images (N, 3, H, W) -> logits (N, num_classes, H, W).

        In training mode a tuple, the second one by the auxiliary head; both are at the scale of
        their maps, and the loss resizes them.
        """
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        if self.training:
            return logits, self.auxiliary_head(maps[AUXILIARY_STAGE])
        return self.decode_head.resized(logits, images)

    def export_form(self):
        """Its `ExportForm`, for `replknet_paddle.deploy.export`."""
        from replknet_paddle.segmentation.export import export_form  # what training does not need

        return export_form(self)

    def structural_reparam(self) -> None:
        """Merge the backbone's kernels, in place, for inference."""
        self.backbone.structural_reparam()


def build_upernet(config, *, sync_bn: bool = False) -> UPerNet:
    """The network that `config` describes, freshly initialized; it carries `config` as such.

    Args:
        config: with MODEL.TYPE UPerNet.
        sync_bn: as for `build_replknet`.
    """
    settings, num_classes = config.SEGMENTATION, config.MODEL.NUM_CLASSES
    channels = config.MODEL.CHANNELS
    norm_layer = nn.SyncBatchNorm if sync_bn else nn.BatchNorm2D
    network = UPerNet(
        build_replknet(config, sync_bn=sync_bn),
        UPerHead(
            channels,
            settings.HEAD_CHANNELS,
            num_classes,
            align_corners=settings.ALIGN_CORNERS,
            norm_layer=norm_layer,
        ),
        FCNHead(
            channels[AUXILIARY_STAGE], settings.AUX_CHANNELS, num_classes, norm_layer=norm_layer
        ),
    )
    network.config = config
    return network
