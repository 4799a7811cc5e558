"""Takes docs/report.png: the first screen of a report, as a browser shows it. Needs Chromium.

make demo && python 02_oof.py demo --input input/demo --output output/demo
python tests/bench/picture.py                          # output/demo/demo/report.html → docs/report.png
python tests/bench/picture.py output/base/report.html base.png --width 390 --height 844
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import replacing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path, default=Path("output/demo/demo/report.html"))
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/report.png"))
    parser.add_argument("--width", type=int, default=1400, help="px (default 1400)")
    parser.add_argument("--height", type=int, default=1100, help="px (default 1100)")
    args = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser or not args.report.exists():
        sys.exit(f"needs Chromium and {args.report}, which python 02_oof.py writes")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={folder}/profile".split()
        size = f"--window-size={args.width},{args.height}"
        subprocess.run(
            [browser, *flags, size, f"--screenshot={shot}", args.report.resolve().as_uri()],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        data = io.BytesIO()
        Image.open(shot).convert("RGB").quantize(256).save(data, "PNG", optimize=True)  # a third of the bytes
    with replacing(args.picture) as temporary:
        temporary.write_bytes(data.getvalue())


if __name__ == "__main__":
    main()
