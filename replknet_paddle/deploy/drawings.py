"""Files of pictures with their predictions drawn beside: one each, and the first ones in a grid."""

import os
from collections.abc import Sequence

from PIL import Image

from replknet_paddle.deploy.pictures import annotate, grid, save
from replknet_paddle.deploy.predictor import Prediction
from replknet_paddle.runtime.files import path_in_error

PICTURE_HEIGHT = 480  # pixels, of the saved pictures
GRID_COLUMNS = 3
GRID_HEIGHT = 160  # pixels, of each picture in the grid
GRID_PICTURES = 12


class Drawings:
    """Draws predictions as they come.

    Args:
        class_names: text for each class.
        folder: new or empty folder for a file each, numbered; None for none.
        grid_file: for the first `GRID_PICTURES` in one picture; None for none.
    """

    def __init__(self, class_names: Sequence[str], folder: str | None, grid_file: str | None):
        self.class_names = class_names
        self.folder = folder
        self.grid_file = grid_file
        self.count = 0
        self.cells = []

    def add(self, prediction: Prediction) -> None:
        """Draw a prediction that has a picture.

        Raises:
            OSError: the file cannot be written.
        """
        self.count += 1
        if self.folder is not None:
            with path_in_error(self.folder):
                os.makedirs(self.folder, exist_ok=True)
            # The number keeps apart what has one name in several folders.
            stem = os.path.splitext(os.path.basename(prediction.path))[0]
            name = f"{self.count:06d}_{stem[:50]}.jpg"
            save(self.draw(prediction, PICTURE_HEIGHT), os.path.join(self.folder, name))
        if self.grid_file is not None and len(self.cells) < GRID_PICTURES:
            self.cells.append(self.draw(prediction, GRID_HEIGHT))

    def draw(self, prediction: Prediction, height: int) -> Image.Image:
        """The prediction's picture and its classes, `height` pixels high."""
        folder, name = os.path.split(prediction.path)
        truth = None if prediction.truth is None else self.class_names[prediction.truth]
        return annotate(
            prediction.picture,
            [self.class_names[label] for label in prediction.labels],
            prediction.scores,
            caption=os.path.join(os.path.basename(folder), name),
            height=height,
            truth=truth,
        )

    def finish(self) -> None:
        """Write the grid, if there is anything in it.

        Raises:
            OSError: it cannot be written.
        """
        if self.cells:
            save(grid(self.cells, GRID_COLUMNS), self.grid_file)
