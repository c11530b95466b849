"""`replknet embed` and `replknet probe`: features of pictures, and what they tell apart."""

import os
from pathlib import Path

import numpy as np
import paddle
import pytest
from harness import make_run
from tiny import PICTURES, command, make_data, rows_of

from replknet_paddle.analysis.probe import load_features, probe, save_features
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.checkpoints.load import load_state
from replknet_paddle.deploy.backends import BACKENDS
from replknet_paddle.deploy.predict import Predictor
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.zoo import open_network

embed, probe_command = command("embed"), command("probe")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder, and a dataset beside it; this process is in their folder.

    Fitted to eight pictures, some variances are nearly 0, which no training leaves, and make
    rounding errors a hundred times as large; so each grows by a share of its layer's mean.
    """
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    make_data(tmp_path / "data", train=16, val=8)
    state = load_state(make_run(tmp_path / "run") / "best")
    for name in [name for name in state if name.endswith("_variance")]:
        state[name] = state[name] + 0.3 * state[name].mean()
    write_safetensors("run/best", state, {})
    return str(tmp_path / "run")


@pytest.mark.numbers
@pytest.mark.parametrize("name", BACKENDS)
def test_features_are_what_the_head_gets_on_every_backend(run, name):
    """Within 1e-5 of the length of each picture's features; so are those of an export."""
    for package in BACKENDS[name].packages:
        pytest.importorskip(package)
    assert embed([run, *PICTURES, f"-backend={name}", "-output=a.npy", "-batch_size=2"]) == 0
    network = open_network(run)
    batch = np.stack([Predictor(network, backend="eager").preprocess(path) for path in PICTURES])
    with paddle.no_grad():
        maps = network.forward_features(paddle.to_tensor(batch))
        wanted = network.forward_head(maps, pre_logits=True).numpy()
    files = ["a.npy"]
    if name != "eager":
        form = [f"-format={BACKENDS[name].format}", "-opts", "MODEL.NUM_CLASSES", "0"]
        assert command("export")([run, "-output=exported", *form]) == 0
        assert embed(["exported", *PICTURES, f"-backend={name}", "-output=b.npy"]) == 0
        files.append("b.npy")
    for file in files:
        found = np.load(file)
        assert found.dtype == np.float32 and found.shape == wanted.shape == (len(PICTURES), 10)
        lengths = np.linalg.norm(wanted, axis=1, keepdims=True)
        assert (np.abs(found - wanted) <= 1e-5 * lengths).all()
        assert wanted.std(axis=0).max() > 0.05 * lengths.min()  # pictures differ


def test_each_row_has_its_path_and_the_label_of_its_list_or_folder(run, monkeypatch, capsys):
    Path("data/broken.jpg").write_bytes(Path(PICTURES[1]).read_bytes()[:900])
    with open("data/val_list.txt", "a") as file:
        file.write("broken.jpg 3\n")
    assert embed([run, "data/val_list.txt", "data/train", "-output=a.npy"]) == 1
    said = capsys.readouterr().err
    assert "embedded 24 images, skipped 1" in said and "  data/broken.jpg: " in said
    rows = rows_of("a.csv")
    assert rows[0] == ["path", "label"] and len(rows) == 25 == 1 + len(np.load("a.npy"))
    listed = [line.rsplit(" ", 1) for line in Path("data/val_list.txt").read_text().splitlines()]
    assert rows[1:9] == [[f"data/{path}", label] for path, label in listed[:8]]
    assert {label for _, label in rows[9:]} == {f"class {i}" for i in range(4)}
    monkeypatch.chdir("data/val/class 2")
    assert embed([run, ".", "-output=here.npy"]) == 0
    assert set(load_features("here.npy")[1]) == {"class 2"}


def test_what_cannot_be_embedded_leaves_no_file(run, capsys):
    state = load_state(f"{run}/best")
    state["norm.bias"] = np.full_like(state["norm.bias"], np.nan)
    write_safetensors("nan.safetensors", state, {})
    Path("broken.jpg").write_bytes(b"none")
    flags = ["-output=new.npy", f"-cfg={run}/config.yaml", "-backend=eager"]
    for words, says in (
        ([run, "broken.jpg", "-output=new.npy"], "nothing could be embedded"),
        (["nan.safetensors", PICTURES[0], *flags], "that are all finite"),
    ):
        assert embed(words) == 2
        assert says in capsys.readouterr().err and not list(Path().glob("new*"))


def nearest(train, val, k: int) -> list[str]:
    """The vote of the k nearest by the cosine, picture by picture."""
    answers = []
    for x in val[0]:
        cosines = [x @ y / np.sqrt((x @ x) * (y @ y)) for y in train[0]]
        votes = [train[1][i] for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]]
        answers.append(min(set(votes), key=lambda label: (-votes.count(label), label)))
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_their_definitions(seed):
    """With tied votes, repeated pictures, and classes that are absent from what is judged."""
    linear = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, 6))

    def draw(count, classes):
        labels = rng.integers(0, classes, count)
        values = centres[labels] + rng.normal(size=(count, 6)) * 1.5 + 3
        return np.concatenate([values, values[:5]]), np.array([*labels, *labels[:5]]).astype(str)

    train, val = draw(60, 5), draw(40, 4)
    k = int(rng.integers(1, 5)) * 2
    mean, spread = train[0].mean(0), train[0].std(0)
    model = linear.LogisticRegression(max_iter=1000).fit((train[0] - mean) / spread, train[1])
    answers = {
        "logistic regression": model.predict((val[0] - mean) / spread),
        f"{k} nearest neighbours": np.array(nearest(train, val, k)),
    }
    found = probe(train, val, k=k)
    assert found.keys() == answers.keys()
    for name, answer in answers.items():
        recalls = metrics.recall_score(val[1], answer, average=None, labels=np.unique(val[1]))
        wanted = metrics.accuracy_score(val[1], answer), recalls.mean()
        assert found[name] == pytest.approx(wanted, abs=1e-9)


def test_features_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def save(name, values, labels):
        np.save(f"{name}.npy", values)
        lines = [f"{i}.jpg,{label}\n" for i, label in enumerate(labels)]
        Path(f"{name}.csv").write_text("".join(["path,label\n", *lines]))

    good = np.arange(12, dtype="f").reshape(4, 3)
    save("good", good, "aabb")
    for name, values, labels, says in (
        ("size", good[:, :2], "aabb", "3 features to learn from, 2 to judge by"),
        ("unknown", good, "abcd", "labels to judge by that none to learn from has: c, d"),
        ("short", good, "aab", "short.npy has 4 rows, the .csv file beside it 3, of which 3"),
        ("unlabelled", good, ["a", "", "b", ""], "4, of which 2 have a label"),
        ("nan", np.where(good > 3, np.nan, good), "aabb", "nan.npy: features are float32 (4, 3)"),
        ("flat", good[0], "aab", "flat.npy: features are float32 (3,)"),
        ("none", good[:0], "", "none.npy: features are float32 (0, 3)"),
        ("pickled", np.array([{}]), "a", "pickled.npy: no .npy file of replknet embed"),
        ("huge", good.astype(float) * 1e200, "aabb", "huge.npy: features are float64 (4, 3)"),
    ):
        save(name, values, labels)
        assert probe_command(["good.npy", f"{name}.npy", "-k=1"]) == 2
        assert says in capsys.readouterr().err
    save("one", good, "aaaa")
    save("cut", good, "aabb")
    Path("cut.npy").write_bytes(Path("cut.npy").read_bytes().replace(b"}", b" "))
    os.rename("short.csv", "kept.csv")
    for words, says in (
        (["one.npy", "one.npy"], "one label, a, to learn from; allowed: two or more"),
        (["good.npy", "good.npy"], "-k is 20; allowed: 1 to 4"),
        (["good.npy", "good.npy", "-k=0"], "-k is 0"),
        (["nowhere.npy", "good.npy"], "No such file or directory: 'nowhere.npy'"),
        (["short.npy", "good.npy"], "short.csv"),
        (["kept.csv", "good.npy"], "kept.csv: no .npy file"),
        (["cut.npy", "good.npy"], "cut.npy: no .npy file"),
    ):
        assert probe_command(words) == 2
        assert says in capsys.readouterr().err


def test_features_never_stand_beside_the_labels_of_others(tmp_path, monkeypatch):
    """Where the second of the two files cannot have its name, there are no features."""
    path, replace = str(tmp_path / "x.npy"), os.replace
    save_features(path, np.zeros((1, 2), "f"), [("a", "old")])

    def fail(source, target, **options):
        if str(target).endswith(".npy"):
            raise OSError(28, "No space left on device")
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_features(path, np.ones((1, 2), "f"), [("b", "new")])
    with pytest.raises(InputError, match="no .npy file"):
        load_features(path)


def test_names_of_any_letters_are_read_back(tmp_path):
    rows = [('a\rb\n,".jpg', "é\udcff"), ("c", "5")]
    save_features(str(tmp_path / "x.npy"), np.eye(2, dtype="f"), rows)
    assert load_features(str(tmp_path / "x.npy"))[1].tolist() == ["é\udcff", "5"]
