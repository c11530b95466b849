"""Print the baselines of docs/solar_cells.md: support vector machines on pixels and on HOG.

    pip install scikit-learn scikit-image
    python docs/solar_cells_baselines.py cells    # what replknet make-solar-cells wrote; minutes

They are fitted on training and validation images together, with the regularization and the kernel
width of the highest AUC in a cross-validation over these, in four folds.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.feature import hog
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC


def read(folder: Path, *lists: str) -> tuple[list[Image.Image], np.ndarray]:
    lines = [line.rsplit(" ", 1) for name in lists for line in (folder / name).open()]
    return [Image.open(folder / path) for path, _ in lines], np.array([int(y) for _, y in lines])


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((32, 32), Image.BICUBIC)).ravel() / 255


def hog_of(image: Image.Image) -> np.ndarray:
    """9 directions in 8 x 8 cells of 16 pixels, normalized in blocks of 2 x 2 cells."""
    small = np.asarray(image.resize((128, 128), Image.BICUBIC))
    return hog(small, orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2))


if __name__ == "__main__":
    cells = Path(sys.argv[1])
    images, labels = read(cells, "train_list.txt", "val_list.txt")
    test_images, test_labels = read(cells / "test", "val_list.txt")
    print("features class_weight accuracy balanced_accuracy F1 AUC")
    for features_of in (pixels_of, hog_of):
        train, test = (np.array([features_of(i) for i in part]) for part in (images, test_images))
        for weights in (None, "balanced"):
            search = GridSearchCV(
                make_pipeline(StandardScaler(), SVC(class_weight=weights)),
                {
                    "svc__C": [0.3, 1, 3, 10],
                    "svc__gamma": [share / train.shape[1] for share in (0.1, 0.3, 1, 3)],
                },
                cv=StratifiedKFold(4, shuffle=True, random_state=0),
                scoring="roc_auc",
            )
            scores = search.fit(train, labels).decision_function(test)
            figures = (
                accuracy_score(test_labels, scores > 0),
                balanced_accuracy_score(test_labels, scores > 0),
                f1_score(test_labels, scores > 0),
                roc_auc_score(test_labels, scores),
            )
            print(features_of.__name__, weights, *(f"{figure:.3f}" for figure in figures))
