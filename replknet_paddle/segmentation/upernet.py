"""UPerNet on a RepLKNet backbone, as the official segmentation models have it.

UPerNet (arXiv 1807.10221) pools the last map as PSPNet does (arXiv 1612.01105), then merges the
maps of all stages from the top down as a feature pyramid network (arXiv 1612.03144). The FCN head
(arXiv 1411.4038) is a second loss on the third map, in training alone. Parameter names are those
of the official checkpoints but for the names of norms, which follow the backbone's.
"""

from collections.abc import Sequence

import paddle
from paddle import nn
from paddle.nn import functional as F

from replknet_paddle.model import ConvNorm, RepLKNet, build_replknet, uniform

DROPOUT = 0.1  # of whole channels, before the classifier
AUXILIARY_STAGE = 2  # whose map the auxiliary head looks at


def resize(x: paddle.Tensor, size: Sequence[int], *, align_corners: bool) -> paddle.Tensor:
    """Interpolate bilinearly without antialiasing: (N, C, H, W) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def classifier(channels: int, num_classes: int) -> nn.Conv2D:
    """Return a 1x1 convolution to logits, initialized as the rest of the network.

    The official code draws weights of deviation 0.01. From these the narrow heads of the nano
    network did not learn a class of one pixel in twenty within 1,200 steps.
    """
    return nn.Conv2D(
        channels, num_classes, 1, weight_attr=uniform(channels), bias_attr=uniform(channels)
    )


class UPerHead(nn.Layer):
    """Logits from the maps of all stages."""

    pool_scales = (1, 2, 3, 6)  # cells on a side of the grids that the last map is averaged over

    def __init__(
        self,
        in_channels: Sequence[int],  # of each map, from the largest map to the smallest
        channels: int,  # width of every convolution
        num_classes: int,
        *,
        align_corners: bool,  # how maps are resized (False for ADE20K, True for Cityscapes)
    ):
        super().__init__()
        self.align_corners = align_corners
        self.interpolate = resize  # an export has another one

        def conv(inputs: int, kernel_size: int) -> ConvNorm:
            return ConvNorm(inputs, channels, kernel_size, relu=True)

        self.psp_modules = nn.LayerList(
            nn.Sequential(nn.AdaptiveAvgPool2D(scale), conv(in_channels[-1], 1))
            for scale in self.pool_scales
        )
        self.bottleneck = conv(in_channels[-1] + len(self.pool_scales) * channels, 3)
        self.lateral_convs = nn.LayerList(conv(inputs, 1) for inputs in in_channels[:-1])
        self.fpn_convs = nn.LayerList(conv(channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = conv(len(in_channels) * channels, 3)
        self.dropout = nn.Dropout2D(DROPOUT)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, maps: Sequence[paddle.Tensor]) -> paddle.Tensor:
        """Maps (N, C_i, H / 2**i, W / 2**i), rounded up -> logits (N, num_classes, H, W)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        laterals.append(self.pool_pyramid(maps[-1]))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + self.resized(laterals[i], laterals[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + [laterals[-1]]
        outs = [outs[0]] + [self.resized(x, outs[0]) for x in outs[1:]]
        x = self.fpn_bottleneck(paddle.concat(outs, axis=1))
        return self.conv_seg(self.dropout(x))

    def pool_pyramid(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return averages over a grid of each of `pool_scales`, back at the size of the map."""
        pooled = [self.resized(module(x), x) for module in self.psp_modules]
        return self.bottleneck(paddle.concat([x, *pooled], axis=1))

    def resized(self, x: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
        """Return `x` at the size of the map or image `like`."""
        return self.interpolate(x, paddle.shape(like)[2:], align_corners=self.align_corners)


class FCNHead(nn.Layer):
    """Logits from one map, by one 3x3 convolution and a classifier."""

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.LayerList([ConvNorm(in_channels, channels, 3, relu=True)])
        self.dropout = nn.Dropout2D(DROPOUT)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """(N, C, H, W) -> (N, num_classes, H, W)."""
        return self.conv_seg(self.dropout(self.convs[0](x)))


class UPerNet(nn.Layer):
    """The network whose logits are those of each pixel: a backbone of four maps, the head whose
    logits count, and one for a second loss in training."""

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
        """Return its `ExportForm`, for `replknet_paddle.deploy.export`."""
        from replknet_paddle.segmentation.export import export_form  # what training does not need

        return export_form(self)

    def structural_reparam(self) -> None:
        """Merge the backbone's kernels, in place, for inference."""
        self.backbone.structural_reparam()


def build_upernet(config, *, sync_bn: bool = False) -> UPerNet:
    """Return the network that `config` describes, freshly initialized, with `config` in it."""
    settings, num_classes = config.SEGMENTATION, config.MODEL.NUM_CLASSES
    channels = config.MODEL.CHANNELS
    network = UPerNet(
        build_replknet(config),
        UPerHead(
            channels,
            settings.HEAD_CHANNELS,
            num_classes,
            align_corners=settings.ALIGN_CORNERS,
        ),
        FCNHead(channels[AUXILIARY_STAGE], settings.AUX_CHANNELS, num_classes),
    )
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.config = config
    return network
