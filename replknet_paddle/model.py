"""RepLKNet in PaddlePaddle.

"Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022,
arXiv 2203.06717. Section 4 and Figure 4 of the paper: a stem, four stages of RepLK blocks and
ConvFFNs with a transition between stages, and a linear head. Each large depthwise kernel is
trained beside a parallel 5x5 one; structural re-parameterization (Section 3, guideline 3) adds
the two up into one kernel for inference.

Parameter names are those of the published `.pdparams` files, so that
`model.set_state_dict(paddle.load(path))` works. One departure from those files' own code: the
network gives feature maps of any list of stages.
"""

import math
from collections.abc import Sequence

import paddle
from paddle import nn
from paddle.nn import functional as F
from yacs.config import CfgNode

NUM_STAGES = 4


def uniform(fan_in: int) -> paddle.ParamAttr:
    """Return the paper's initialization, uniform in +-1/sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2D:
    """Return a convolution with "same" padding; a depthwise one if groups equals channels."""
    fan_in = in_channels // groups * kernel_size**2
    return nn.Conv2D(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        weight_attr=uniform(fan_in),
        bias_attr=uniform(fan_in) if bias else False,
    )


def classifier(in_channels: int, num_classes: int) -> nn.Layer:
    """Return a linear head, or for 0 classes none: what gives back its input."""
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(
        in_channels,
        num_classes,
        weight_attr=uniform(in_channels),
        bias_attr=uniform(in_channels),
    )


class ConvNorm(nn.Layer):
    """Convolution and batch normalization, then ReLU where `relu` is set."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
    ):
        super().__init__()
        self.conv = conv2d(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        self.norm = nn.BatchNorm2D(out_channels)
        self.relu = relu

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class DropPath(nn.Layer):
    """Stochastic depth (arXiv 1603.09382): drops a sample's branch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = paddle.bernoulli(paddle.full([x.shape[0], 1, 1, 1], keep, dtype="float32"))
        return x * (mask / keep).astype(x.dtype)


class ReparamLargeKernelConv(nn.Layer):
    """Large depthwise convolution with a parallel small one, which merge into a single kernel.

    Three forms: large and small kernel in training; large alone where `small_kernel` is None
    (RepLKNet-XL); one biased convolution after `merge_kernel`, or when built `merged`.
    """

    def __init__(
        self, channels: int, kernel_size: int, small_kernel: int | None, *, merged: bool = False
    ):
        super().__init__()
        if merged:
            self.large_kernel_reparam = conv2d(
                channels, channels, kernel_size, groups=channels, bias=True
            )
            return
        self.large_kernel_origin = ConvNorm(channels, channels, kernel_size, groups=channels)
        if small_kernel is not None:
            self.small_kernel_conv = ConvNorm(channels, channels, small_kernel, groups=channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if hasattr(self, "large_kernel_reparam"):
            return self.large_kernel_reparam(x)
        out = self.large_kernel_origin(x)
        if hasattr(self, "small_kernel_conv"):
            out = out + self.small_kernel_conv(x)
        return out

    @paddle.no_grad()
    def merge_kernel(self) -> None:
        """Replace the branches by the one convolution that computes their sum in evaluation."""
        if hasattr(self, "large_kernel_reparam"):
            return
        weight, bias = fuse_conv_norm(self.large_kernel_origin)
        large = weight.shape[-1]
        if hasattr(self, "small_kernel_conv"):
            small_weight, small_bias = fuse_conv_norm(self.small_kernel_conv)
            margin = (large - small_weight.shape[-1]) // 2
            weight = weight + F.pad(small_weight, [margin] * 4)
            bias = bias + small_bias
            del self.small_kernel_conv
        merged = self.large_kernel_origin.conv  # stays the kind of layer that it has become
        set_weight_and_bias(merged, weight, bias)
        del self.large_kernel_origin
        self.large_kernel_reparam = merged


def scale_and_shift(norm: nn.Layer) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return what a batch norm multiplies by and then adds in evaluation: (channels,), float64."""
    mean, variance, gamma, beta = (
        t.astype("float64") for t in (norm._mean, norm._variance, norm.weight, norm.bias)
    )
    scale = gamma / paddle.sqrt(variance + norm._epsilon)
    return scale, beta - mean * scale


def fuse_conv_norm(layer: ConvNorm) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return weight and bias, float64, of the convolution that equals `layer` in evaluation."""
    scale, shift = scale_and_shift(layer.norm)
    return layer.conv.weight.astype("float64") * scale.reshape([-1, 1, 1, 1]), shift


def set_weight_and_bias(conv: nn.Conv2D, weight: paddle.Tensor, bias: paddle.Tensor) -> None:
    """Give a convolution this weight and bias, in its own precision."""
    dtype = conv.weight.dtype
    if conv.bias is None:
        conv.bias = conv.create_parameter([weight.shape[0]], is_bias=True, dtype=dtype)
    conv.weight.set_value(weight.astype(dtype))
    conv.bias.set_value(bias.astype(dtype))


class RepLKBlock(nn.Layer):
    """x + DropPath(1x1 conv -> large depthwise conv -> 1x1 conv) of the normalized x."""

    def __init__(
        self,
        channels: int,
        dw_channels: int,
        kernel_size: int,
        small_kernel: int | None,
        *,
        drop_path: float,
        merged: bool = False,
    ):
        super().__init__()
        self.pre_large_kernel_bn = nn.BatchNorm2D(channels)
        self.pw_conv_1 = ConvNorm(channels, dw_channels, 1, relu=True)
        self.large_kernel = ReparamLargeKernelConv(
            dw_channels, kernel_size, small_kernel, merged=merged
        )
        self.pw_conv_2 = ConvNorm(dw_channels, channels, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.pw_conv_1(self.pre_large_kernel_bn(x))
        y = F.relu(self.large_kernel(y))
        return x + self.drop_path(self.pw_conv_2(y))


class ConvFFN(nn.Layer):
    """x + DropPath(1x1 conv -> GELU -> 1x1 conv) of the normalized x."""

    def __init__(self, channels: int, hidden_channels: int, *, drop_path: float):
        super().__init__()
        self.pre_ffn_bn = nn.BatchNorm2D(channels)
        self.pw_conv_1 = ConvNorm(channels, hidden_channels, 1)
        self.pw_conv_2 = ConvNorm(hidden_channels, channels, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = F.gelu(self.pw_conv_1(self.pre_ffn_bn(x)))
        return x + self.drop_path(self.pw_conv_2(y))


class RepLKNetStage(nn.Layer):
    """RepLK blocks and ConvFFNs in turn; `norm` is for stage maps alone, not for the next stage."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        drop_paths: list[float],
        *,
        small_kernel: int | None,
        dw_ratio: float,
        ffn_ratio: float,
        merged: bool,
        norm_inter_features: bool,
        recompute: bool,
    ):
        super().__init__()
        self.recompute = recompute
        dw_channels, hidden_channels = int(channels * dw_ratio), int(channels * ffn_ratio)
        self.blocks = nn.LayerList()
        for drop_path in drop_paths:
            self.blocks.append(
                RepLKBlock(
                    channels,
                    dw_channels,
                    kernel_size,
                    small_kernel,
                    drop_path=drop_path,
                    merged=merged,
                )
            )
            self.blocks.append(ConvFFN(channels, hidden_channels, drop_path=drop_path))
        self.norm = nn.BatchNorm2D(channels) if norm_inter_features else nn.Identity()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        for block in self.blocks:
            x = recompute_block(block, x) if self.recompute and block.training else block(x)
        return x


def recompute_block(block: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """Run `block` keeping only its input; the backward pass runs it again for the rest.

    The second run must not move the running statistics a second time. Paddle's function gives
    gradients to no parameter where the input needs none, as behind layers that are frozen.
    """
    if x.stop_gradient and any(not param.stop_gradient for param in block.parameters()):
        x = x.detach()
        x.stop_gradient = False
    from paddle.distributed.fleet.utils import recompute  # slow to import, rarely wanted

    runs = 0

    def run(inputs):
        nonlocal runs
        runs += 1
        norms = [layer for layer in block.sublayers() if hasattr(layer, "_momentum") and runs > 1]
        momenta = [norm._momentum for norm in norms]
        try:
            for norm in norms:
                norm._momentum = 1.0
            return block(inputs)
        finally:
            for norm, momentum in zip(norms, momenta):
                norm._momentum = momentum

    return recompute(run, x)


class RepLKNet(nn.Layer):
    """The network, as a classifier or, with `out_indices`, as a backbone.

    Args:
        large_kernel_sizes: odd kernel size of each stage's large depthwise convolutions.
        layers: number of (RepLK block, ConvFFN) pairs in each stage.
        channels: channels of each stage.
        drop_path_rate: stochastic depth of the last pair, in [0, 1); grows linearly from 0.
        small_kernel: odd size of the parallel small kernel; None for none.
        dw_ratio: channels of the large convolutions over those of the stage.
        ffn_ratio: hidden channels of a ConvFFN over those of the stage.
        in_channels: channels of the images.
        num_classes: size of the head; 0 for none, so that `forward` returns pooled features.
        out_indices: None for a classifier; else the stages, counted from 0, whose maps
            `forward` returns, in this order. A backbone has neither final norm nor head.
        small_kernel_merged: build the form that `structural_reparam` produces.
        norm_inter_features: one more batch norm on each stage's map (official XL backbones).
        sync_bn: batch statistics over all devices (GPU only).
        recompute: keep only the blocks' inputs in training and compute the rest twice.

    Attributes:
        feature_channels: channels of each map that `extract_feat` returns.
        feature_strides: of the same maps, input pixels per position.
        num_features: channels of the last map, and so of the pooled features.
        config: the configuration, where `build_replknet` made the network of one.
        class_names: one for each class, where the weights came with them.
    """

    config: CfgNode
    class_names: Sequence[str] | None = None

    def __init__(
        self,
        *,
        large_kernel_sizes: Sequence[int],
        layers: Sequence[int],
        channels: Sequence[int],
        drop_path_rate: float = 0.0,
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        out_indices: Sequence[int] | None = None,
        small_kernel_merged: bool = False,
        norm_inter_features: bool = False,
        sync_bn: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.num_features = channels[-1]
        indices = range(NUM_STAGES) if out_indices is None else out_indices
        self.feature_channels = tuple(channels[i] for i in indices)
        self.feature_strides = tuple(4 * 2**i for i in indices)

        # (N, 3, H, W) -> (N, C0, H/4, W/4)
        stem = channels[0]
        self.stem = nn.LayerList(
            [
                ConvNorm(in_channels, stem, 3, stride=2, relu=True),
                ConvNorm(stem, stem, 3, groups=stem, relu=True),
                ConvNorm(stem, stem, 1, relu=True),
                ConvNorm(stem, stem, 3, stride=2, groups=stem, relu=True),
            ]
        )

        depth = sum(layers)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.stages = nn.LayerList()
        self.transitions = nn.LayerList()
        for i, width in enumerate(channels):
            first = sum(layers[:i])
            self.stages.append(
                RepLKNetStage(
                    width,
                    large_kernel_sizes[i],
                    rates[first : first + layers[i]],
                    small_kernel=small_kernel,
                    dw_ratio=dw_ratio,
                    ffn_ratio=ffn_ratio,
                    merged=small_kernel_merged,
                    norm_inter_features=norm_inter_features,
                    recompute=recompute,
                )
            )
            if i + 1 < NUM_STAGES:  # (N, C, H, W) -> (N, C', H/2, W/2)
                wider = channels[i + 1]
                self.transitions.append(
                    nn.Sequential(
                        ConvNorm(width, wider, 1, relu=True),
                        ConvNorm(wider, wider, 3, stride=2, groups=wider, relu=True),
                    )
                )

        if self.out_indices is None:
            self.norm = nn.BatchNorm2D(self.num_features)
            self.head = classifier(self.num_features, num_classes)
        if sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        if self.out_indices is not None:  # frozen, because no gradient reaches them
            last = max(self.out_indices)
            norms = [stage.norm for i, stage in enumerate(self.stages) if i not in self.out_indices]
            for layer in (*norms, *self.stages[last + 1 :], *self.transitions[last:]):
                for parameter in layer.parameters():
                    parameter.stop_gradient = True

    def forward_stages(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return each stage's map: strides 4, 8, 16 and 32 of the images (N, 3, H, W)."""
        for layer in self.stem:
            x = layer(x)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.transitions[i - 1](x)
            x = stage(x)
            maps.append(x)
        return maps

    def extract_feat(self, x: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        """Return the maps of `out_indices`, or of all four stages of a classifier.

        Images (N, 3, H, W) give maps (N, channels[i], H / 2**(i+2), W / 2**(i+2)), rounded up.
        """
        maps = self.forward_stages(x)
        indices = range(NUM_STAGES) if self.out_indices is None else self.out_indices
        return tuple(self.stages[i].norm(maps[i]) for i in indices)

    def forward_features(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return a classifier's last map, normalized: (N, 3, H, W) -> (N, C, H/32, W/32).

        Raises:
            ValueError: a backbone has no final norm.
        """
        self._refuse_backbone()
        return self.norm(self.forward_stages(x)[-1])

    def forward_head(self, x: paddle.Tensor, pre_logits: bool = False) -> paddle.Tensor:
        """Return the logits (N, num_classes) of the map that `forward_features` returned.

        With `pre_logits`, and where there is no head, these are the pooled features (N, C).

        Raises:
            ValueError: a backbone has no head.
        """
        self._refuse_backbone()
        x = x.mean(axis=[2, 3])  # (N, C, H/32, W/32) -> (N, C)
        return x if pre_logits else self.head(x)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        """Images (N, 3, H, W) -> logits (N, num_classes), or the maps of `out_indices`."""
        if self.out_indices is not None:
            return self.extract_feat(x)
        return self.forward_head(self.forward_features(x))

    def _refuse_backbone(self) -> None:
        if self.out_indices is not None:
            raise ValueError(f"out_indices is {self.out_indices}: a backbone has no head")

    def reset_classifier(self, num_classes: int) -> None:
        """Give a classifier a fresh head; 0 takes it away, and `forward` returns pooled features.

        The number in `config` changes as well, and what names the classes is forgotten.

        Raises:
            ValueError: a number below 0, or a backbone, which has no head.
        """
        self._refuse_backbone()
        if type(num_classes) is not int or num_classes < 0:
            raise ValueError(f"num_classes is {num_classes!r}; allowed: an integer >= 0")
        self.head = classifier(self.num_features, num_classes)
        self.class_names = None
        if hasattr(self, "config"):
            self.config = self.config.clone()
            self.config.defrost()
            self.config.MODEL.NUM_CLASSES, self.config.DATA.CLASS_NAMES = num_classes, None
            self.config.freeze()

    def structural_reparam(self) -> None:
        """Merge every small kernel and batch norm into its large kernel, in place, for inference.

        Outputs in evaluation mode stay the same up to rounding. A second call changes nothing.
        """
        for layer in self.sublayers():
            if isinstance(layer, ReparamLargeKernelConv):
                layer.merge_kernel()

    def switch_to_deploy(self) -> None:
        """`structural_reparam` under the name that mmpretrain gives it."""
        self.structural_reparam()


def build_replknet(config: CfgNode, *, sync_bn: bool = False) -> RepLKNet:
    """Return the network that `config` (see config.py) describes, freshly initialized.

    It carries that configuration as `config`, for what comes before and after the network.

    Args:
        config: a yacs node with MODEL.*.
        sync_bn: batch statistics over all devices; whether it applies depends on the run
            (MODEL.SYNC_BN, GPUs, several processes), so the caller decides.
    """
    model = config.MODEL
    if model.NUM_CLASSES is None and model.OUT_INDICES is None:
        raise ValueError("MODEL.NUM_CLASSES is None; allowed here: an integer >= 1")
    network = RepLKNet(
        large_kernel_sizes=model.LARGE_KERNEL_SIZES,
        layers=model.LAYERS,
        channels=model.CHANNELS,
        drop_path_rate=model.DROPPATH,
        small_kernel=model.SMALL_KERNEL,
        dw_ratio=model.DW_RATIO,
        ffn_ratio=model.FFN_RATIO,
        num_classes=model.NUM_CLASSES,
        out_indices=model.OUT_INDICES,
        small_kernel_merged=model.SMALL_KERNEL_MERGED,
        norm_inter_features=model.NORM_INTER_FEATURES,
        sync_bn=sync_bn,
        recompute=model.RECOMPUTE,
    )
    network.config = config
    return network
