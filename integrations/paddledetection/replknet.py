"""RepLKNet as a backbone of PaddleDetection (develop branch); see docs/integrations.md."""

from paddle import nn
from ppdet.core.workspace import register, serializable
from ppdet.modeling.shape_spec import ShapeSpec

from integrations.backbone import build_backbone, map_channels


@register
@serializable
class RepLKNet(nn.Layer):
    """Maps of a RepLKNet at strides 4, 8, 16 and 32, or those of them that `return_idx` lists.

    Weights are given by `pretrained`, not by PaddleDetection's `pretrain_weights`: its loader
    matches the ends of names, and so puts a classifier's final norm into a stage.

    Args: those of `integrations.backbone.build_backbone`; `return_idx` is its `out_indices`. They
    can be given by position, because PaddleDetection takes only such arguments from its YAML files.
    """

    def __init__(
        self,
        variant="replknet_31b",
        return_idx=[0, 1, 2, 3],  # noqa: B006  (the schema's defaults; never changed)
        drop_path_rate=0.5,
        stage_norms=False,
        recompute=False,
        pretrained=None,
    ):
        super().__init__()
        self.network = build_backbone(
            variant,
            out_indices=return_idx,
            drop_path_rate=drop_path_rate,
            stage_norms=stage_norms,
            recompute=recompute,
            pretrained=pretrained,
        )

    def forward(self, inputs):
        """inputs["image"] (N, 3, H, W) -> maps (N, C, H / stride, W / stride), rounded up."""
        return list(self.network(inputs["image"]))

    @property
    def out_shape(self):
        """Channels and stride of each map."""
        return [
            ShapeSpec(channels=channels, stride=4 * 2**i)
            for channels, i in zip(map_channels(self.network), self.network.out_indices)
        ]
