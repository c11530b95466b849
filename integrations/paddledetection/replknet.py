"""RepLKNet as a backbone of PaddleDetection (develop branch); see docs/integrations.md."""

from paddle import nn
from ppdet.core.workspace import register, serializable
from ppdet.modeling.shape_spec import ShapeSpec

from replknet_paddle.zoo import get_model


@register
@serializable
class RepLKNet(nn.Layer):
    """Maps of a RepLKNet at strides 4, 8, 16 and 32, or those of them that `return_idx` lists.

    Weights are given by `pretrained`, not by PaddleDetection's `pretrain_weights`: its loader
    matches the ends of names, and so puts a classifier's final norm into a stage. Arguments can be
    given by position, because PaddleDetection takes only such arguments from its YAML files.

    Args:
        variant: name of a published model, or path of a YAML file.
        return_idx: stages, from 0, whose maps to return.
        drop_path_rate: stochastic depth of the last block.
        stage_norms: one more batch norm on each map, as the official XL models have it.
        recompute: keep only the inputs of the blocks in training, and compute the rest twice.
        pretrained: as in `get_model`; a classifier's final norm and head are left out.
    """

    def __init__(
        self,
        variant="replknet-31b-1k-224",
        return_idx=(0, 1, 2, 3),
        drop_path_rate=0.5,
        stage_norms=False,
        recompute=False,
        pretrained=False,
    ):
        super().__init__()
        self.network = get_model(
            variant,
            pretrained=pretrained,
            out_indices=return_idx,
            MODEL__DROPPATH=drop_path_rate,
            MODEL__NORM_INTER_FEATURES=stage_norms,
            MODEL__RECOMPUTE=recompute,
        )

    def forward(self, inputs):
        """inputs["image"] (N, 3, H, W) -> maps (N, C, H / stride, W / stride), rounded up."""
        return list(self.network(inputs["image"]))

    def convert_to_deploy(self):
        """Merge the small kernels; PaddleDetection calls this before it exports."""
        self.network.structural_reparam()

    @property
    def out_shape(self):
        """Channels and stride of each map."""
        maps = zip(self.network.feature_channels, self.network.feature_strides)
        return [ShapeSpec(channels=channels, stride=stride) for channels, stride in maps]
