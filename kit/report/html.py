"""HTML of tables and images.

Names and labels come from strangers' files: each goes through html.escape here. An image's JPEG is in a page once,
however many sections show it: the later ones refer to it, and the page's script fills them in.
"""

import base64
import html

from common import UserError, warn

import cv2
import numpy as np

from kit.data.prepared import read_prepared

SIDE = 192  # px of an embedded image's side: the thumbnail and the enlarged view share it
text = html.escape  # every name, label and message goes through it


def paragraphs(lines):
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def table(frame, marked=None):
    """Return an HTML table of a pandas table and its index; every cell is escaped here. The row `marked` stands out."""
    head = "".join(f"<th>{text(str(cell))}</th>" for cell in [frame.index.name or "", *frame.columns])
    body = ""
    for name, *cells in frame.itertuples():
        cells = [f"{cell:.4f}" if isinstance(cell, float) else text(str(cell)) for cell in [name, *cells]]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f"<tr{' class=marked' if name == marked else ''}>{row}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def thumbs(figures):
    """Return a wall of figures; a click enlarges one."""
    return f'<div class="thumbs">{"".join(figures)}</div>'


def jpeg(pixels, side=SIDE, quality=75):
    """Return uint8 [H, W, 3] RGB as a JPEG in a data: URL, shrunk where its longer side is above `side` px."""
    longer = max(pixels.shape[:2])
    if longer > side:
        size = [max(1, round(side / longer * length)) for length in pixels.shape[1::-1]]
        pixels = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def training_images(oof, size):
    """Return (the cached training images at `size` px, the row in them of each row of oof.folds, int [N])."""
    _, folds = read_prepared(oof.prepared.folder.parent)
    images = oof.prepared.open_images("train", size, len(folds))
    return images, np.flatnonzero(folds.fold.isin(oof.present))


class Pictures:
    """The training images of an experiment, None without a cache of them, as figures of one page. bytes: how much of
    the page they take so far."""

    def __init__(self, oof):
        self.folds, self.images, self.shown, self.bytes = oof.folds, None, set(), 0
        sizes = [size for size in oof.prepared.sizes if (oof.prepared.folder / f"train_{size}.npy").exists()]
        if sizes:
            try:
                size = min((size for size in sizes if size >= SIDE), default=max(sizes))
                self.images, self.rows = training_images(oof, size)
            except UserError as error:  # the scores are worth a page without images
                warn(f"no images in the report: {error}")

    def figure(self, i, lines, overlay=None, **data):
        """Return the figure of the image in row i of oof.folds; below it its name, `lines`, its fold and its group.
        overlay: uint8 [S, S, 3] RGB, shown beside it. data: the figure's data- attributes, strings or numbers."""
        row, shown = self.folds.loc[i], ""
        lines = [row.image_name, *lines, f"fold {row.fold}, group {row.group}"]
        caption = "".join(f"<span>{text(line)}</span>" for line in lines)
        attributes = "".join(f' data-{key}="{text(str(value))}"' for key, value in data.items())
        if self.images is not None:
            source = "" if i in self.shown else f' src="{jpeg(self.images[self.rows[i]])}"'
            self.shown.add(i)
            self.bytes += len(source)
            beside = "" if overlay is None else f'<img alt="" src="{jpeg(overlay)}">'
            shown = f'<button type="button" class="shot" aria-label="{text(f"enlarge {row.image_name}")}">'
            shown += f'<img alt="" data-shot="{i}"{source}>{beside}</button>'
        pair = "" if overlay is None else ' class="pair"'
        return f"<figure{pair}{attributes}>{shown}<figcaption>{caption}</figcaption></figure>"
