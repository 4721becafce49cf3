"""Quarters of the images of a dataset, those with objects, for tables that two cores can run.

    PYTHONPATH=. python results/tiles/quarters.py DATA OUT

An object belongs to the quarter that its centre lies in, and its box ends there."""

import json
from itertools import pairwise, product
from pathlib import Path

from PIL import Image

from util import coco
from util.cli import Parser, command


def quarters(split, data, out):
    images_dir, json_path = coco.find_split(data, split)
    content = coco.load_json(json_path)
    folder = Path(out) / split
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image in content["images"]:
        picture = Image.open(Path(images_dir) / image["file_name"]).convert("RGB")
        columns, rows = ((0, side // 2, side) for side in picture.size)
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for (top, bottom), (left, right) in product(pairwise(rows), pairwise(columns)):
            found = []
            for a in mine:
                x, y, w, h = a["bbox"]
                if left <= x + w / 2 < right and top <= y + h / 2 < bottom:
                    x0, x1 = (min(max(side, left), right) - left for side in (x, x + w))
                    y0, y1 = (min(max(side, top), bottom) - top for side in (y, y + h))
                    box = [x0, y0, x1 - x0, y1 - y0]
                    found.append(a | {"bbox": box, "area": box[2] * box[3]})
            if found:
                name = f"{Path(image['file_name']).stem}_{left}_{top}.webp"
                crop = picture.crop((left, top, right, bottom))
                crop.save(folder / "images" / name, quality=95)
                n, (width, height) = len(images), crop.size
                images.append({"id": n, "file_name": name, "width": width, "height": height})
                annotations += [a | {"image_id": n, "id": len(annotations) + i + 1}
                                for i, a in enumerate(found)]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": content["categories"]}
    name = f"instancesonly_filtered_{split}.json"
    (folder / name).write_text(json.dumps(content))
    print(f"{folder}: {len(images):,} images, {len(annotations):,} boxes")


@command
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data", help="a dataset in one of the layouts that isaid.py knows")
    parser.add_argument("out", help="folder to write, in the layout of iSAID's patches")
    args = parser.parse_args(argv)
    for split in ("train", "val"):
        quarters(split, args.data, args.out)


if __name__ == "__main__":
    main()
