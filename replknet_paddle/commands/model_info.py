"""Print the parameters and multiply-adds of the network that a config describes."""

from replknet_paddle.commands.flags import add_config_flags, config_from
from replknet_paddle.commands.train import task_of

EXAMPLES = "example: replknet model-info -cfg configs/replknet_xl.yaml"


def add_arguments(parser) -> None:
    add_config_flags(parser, required=True)


def run(args) -> int:
    config = config_from(args)  # before Paddle is imported, which takes longer

    from replknet_paddle.analysis.costs import count_macs, count_parameters

    size = config.DATA.IMAGE_SIZE
    model = task_of(config).network(config)
    print(f"{config.MODEL.NAME}: {size}x{size}, {config.MODEL.NUM_CLASSES} classes")
    print(f"{'form':8}{'parameters':>16}{'multiply-adds':>20}")
    forms = [] if config.MODEL.SMALL_KERNEL_MERGED else ["train"]
    for form in [*forms, "merged"]:
        if form == "merged":
            model.structural_reparam()
        print(f"{form:8}{count_parameters(model):16,}{count_macs(model, size):20,}", flush=True)
    return 0
