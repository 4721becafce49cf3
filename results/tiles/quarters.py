"""Cut the images of a dataset into quarters and keep those with objects, for runs on two CPU cores.

    python -m results.tiles.quarters DATA OUT

An object belongs to the quarter that the center of its box lies in; its box is clipped there.
"""

import json
from itertools import pairwise
from pathlib import Path

from util import coco
from util.cli import Parser, cli_main
from util.images import read_image


def clipped_annotations(annotations, left, top, right, bottom):
    """Return copies of the annotations whose center lies in a window, relative to the window."""
    clipped = []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        if left <= x + w / 2 < right and top <= y + h / 2 < bottom:
            x0 = min(max(x, left), right) - left
            x1 = min(max(x + w, left), right) - left
            y0 = min(max(y, top), bottom) - top
            y1 = min(max(y + h, top), bottom) - top
            box = [x0, y0, x1 - x0, y1 - y0]
            clipped.append({**annotation, "bbox": box, "area": box[2] * box[3]})
    return clipped


def quarters(split, data, out):
    """Write the quarters of a split, "train" or "val", of a dataset to the folder `out`."""
    images_dir, json_path = coco.find_split(data, split)
    content = coco.load_json(json_path)
    folder = Path(out) / split
    (folder / "images").mkdir(parents=True)
    new_images = []
    new_annotations = []
    for record in content["images"]:
        image, (W, H) = read_image(coco.find_image(images_dir, record["file_name"]))
        annotations = [a for a in content["annotations"] if a["image_id"] == record["id"]]
        for top, bottom in pairwise([0, H // 2, H]):
            for left, right in pairwise([0, W // 2, W]):
                inside = clipped_annotations(annotations, left, top, right, bottom)
                if not inside:
                    continue
                image_id = len(new_images)
                name = f"{image_id:06}.webp"
                image.crop((left, top, right, bottom)).save(folder / "images" / name, quality=95)
                new_images.append(
                    {
                        "id": image_id,
                        "file_name": name,
                        "width": right - left,
                        "height": bottom - top,
                    }
                )
                for annotation in inside:
                    annotation["image_id"] = image_id
                    annotation["id"] = len(new_annotations) + 1
                    new_annotations.append(annotation)
    new_content = {
        "images": new_images,
        "annotations": new_annotations,
        "categories": content["categories"],
    }
    name = f"instancesonly_filtered_{split}.json"
    (folder / name).write_text(json.dumps(new_content))
    print(f"{folder}: {len(new_images):,} images, {len(new_annotations):,} boxes")


@cli_main
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data", help="folder of a dataset in one of the layouts of isaid.py")
    parser.add_argument("out", help="folder to write, in the layout of tiled iSAID")
    args = parser.parse_args(argv)
    for split in ("train", "val"):
        quarters(split, args.data, args.out)


if __name__ == "__main__":
    main()
