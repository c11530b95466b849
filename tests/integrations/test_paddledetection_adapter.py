"""RepLKNet in PaddleDetection: against a stub of its registry, and trained where a clone is on the
path."""

import inspect
import json
from typing import NamedTuple

import numpy as np
import paddle
import pytest
from adapters import FOLDER, clone_of, import_with_stubs, is_norm, launch, read_yaml
from PIL import Image
from tiny import FIXTURES

YAMLS = {
    "cascade": FOLDER / "paddledetection" / "cascade_mask_rcnn_replknet_31b_3x_coco.yml",
    "fcos": FOLDER / "paddledetection" / "fcos_replknet_31b_2x_coco.yml",
}
EXPECTED = np.load(FIXTURES / "tiny31_expected.npz")


class ShapeSpec(NamedTuple):
    channels: int = None
    height: int = None
    width: int = None
    stride: int = None


class Registry(dict):
    """Builds classes from the arguments that PaddleDetection's schema sees: positional ones."""

    def register(self, cls):
        spec = inspect.getfullargspec(cls.__init__)
        assert not spec.kwonlyargs and spec.varkw is None
        self[cls.__name__] = dict(zip(spec.args[1:], spec.defaults))
        self[cls.__name__, "class"] = cls
        return cls

    def create(self, name, **section):
        unknown = set(section) - set(self[name])
        assert not unknown, f"extraneous: {unknown}"
        return self[name, "class"](**{**self[name], **section})


@pytest.fixture
def registry(monkeypatch):
    registry = Registry()
    workspace = {"register": registry.register, "serializable": lambda cls: cls}
    import_with_stubs(
        monkeypatch,
        "integrations.paddledetection.replknet",
        {
            "ppdet": {},
            "ppdet.core": {},
            "ppdet.core.workspace": workspace,
            "ppdet.modeling": {},
            "ppdet.modeling.shape_spec": {"ShapeSpec": ShapeSpec},
        },
    )
    return registry


@pytest.mark.parametrize(
    "name, channels, strides, drop_path_rate",
    [
        ("cascade", [128, 256, 512, 1024], [4, 8, 16, 32], 0.6),
        ("fcos", [256, 512, 1024], [8, 16, 32], 0.5),
    ],
)
def test_the_yaml_builds_31b(name, channels, strides, drop_path_rate, registry):
    tree = read_yaml(YAMLS[name])
    assert tree[tree["architecture"]]["backbone"] == "RepLKNet"
    assert tree["RepLKNet"].pop("pretrained") is True
    backbone = registry.create("RepLKNet", **tree["RepLKNet"])
    assert [shape.channels for shape in backbone.out_shape] == channels
    assert [shape.stride for shape in backbone.out_shape] == strides
    assert backbone.network.stages[3].blocks[3].drop_path.rate == drop_path_rate


def test_it_gives_the_maps_it_is_asked_for(registry, config_file):
    backbone = registry.create(
        "RepLKNet",
        variant=str(config_file("tiny31")),
        return_idx=[1, 3],
        pretrained=str(FIXTURES / "tiny31_official.pth"),
    )
    backbone.eval()
    maps = backbone({"image": paddle.to_tensor(EXPECTED["images"])})
    assert [m.shape[1] for m in maps] == [shape.channels for shape in backbone.out_shape]
    for i, values in zip([1, 3], maps):
        np.testing.assert_allclose(values.numpy(), EXPECTED[f"stage{i}"], atol=1e-4)


@pytest.mark.parametrize("name", YAMLS)
def test_each_model_is_saved_where_its_weights_are_looked_for(name):
    tree = read_yaml(YAMLS[name])
    assert tree["save_dir"] == f"output/{YAMLS[name].stem}"
    assert tree["weights"] == f"{tree['save_dir']}/model_final"


def test_an_export_has_merged_kernels(registry, config_file):
    """By the call of `Trainer._get_infer_cfg_and_input_spec`."""
    backbone = registry.create("RepLKNet", variant=str(config_file("tiny31")))
    detector = paddle.nn.Sequential(backbone)
    detector.eval()
    images = {"image": paddle.to_tensor(EXPECTED["images"])}
    before = detector(images)
    for layer in detector.sublayers():
        if hasattr(layer, "convert_to_deploy"):
            layer.convert_to_deploy()
    for left, right in zip(before, detector(images)):
        np.testing.assert_allclose(left.numpy(), right.numpy(), atol=1e-4)
    names = detector.state_dict()
    assert any("large_kernel_reparam" in name for name in names)
    assert not any("small_kernel" in name or "large_kernel_origin" in name for name in names)


def test_a_classifiers_final_norm_does_not_become_that_of_a_stage(registry, config_file):
    backbone = registry.create(
        "RepLKNet",
        variant=str(config_file("tinyxl")),
        stage_norms=True,
        pretrained=str(FIXTURES / "tinyxl_official.pth"),
    )
    norm = backbone.network.stages[3].norm
    assert (norm.weight.numpy() == 1).all() and (norm._mean.numpy() == 0).all()  # fresh


@pytest.mark.parametrize("name", YAMLS)
def test_norms_and_nothing_else_match_the_rule_for_weight_decay(name, registry, config_file):
    optimizer = read_yaml(YAMLS[name])["OptimizerBuilder"]["optimizer"]
    (group,) = optimizer["param_groups"]
    assert group == {"params": ["norm", "bn"], "weight_decay": 0.0}
    assert optimizer["weight_decay"] == 0.05
    backbone = registry.create("RepLKNet", variant=str(config_file("tinyxl")), stage_norms=True)
    for parameter_name, parameter in backbone.named_parameters():
        assert is_norm(parameter_name) == (len(parameter.shape) == 1), parameter_name


@pytest.fixture
def coco(tmp_path):
    """Four images with two rectangles each, annotated as COCO's instances are."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(4):
        pixels = rng.integers(0, 256, (96, 128, 3)).astype(np.uint8)
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 128, "height": 96})
        for category in (1, 2):
            x, y = int(rng.integers(5, 60)), int(rng.integers(5, 40))
            pixels[y : y + 40, x : x + 50] = 100 * category
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": [x, y, 50, 40],
                    "area": 2000,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + 50, y, x + 50, y + 40, x, y + 40]],
                }
            )
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(
    clone_of("ppdet") is None, reason="no clone of PaddleDetection on the path (PYTHONPATH)"
)
@pytest.mark.parametrize("name", YAMLS)
def test_a_clone_of_paddledetection_trains_it(name, coco, config_file):
    small = coco / "small"
    small.mkdir()
    for path in (*YAMLS.values(), FOLDER / "paddledetection" / "base.yml"):
        text = path.read_text()
        for large, little in (
            ("[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]", "[96, 128]"),
            ("[400, 500, 600]", "[96, 112]"),
            ("min_size: 384, max_size: 600", "min_size: 80, max_size: 96"),
            ("[[640, 1333], [800, 1333]]", "[[96, 256], [128, 256]]"),
            ("batch_size_per_im: 512", "batch_size_per_im: 16"),
            ("post_nms_top_n: 2000", "post_nms_top_n: 32"),
        ):
            text = text.replace(large, little)
        (small / path.name).write_text(text)
    output = launch(
        clone_of("ppdet") / "tools" / "train.py",
        *("-c", small / YAMLS[name].name, "-o", "use_gpu=false", "worker_num=0", "epoch=1"),
        *("log_iter=1", "num_classes=2", f"TrainDataset.dataset_dir={coco}"),
        *("TrainDataset.image_dir=.", "TrainDataset.anno_path=instances.json"),
        f"RepLKNet.variant={config_file('tiny31')}",
        f"RepLKNet.pretrained={FIXTURES / 'tiny31_official.pth'}",
        cwd=coco,
    )
    losses = [float(part.split()[0]) for part in output.split(" loss: ")[1:]]
    assert len(losses) >= 2 and np.isfinite(losses).all()
    assert (coco / "output" / YAMLS[name].stem / "model_final.pdparams").is_file()
