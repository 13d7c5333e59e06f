#!/usr/bin/env bash
# webdataset: a key with a dot in it is written, and comes back as one sample made of several.
#
# webdataset 1.0.2. TarWriter takes the keys "photo.1" and "photo.2" without a word and writes
# photo.1.cls, photo.1.png, photo.2.cls, photo.2.png. The reader takes all behind the first dot for
# the ending, so the two are one sample, "photo", with four fields, none of which is called png
# or cls. File names such as IMG_1.edited.png make such keys; the samples are fewer, no count says
# so, and to_tuple("png", "cls") drops or refuses them.
# We guessed: the writer refuses or escapes such a key, or the reader gives two samples.
# Seen:
#   written: 2 samples
#   in the file: photo.1.cls photo.1.png photo.2.cls photo.2.png
#   read: 1 sample, key photo, fields 1.cls 1.png 2.cls 2.png
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
cd "$folder"

venv/bin/python - <<'EOF'
import sys
import tarfile

import numpy as np
import webdataset

with webdataset.TarWriter("shard.tar") as writer:
    for number in (1, 2):
        picture = np.full((4, 4, 3), number, np.uint8)
        writer.write({"__key__": f"photo.{number}", "png": picture, "cls": number})
print("written: 2 samples")
with tarfile.open("shard.tar") as shard:
    print("in the file:", *sorted(shard.getnames()))
samples = list(webdataset.WebDataset("shard.tar", shardshuffle=False))
for sample in samples:
    fields = sorted(name for name in sample if not name.startswith("__"))
    print(f"read: {len(samples)} sample, key {sample['__key__']}, fields", *fields)
sys.exit(0 if len(samples) == 1 else "this has changed")
EOF
