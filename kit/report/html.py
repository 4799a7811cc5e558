"""How do tables and images become HTML?

Names and labels come from strangers' files: each goes through html.escape here. An image's JPEG is in a page once,
however many sections show it: the later ones name it, and the page's script fills them in.
"""

import base64
import html

import cv2
import numpy as np

from common import UserError, prepared_folder, warn
from kit.data.prepared import open_images, read_prepared

SIDE = 192  # px of an embedded image's side: the thumbnail and the enlarged view share it
text = html.escape  # every name, label and message goes through it


def paragraphs(lines):
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def table(frame, marked=None):
    """An HTML table of a pandas table and its index; every cell is escaped here. The row `marked` stands out."""
    head = "".join(f"<th>{text(str(cell))}</th>" for cell in [frame.index.name or "", *frame.columns])
    body = ""
    for name, *cells in frame.itertuples():
        cells = [f"{cell:.4f}" if isinstance(cell, float) else text(str(cell)) for cell in [name, *cells]]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f"<tr{' class=marked' if name == marked else ''}>{row}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def thumbs(figures):
    """A wall of figures; a click enlarges one."""
    return f'<div class="thumbs">{"".join(figures)}</div>'


def jpeg(pixels, side=SIDE, quality=75):
    """uint8 [H, W, 3] RGB → a JPEG as a data: URL, shrunk where its longer side is above `side` px."""
    scale = min(1, side / max(pixels.shape[:2]))
    if scale < 1:
        size = [max(1, round(scale * length)) for length in pixels.shape[1::-1]]
        pixels = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


class Pictures:
    """The training images of an experiment, as figures of one page.

    bytes: how much of the page they take so far. there: whether 00_prepare.py's cache of images is."""

    def __init__(self, args, oof):
        _, folds = read_prepared(args)
        self.rows, self.names = np.flatnonzero(folds.fold.isin(oof.present)), oof.folds.image_name.to_numpy()
        sizes = [size for size in oof.prepared["sizes"] if (prepared_folder(args) / f"train_{size}.npy").exists()]
        enough = [size for size in sizes if size >= SIDE]
        self.there, self.shown, self.bytes = bool(sizes), set(), 0
        if self.there:  # the smallest that is large enough, else the largest
            size = min(enough) if enough else max(sizes)
            try:
                self.images = open_images(args, oof.prepared, "train", size, len(folds))
            except UserError as error:  # the scores are worth a page without images
                warn(f"no images in the report: {error}")
                self.there = False

    def pixels(self, i):
        """→ the image in row i of oof.folds, uint8 [S, S, 3] RGB."""
        return self.images[self.rows[i]]

    def figure(self, i, lines, overlay=None, **data):
        """The figure of the image in row i of oof.folds, under it its name and `lines`. overlay: uint8 [S, S, 3] RGB,
        shown beside it. data: the figure's data- attributes, strings or numbers."""
        caption = "".join(f"<span>{text(line)}</span>" for line in [self.names[i], *lines])
        attributes = "".join(f' data-{key}="{text(str(value))}"' for key, value in data.items())
        shown = ""
        if self.there:
            images = self.image(i) + ("" if overlay is None else f'<img alt="" src="{jpeg(overlay)}">')
            label = text(f"enlarge {self.names[i]}")
            shown = f'<button type="button" class="shot" aria-label="{label}">{images}</button>'
        pair = "" if overlay is None else ' class="pair"'
        return f"<figure{pair}{attributes}>{shown}<figcaption>{caption}</figcaption></figure>"

    def image(self, i):
        if i in self.shown:
            return f'<img alt="" data-shot="{i}">'
        source = jpeg(self.pixels(i))
        self.shown.add(i)
        self.bytes += len(source)
        return f'<img alt="" data-shot="{i}" src="{source}">'
