"""What both adapters build: RepLKNet as a backbone, with weights read by this project's readers."""

from replknet_paddle.checkpoints.convert import load_pretrained
from replknet_paddle.config import CONFIG_FOLDER, get_config
from replknet_paddle.model import RepLKNet, build_replknet


def build_backbone(
    variant: str,
    *,
    out_indices: list[int],
    drop_path_rate: float,
    stage_norms: bool,
    recompute: bool,
    pretrained: str | None,
) -> RepLKNet:
    """A RepLKNet that returns maps.

    Args:
        variant: name of a file of configs/, without its suffix, or the path of a YAML file.
        out_indices: stages, from 0, whose maps to return.
        drop_path_rate: stochastic depth of the last block.
        stage_norms: one more batch norm on each map, as the official XL models have it.
        recompute: keep only the inputs of the blocks in training, and compute the rest twice.
        pretrained: checkpoint file, of any format and naming that the project reads; a classifier's
            final norm and head are left out. None: random weights.

    Raises:
        FileNotFoundError: no such variant or checkpoint.
        InputError: wrong values, or a checkpoint that does not fit.
    """
    known = CONFIG_FOLDER / f"{variant}.yaml"
    config = get_config(
        known if known.is_file() else variant,
        MODEL__OUT_INDICES=list(out_indices),
        MODEL__DROPPATH=drop_path_rate,
        MODEL__NORM_INTER_FEATURES=stage_norms,
        MODEL__RECOMPUTE=recompute,
    )
    network = build_replknet(config)
    if pretrained:
        load_pretrained(network, pretrained)
    return network


def map_channels(network: RepLKNet) -> list[int]:
    """The channels of each map that the network returns."""
    return [network.config.MODEL.CHANNELS[i] for i in network.out_indices]
